"""What a run showed: figures per phase and per second, exact over all requests.

All latencies of a phase are kept (8 bytes each, and their number is bounded), so percentiles are
exact, without a histogram's buckets, and every second can be cut out afterwards. A percentile is
the smallest latency that at least that share of requests did not exceed.
"""

from __future__ import annotations

import json
import os
import platform
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from loadtest.answers import NOT_SENT, OK, Answer
from loadtest.search import SearchReport
from loadtest.traffic import Traffic

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Counts = dict[str, int]


@dataclass(frozen=True)
class Latency:
    """Milliseconds; of nothing, None everywhere."""

    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    p99_9: float | None = None
    max: float | None = None

    @classmethod
    def of(cls, seconds: Floats) -> Latency:
        if not len(seconds):
            return cls()
        shares = (50, 90, 99, 99.9, 100)
        return cls(_ms(seconds.mean()), *(percentile_ms(seconds, share) for share in shares))


def percentile_ms(seconds: Floats, share: float) -> float | None:
    """None of nothing, and where that share is not reached because too many are infinite."""
    if not len(seconds):
        return None
    found = float(np.percentile(seconds, share, method="inverted_cdf"))
    return _ms(found) if np.isfinite(found) else None


def _ms(seconds: float) -> float:
    return round(float(seconds) * 1000, 4)


@dataclass(frozen=True)
class Event:
    """Something that was done to the service."""

    at_s: float
    text: str
    ok: bool


@dataclass(frozen=True)
class Second:
    """The requests that were due in one second of a phase, whenever they ended."""

    second: int
    due: int
    sent: int
    ok: int
    failed: Counts
    degraded: int
    models: Counts
    p50_ms: float | None
    p99_ms: float | None
    max_ms: float | None


@dataclass(frozen=True)
class Plan:
    """What a phase was to be."""

    name: str
    seconds: float
    rate: float
    """Requests a second of the schedule; 0 in a closed loop."""
    clients: int
    """Of a closed loop; 0 in an open one."""
    arrivals: str
    judged: bool
    """Limits hold for this phase."""


@dataclass(frozen=True)
class PhaseReport:
    """One phase. `due` = `ok` + all of `failed` + `unfinished`."""

    plan: Plan
    seconds: float
    """As planned, or until it was interrupted."""
    complete: bool
    due: int
    sent: int
    late: int
    """Not sent at their time because all connections were taken; part of them later."""
    not_sent: int
    """Given up unsent, for the same reason; these are in `failed` too."""
    unfinished: int
    """Under way when the run was interrupted."""
    ok: int
    ok_per_s: float
    failed: Counts
    """By kind, see `loadtest.answers`."""
    degraded: int
    """Answers, among `ok`, that lacked an input."""
    degraded_by: Counts
    models: Counts
    latency_ms: Latency
    """From the intended time of sending to the complete answer; of `ok` ones."""
    p99_all_ms: float | None
    """The same with failed ones as infinitely late; None where more than 1 % failed."""
    lag_ms: Latency
    """From the intended time to the actual one, of those that are not `late`: the generator's own
    delay, and that of opening a connection; it is part of `latency_ms`."""
    peak_in_flight: int
    events: list[Event]
    timeline: list[Second]

    @property
    def num_failed(self) -> int:
        return sum(self.failed.values())


@dataclass(frozen=True)
class _Columns:
    """Requests in the order of their intended times; columns of equal length."""

    intended_s: Floats
    """From the start of the phase."""
    done_s: Floats
    lag_s: Floats
    sent: Bools
    late: Bools
    answers: list[Answer]

    @classmethod
    def of(cls, traffic: Traffic) -> _Columns:
        samples = traffic.samples
        intended, sent, done = map(np.array, (samples.intended_s, samples.sent_s, samples.done_s))
        order = np.argsort(intended, kind="stable")
        return cls(
            intended[order] - traffic.started_s,
            done[order] - traffic.started_s,
            (sent - intended)[order],
            (sent > 0)[order],
            np.frombuffer(samples.late, np.bool_)[order],
            [samples.answers[i] for i in order],
        )

    @cached_property
    def ok(self) -> Bools:
        return np.array([answer.outcome == OK for answer in self.answers], np.bool_)

    @cached_property
    def latency_s(self) -> Floats:
        return self.done_s - self.intended_s

    def cut(self, start: int, end: int) -> _Columns:
        return _Columns(
            self.intended_s[start:end],
            self.done_s[start:end],
            self.lag_s[start:end],
            self.sent[start:end],
            self.late[start:end],
            self.answers[start:end],
        )

    def failed(self) -> Counts:
        return _counted(answer.outcome for answer in self.answers if answer.outcome != OK)

    def models(self) -> Counts:
        return _counted(answer.model for answer in self.answers if answer.model)

    def degraded_by(self) -> Counts:
        return _counted(answer.degraded for answer in self.answers if answer.degraded)

    def timeline(self, seconds: float) -> list[Second]:
        bounds = np.searchsorted(self.intended_s, np.arange(np.ceil(seconds) + 1))
        return [self.cut(a, b)._second(i) for i, (a, b) in enumerate(pairwise(bounds))]

    def _second(self, second: int) -> Second:
        latency = Latency.of(self.latency_s[self.ok])
        return Second(
            second,
            due=len(self.answers),
            sent=int(self.sent.sum()),
            ok=int(self.ok.sum()),
            failed=self.failed(),
            degraded=sum(self.degraded_by().values()),
            models=self.models(),
            p50_ms=latency.p50,
            p99_ms=latency.p99,
            max_ms=latency.max,
        )


