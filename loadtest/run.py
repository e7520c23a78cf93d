"""Runs phases one after the other, each with what disturbs it, until the end or until it is told to
stop; what ran is reported either way."""

from __future__ import annotations

import asyncio
import gc
import signal
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from loadtest.bodies import Request
from loadtest.client import Target, clock_s
from loadtest.disturbance import Disturbance, Freeze
from loadtest.report import Event, PhaseReport, Plan, summarise
from loadtest.schedule import arrivals_of
from loadtest.search import SearchReport, Step, Stopped, highest_rate, step_seconds
from loadtest.traffic import Traffic

Watch = Callable[[Plan, Traffic], Coroutine[Any, Any, None]]
"""Shows how far a phase is; cancelled at its end."""


@dataclass(frozen=True)
class Phase:
    """Either `rate` requests a second whatever happens, or `clients` that wait for answers."""

    name: str
    seconds: float
    rate: float = 0.0
    clients: int = 0
    arrivals: str = "poisson"
    disturbance: Disturbance | None = None
    judged: bool = True

    def __post_init__(self) -> None:
        if not self.seconds > 0 or (self.rate > 0) == (self.clients > 0):
            raise ValueError(
                f"phase {self.name!r}: {self.seconds} s, rate {self.rate}, {self.clients} clients;"
                " it takes a length above 0, and either a rate or clients"
            )
        freeze = self.disturbance
        if isinstance(freeze, Freeze) and freeze.after_s + freeze.seconds > self.seconds:
            raise ValueError(
                f"phase {self.name!r}: frozen from {freeze.after_s:g} s for {freeze.seconds:g} s;"
                f" that must end within its {self.seconds:g} s"
            )

    @property
    def plan(self) -> Plan:
        arrivals = self.arrivals if self.rate else "closed loop"
        return Plan(self.name, self.seconds, self.rate, self.clients, arrivals, self.judged)


class Runner:
    """Runs phases against one target, on one event loop; `stop` ends the one that runs and all that
    would follow."""

    def __init__(
        self,
        target: Target,
        requests: Sequence[Request],
        seed: int = 0,
        watch: Watch | None = None,
    ) -> None:
        self.stop = asyncio.Event()
        self.started = datetime.now(UTC).isoformat(timespec="seconds")
        self.reports: list[PhaseReport] = []
        """Of the phases that ran, the last one perhaps in part."""
        self._target, self._requests, self._seed, self._watch = target, requests, seed, watch

    async def run(self, phases: Sequence[Phase]) -> None:
        for phase in phases:
            if not self.stop.is_set():
                await self.run_phase(phase)

    async def run_phase(self, phase: Phase) -> PhaseReport:
        """Also kept in `reports`."""
        # Phases differ in their arrivals, and are the same in every run with the seed.
        seed = self._seed + 1000 * len(self.reports)
        traffic, over = Traffic(self._target, self._requests, seed), asyncio.Event()
        events: list[Event] = []

        def note(text: str, ok: bool) -> None:
            events.append(Event(round(clock_s() - traffic.started_s, 3), text, ok))

        async def disturb() -> None:
            await traffic.started.wait()
            if phase.disturbance:
                await phase.disturbance.run(note, over)

        watch = self._watch(phase.plan, traffic) if self._watch else _nothing()
        disturbing, watching = asyncio.create_task(disturb()), asyncio.create_task(watch)
        try:
            with _without_collections():
                await self._send(phase, traffic, seed)
            complete, ran_s = not self.stop.is_set(), clock_s() - traffic.started_s
            over.set()
            await disturbing
        finally:
            await _cancel([disturbing, watching])
        seconds = phase.seconds if complete else max(0.0, min(phase.seconds, ran_s))
        self.reports.append(summarise(traffic, phase.plan, seconds, events, complete))
        return self.reports[-1]

    async def search(
        self, slo_p99_ms: float, first: float, most: float, tolerance: float, step_s: float
    ) -> SearchReport:
        """The highest rate at which p99 of all requests is within the limit; a step is a phase."""

        async def measure(rate: float) -> Step:
            seconds = step_seconds(rate, step_s)
            report = await self.run_phase(Phase(f"{rate:.5g}/s", seconds, rate, judged=False))
            if not report.complete:
                raise Stopped
            p99_ms = report.p99_all_ms
            held = p99_ms is not None and p99_ms <= slo_p99_ms
            if not held:
                # The service may be at work on what was given up; that is not the next step's.
                await asyncio.sleep(self._target.timeout_s)
            return Step(rate, p99_ms, held)

        return await highest_rate(measure, slo_p99_ms, first, most, tolerance)

    async def _send(self, phase: Phase, traffic: Traffic, seed: int) -> None:
        if phase.rate:
            arrivals = arrivals_of(phase.arrivals, phase.rate, phase.seconds, seed)
            await traffic.open_loop(arrivals, self.stop)
        else:
            await traffic.closed_loop(phase.clients, phase.seconds, self.stop)


@contextmanager
def stopping_on_signals(stop: asyncio.Event) -> Iterator[asyncio.Event]:
    """Ctrl-C and SIGTERM set `stop`, and the event that is given."""
    signalled, loop = asyncio.Event(), asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def end() -> None:
        signalled.set()
        stop.set()

    for number in signals:
        loop.add_signal_handler(number, end)
    try:
        yield signalled
    finally:
        for number in signals:
            loop.remove_signal_handler(number)


async def _nothing() -> None:
    pass


async def _cancel(tasks: Sequence[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@contextmanager
def _without_collections() -> Iterator[None]:
    """A collection of garbage while requests are under way would be measured as their latency;
    nothing here leaves cycles that would need one."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
