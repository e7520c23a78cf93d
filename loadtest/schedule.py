"""When requests are due: fixed before the run, whatever the server does."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

ARRIVALS = ("poisson", "constant")
MAX_REQUESTS = 2_000_000
"""In one phase; more would not fit into memory."""


def arrivals_of(kind: str, rate: float, seconds: float, seed: int) -> Floats:
    """Seconds after the start, ascending, float64 [n], all below `seconds`.

    Raises:
        ValueError: a kind that is not in `ARRIVALS`, a rate or length that can't be.
    """
    if not (rate > 0 and seconds > 0 and rate * seconds <= MAX_REQUESTS):
        raise ValueError(
            f"rate {rate} a second for {seconds} s; both must be above 0,"
            f" and at most {MAX_REQUESTS:,} requests"
        )
    if kind == "constant":
        return np.arange(int(np.ceil(seconds * rate))) / rate
    if kind == "poisson":
        return _poisson(rate, seconds, np.random.default_rng([seed, 0]))
    raise ValueError(f"arrivals {kind!r}; there are: {', '.join(ARRIVALS)}")


def choices(num: int, num_requests: int, seed: int) -> npt.NDArray[np.int64]:
    """Which of `num_requests` each of `num` arrivals sends, int64 [num]."""
    return np.random.default_rng([seed, 1]).integers(0, num_requests, num)


def _poisson(rate: float, seconds: float, generator: np.random.Generator) -> Floats:
    """Given their number, the times of a Poisson process are uniform."""
    return np.sort(generator.uniform(0, seconds, generator.poisson(rate * seconds)))