def _counted(values: Iterator[str]) -> Counts:
    return dict(sorted(Counter(values).items()))


def summarise(
    traffic: Traffic, plan: Plan, seconds: float, events: Sequence[Event], complete: bool
) -> PhaseReport:
    """The figures of a phase that ran for `seconds`."""
    columns = _Columns.of(traffic)
    failed, degraded_by = columns.failed(), columns.degraded_by()
    in_time = columns.ok & (columns.done_s <= seconds)
    return PhaseReport(
        plan=plan,
        seconds=round(seconds, 3),
        complete=complete,
        due=len(traffic.samples) + traffic.under_way,
        sent=int(columns.sent.sum()),
        late=int(columns.late.sum()),
        not_sent=failed.get(NOT_SENT, 0),
        unfinished=traffic.under_way,
        ok=int(columns.ok.sum()),
        ok_per_s=round(float(in_time.sum()) / seconds, 3) if seconds else 0.0,
        failed=failed,
        degraded=sum(degraded_by.values()),
        degraded_by=degraded_by,
        models=columns.models(),
        latency_ms=Latency.of(columns.latency_s[columns.ok]),
        p99_all_ms=percentile_ms(np.where(columns.ok, columns.latency_s, np.inf), 99),
        lag_ms=Latency.of(columns.lag_s[columns.sent & ~columns.late]),
        peak_in_flight=traffic.peak_in_flight,
        events=list(events),
        timeline=columns.timeline(seconds),
    )


@dataclass(frozen=True)
class Limits:
    """What must hold in every phase that is judged; None is no limit."""

    slo_p99_ms: float | None = None
    """On `p99_all_ms`, so a failed request counts as infinitely late."""
    max_failures: int | None = None

    def broken(self, phase: PhaseReport) -> list[str]:
        """One line for each that did not hold; none where the phase is not judged."""
        found = [f"{phase.plan.name}: {event.text}" for event in phase.events if not event.ok]
        if not phase.plan.judged:
            return found
        p99, slo = phase.p99_all_ms, self.slo_p99_ms
        if slo is not None and (p99 is None or p99 > slo):
            shown = "more than 1 % failed" if p99 is None else f"{p99:.1f} ms"
            found.append(f"{phase.plan.name}: p99 of all requests: {shown}; at most {slo:g} ms")
        if self.max_failures is not None and phase.num_failed > self.max_failures:
            found.append(
                f"{phase.plan.name}: {phase.num_failed} requests failed; at most"
                f" {self.max_failures}"
            )
        return found


@dataclass(frozen=True)
class Report:
    """A whole run, as it is stored."""

    command: str
    target: str
    seed: int
    requests: str
    """Where the bodies are from."""
    candidates: list[int]
    """Distinct numbers of candidates, ascending."""
    phases: list[PhaseReport]
    limits: Limits
    search: SearchReport | None = None
    started: str = ""
    """UTC, ISO 8601."""
    machine: str = field(default_factory=lambda: machine())

    def broken(self) -> list[str]:
        found = [line for phase in self.phases for line in self.limits.broken(phase)]
        return found + (self.search.broken() if self.search else [])

    def write(self, path: Path) -> None:
        write_json(path, asdict(self) | {"broken": self.broken()})


def machine() -> str:
    """What the figures were measured on."""
    cores, python = len(os.sched_getaffinity(0)), platform.python_version()
    return f"{platform.machine()}, {cores} cores, Python {python}"


def write_json(path: Path, document: object) -> None:
    """Writes to a temporary name and renames, so that half a file is never seen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n")
    draft.replace(path)


def table(phases: Sequence[PhaseReport]) -> str:
    """The phases for people to read."""
    head = f"{'phase':<16}{'due':>8}{'ok':>8}{'ok/s':>9}{'failed':>8}{'degraded':>9}"
    head += f"{'p50 ms':>9}{'p99 ms':>9}{'max ms':>9}{'lag p99':>9}"
    return "\n".join([head, *map(_row, phases)])


def _row(phase: PhaseReport) -> str:
    latency, lag = phase.latency_ms, phase.lag_ms
    counts = f"{phase.plan.name:<16}{phase.due:>8}{phase.ok:>8}{phase.ok_per_s:>9.1f}"
    counts += f"{phase.num_failed:>8}{phase.degraded:>9}"
    times = "".join(_cell(value) for value in (latency.p50, latency.p99, latency.max, lag.p99))
    return counts + times + "".join(f"  {name} {n}" for name, n in _details(phase))


def _cell(value: float | None) -> str:
    return f"{'-':>9}" if value is None else f"{value:>9.2f}"


def _details(phase: PhaseReport) -> Iterator[tuple[str, int]]:
    yield from phase.failed.items()
    if phase.late:
        yield "late", phase.late
    if phase.unfinished:
        yield "unfinished", phase.unfinished
