"""The ideal that a server is measured against: one queue, first come first served, nothing lost."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


def ideal_latencies(arrivals_s: Floats, service_s: float | Floats) -> Floats:
    """Seconds from arrival to completion at a single server with a first-in-first-out queue.

    The recursion of D. V. Lindley, "The theory of queues with a single server" (1952), in closed
    form: with C the running sum of service times, completion i is C[i] + max over j <= i of
    (arrival[j] - C[j - 1]).

    Args:
        arrivals_s: float64 [n], ascending.
        service_s: one for all, or float64 [n], in the order of the arrivals.

    Raises:
        ValueError: arrivals descend, or a service time is negative.
    """
    service = np.broadcast_to(np.asarray(service_s, np.float64), arrivals_s.shape)
    if np.any(np.diff(arrivals_s) < 0):
        raise ValueError("arrivals_s descends; it must be in order of time")
    if np.any(service < 0):
        raise ValueError(f"service_s has {service.min()}; it must be 0 or more")
    work = np.cumsum(service)
    return work + np.maximum.accumulate(arrivals_s - (work - service)) - arrivals_s


def mean_wait_s(rate: float, service_s: float, service_variance_s2: float = 0.0) -> float:
    """Mean wait before service where arrivals are Poisson: the Pollaczek-Khinchine formula.

    Raises:
        ValueError: the server is not faster than the arrivals, so that the queue has no mean.
    """
    load = rate * service_s
    if not 0 <= load < 1:
        raise ValueError(f"rate * service_s is {load:.3g}; it must be below 1")
    return rate * (service_s**2 + service_variance_s2) / (2 * (1 - load))
