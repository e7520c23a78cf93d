"""The highest rate that a service holds, found in steps."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from math import sqrt

MIN_REQUESTS = 1000
"""In a step: its p99 rests on the ten slowest of them."""
MAX_STEP_S = 60.0
"""At low rates a step ends with fewer."""
MAX_HALVINGS = 3
"""Below the first rate, until the search gives up."""


@dataclass(frozen=True)
class Step:
    """A rate that was tried; `p99_ms` counts failures as infinitely late, None says too many."""

    rate: float
    p99_ms: float | None
    held: bool


class Stopped(Exception):
    """Raised by what measures a step, when there shall be no more of them."""


Measure = Callable[[float], Awaitable[Step]]


@dataclass(frozen=True)
class SearchReport:
    """`rate` is the highest that held, 0 where none did; between it and the lowest that did not
    lies at most the tolerance, unless `rate` is the most that was allowed."""

    slo_p99_ms: float
    tolerance: float
    rate: float
    p99_ms: float | None
    complete: bool
    """False where it was stopped: a higher rate may hold as well."""
    steps: list[Step]

    def broken(self) -> list[str]:
        if self.rate:
            return []
        if not self.complete:
            return ["search: stopped before any rate held"]
        lowest = min(step.rate for step in self.steps)
        return [f"search: p99 above {self.slo_p99_ms:g} ms at {lowest:g}/s too"]


def step_seconds(rate: float, at_least_s: float) -> float:
    """How long a step takes, so that its p99 rests on enough requests if that is soon."""
    return max(at_least_s, min(MIN_REQUESTS / rate, MAX_STEP_S))


async def highest_rate(
    measure: Measure, slo_p99_ms: float, first: float, most: float, tolerance: float
) -> SearchReport:
    """Doubles the rate from `first` while it holds, halves it while it doesn't, then bisects until
    the rates on both sides differ by at most `tolerance` (a share)."""
    steps: list[Step] = []
    try:
        await _search(measure, steps, first, most, tolerance)
        complete = True
    except Stopped:
        complete = False
    best, _ = _bracket(steps)
    rate, p99_ms = (best.rate, best.p99_ms) if best else (0.0, None)
    return SearchReport(slo_p99_ms, tolerance, rate, p99_ms, complete, steps)


async def _search(
    measure: Measure, steps: list[Step], first: float, most: float, tolerance: float
) -> None:
    steps.append(await measure(first))
    while _goes_on_doubling(steps, most):
        steps.append(await measure(min(2 * steps[-1].rate, most)))
    while not any(step.held for step in steps) and len(steps) <= MAX_HALVINGS:
        steps.append(await measure(steps[-1].rate / 2))
    low, high = _bracket(steps)
    while low and high > low.rate * (1 + tolerance):
        steps.append(await measure(sqrt(low.rate * high)))
        low, high = _bracket(steps)


def _goes_on_doubling(steps: list[Step], most: float) -> bool:
    return steps[-1].held and steps[-1].rate < most


def _bracket(steps: list[Step]) -> tuple[Step | None, float]:
    """The best step that held below the lowest rate that did not, and that rate."""
    high = min((step.rate for step in steps if not step.held), default=0.0)
    held = [step for step in steps if step.held and (not high or step.rate < high)]
    return max(held, key=lambda step: step.rate, default=None), high
