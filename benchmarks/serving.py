"""This service beside what people would use instead, and beside its own floor.

All serve the same trained A-CTR to the same requests from the same Redis, and give the same scores,
which is checked before anything is timed. Each has one worker on one core; the load generator and
the Redis have another. Each takes turns with this service, second after second, so that what is
compared was measured on a machine of the same speed.
"""

from __future__ import annotations

import argparse
import http.client
import os
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import cached_property
from pathlib import Path

import numpy as np

from benchmarks.figures import Figures
from benchmarks.serving_model import Body, Served, make
from benchmarks.serving_peers import (
    ASK_TIMEOUT_S,
    OTHERS,
    OURS,
    PLAIN,
    TILED,
    TUNED,
    System,
    ask,
    floor,
    running,
)
from loadtest import loop
from loadtest.address import SCORE_PATH
from loadtest.bodies import Request
from loadtest.client import Target
from loadtest.queue import ideal_latencies
from loadtest.report import PhaseReport, percentile_ms
from loadtest.run import Phase, Runner
from loadtest.schedule import arrivals_of
from training.demo import running_redis
from training.recipes import Recipe, complete_journey
from training.workspace import Workspace, WorkspaceError

TOLERANCE = 1e-5
"""Largest difference between two servers' scores of a candidate."""
GOALS = {TUNED: 2.2, TILED: 4.0, PLAIN: 6.0}
"""Times their requests per second, at the largest number of candidates."""
FLOOR = "no HTTP (floor)"
POSSIBLE = 1.05
"""Times its own floor that this service can be; above that, something else slowed the floor."""
SHARES = {"half": (0.5, "poisson"), "a tenth": (0.1, "constant")}
"""Of the maximum, at which latency is measured, and how requests arrive. Where these are Poisson,
even an ideal queue has a p99 of 1.9 times its median at a tenth; at a constant pace no request
waits for another, and what remains is the service's own."""


@dataclass(frozen=True)
class Size:
    """Of the run. Goals hold for the most and for the fewest of the candidates."""

    candidates: tuple[int, ...] = (50, 200, 500)
    bodies: int = 40
    checked: int = 5
    """Bodies of each number of candidates whose scores are compared."""
    pairs: int = 3
    """How often another server, and this service right after it, is measured."""
    clients: tuple[int, ...] = (1, 2, 8)
    """Of which the best number counts; and as many requests at once without HTTP."""
    closed_s: float = 1.0
    open_s: float = 3.0
    own_open_s: float = 24.0
    """The same of this service, which goals hold for: the p99 of some hundred requests is that of
    two or three of them, and so of whatever the machine did meanwhile."""


QUICK = Size(
    candidates=(10, 30),
    bodies=4,
    checked=2,
    pairs=1,
    clients=(1, 2),
    closed_s=0.3,
    open_s=0.5,
    own_open_s=0.5,
)
Rate = Callable[[int, int], float]
"""Requests a second, by the number of candidates and of requests at once."""


@dataclass
class Found:
    """What was measured, by system and number of candidates."""

    pairs: dict[tuple[str, int], list[tuple[float, float]]] = field(default_factory=dict)
    """Requests a second of a system, and then of this service."""
    parts_ms: dict[str, float] = field(default_factory=dict)
    latency: dict[tuple[str, int, str], tuple[float, float, float]] = field(default_factory=dict)
    """p50, p99, and the ideal queue's p99, ms, at a share of the maximum."""

    def maximum(self, name: str, num: int) -> float:
        """Requests a second of a system, the median."""
        if name == OURS.name:
            return statistics.median(
                ours for (_, n), pairs in self.pairs.items() if n == num for _, ours in pairs
            )
        return statistics.median(other for other, _ in self.pairs[name, num])

    def times(self, name: str, num: int) -> float:
        """This service to a system, the median."""
        return statistics.median(ours / other for other, ours in self.pairs[name, num])


class Differing(AssertionError):
    """Two servers give different scores, so their speeds can't be compared."""


def measure(served: Served, size: Size, others: Sequence[System], server_core: int) -> Found:
    """The floor before and after the others; this service in turns with each of them."""
    found, expected = Found(), dict[int, list[list[float]]]()
    with running(OURS, served, server_core) as port:
        check(OURS, port, served, size, expected)
        own = Server(OURS, port, served, size)
        _measure_floor(found, own, server_core)
        own.measure_latencies(found, size.candidates, size.own_open_s)
        found.parts_ms |= own.stages()
        for system in others:
            with running(system, served, server_core) as other_port:
                check(system, other_port, served, size, expected)
                other = Server(system, other_port, served, size)
                _compare(found, system.name, other.rate, own)
                other.measure_latencies(found, [max(size.candidates)], size.open_s)
        _measure_floor(found, own, server_core)
    return found


def check(
    system: System, port: int, served: Served, size: Size, expected: dict[int, list[list[float]]]
) -> None:
    """The first server's scores are what is expected of all.

    Raises:
        Differing: names the server and the difference.
    """
    for num, bodies in served.bodies.items():
        given = [ask(port, system.content(body)) for body in bodies[: size.checked]]
        worst = float(np.abs(np.subtract(given, expected.setdefault(num, given))).max())
        if not worst <= TOLERANCE:
            raise Differing(f"{system.name}: a score of {num} candidates is off by {worst:.2g}")


def _measure_floor(found: Found, own: Server, core: int) -> None:
    with floor(own.served, core) as without_http:
        _compare(found, FLOOR, lambda *what: without_http("rate", *what, own.size.closed_s), own)
        found.parts_ms |= without_http("parts", max(own.size.candidates))


def _compare(found: Found, name: str, rate: Rate, own: Server) -> None:
    for num in own.size.candidates:
        rate(num, 1)  # warms it up
        pairs = found.pairs.setdefault((name, num), [])
        pairs += [_pair(rate, own.rate, num, own.size) for _ in range(own.size.pairs)]
        per_s, times = found.maximum(name, num), found.times(name, num)
        said = f"{per_s:.0f} requests/s, {times:.2f} times that by {OURS.name}"
        print(f"{num} candidates, {name}: {said}", file=sys.stderr)


def _pair(other: Rate, own: Rate, num: int, size: Size) -> tuple[float, float]:
    """Of each its best number of requests at once. Neither does anything in the other's turn."""
    rates = [(other(num, at_once), own(num, at_once)) for at_once in size.clients]
    return max(rate for rate, _ in rates), max(rate for _, rate in rates)


@dataclass(frozen=True)
class Server:
    """One that runs, and what it is sent."""

    system: System
    port: int
    served: Served
    size: Size

    @cached_property
    def _requests(self) -> dict[int, list[Request]]:
        """By the number of candidates; made once, and not between two that take turns."""
        return {
            num: [_wire(self.system, body, num) for body in bodies]
            for num, bodies in self.served.bodies.items()
        }

    def rate(self, num: int, clients: int) -> float:
        """Requests a second of so many clients that wait for their answers."""
        return self._phase(num, Phase("closed", self.size.closed_s, clients=clients)).ok_per_s

    def measure_latencies(self, found: Found, nums: Sequence[int], seconds: float) -> None:
        """At `SHARES` of its maximum, which is known."""
        for num in nums:
            for share, (part, kind) in SHARES.items():
                rate = part * found.maximum(self.system.name, num)
                where = self.system.name, num, share
                found.latency[where] = self._latency(num, seconds, rate, kind)

    def stages(self) -> dict[str, float]:
        """Median milliseconds of the service's own stages, and of what a client waits beyond them,
        at most candidates."""
        bodies = self.served.bodies[max(self.size.candidates)]
        return _stages(self.port, [self.system.content(body) for body in bodies])

    def _latency(
        self, num: int, seconds: float, rate: float, kind: str
    ) -> tuple[float, float, float]:
        """p50, p99, and that of an ideal queue that serves as fast as this does just now, ms."""
        one = self._phase(num, Phase("closed", self.size.closed_s, clients=1)).latency_ms.p50
        report = self._phase(num, Phase("open", seconds, rate=rate, arrivals=kind))
        p50, p99 = report.latency_ms.p50, report.latency_ms.p99
        assert one
        ideal = percentile_ms(ideal_latencies(arrivals_of(kind, rate, seconds, 0), one / 1000), 99)
        assert p50
        assert p99
        assert ideal
        return p50, p99, ideal

    def _phase(self, num: int, phase: Phase) -> PhaseReport:
        """A runner's first phase has its arrivals from the seed itself."""
        runner = Runner(Target("127.0.0.1", self.port), self._requests[num])
        report = loop.run(runner.run_phase(phase))
        if report.num_failed or report.degraded:
            what = f"{self.system.name}, {num} candidates"
            raise RuntimeError(f"{what}: failed {report.failed}, degraded {report.degraded_by}")
        return report


def _wire(system: System, body: Body, num: int) -> Request:
    content = system.content(body)
    head = f"POST {SCORE_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return Request(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content, num)


def _stages(port: int, contents: Sequence[bytes]) -> dict[str, float]:
    taken: defaultdict[str, list[float]] = defaultdict(list)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_TIMEOUT_S)
    for content in contents:
        start_s = time.perf_counter()
        connection.request("POST", SCORE_PATH, content, {"content-type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        waited_ms = (time.perf_counter() - start_s) * 1000
        entries = answer.headers["server-timing"].split(", ")
        stages = {stage: float(ms) for stage, _, ms in (e.partition(";dur=") for e in entries)}
        for stage, ms in stages.items():
            taken[f"{stage} (Server-Timing)"].append(ms)
        taken["HTTP (client's wait beyond total)"].append(waited_ms - stages["total"])
    connection.close()
    return {stage: statistics.median(ms) for stage, ms in taken.items()}


# What it comes to


def figures(found: Found, size: Size) -> Figures:
    """Medians; a ratio is that of the two figures of a pair."""
    said, others = Figures(), [n for n in dict.fromkeys(n for n, _ in found.pairs) if n != FLOOR]
    fewest, most = min(size.candidates), max(size.candidates)
    for num in size.candidates:
        for name in (FLOOR, OURS.name, *others):
            rate = found.maximum(name, num)
            said.add(f"requests per second, N = {num}, {name}", rate, "1/s")
    for num in size.candidates:
        goal = {fewest: 0.8, most: 0.9}.get(num)
        share = found.times(FLOOR, num)
        said.add(f"{OURS.name} to its floor, N = {num}", share, "x", at_least=goal)
    pairs = [pair for num in size.candidates for pair in found.pairs[FLOOR, num]]
    disturbed = sum(ours > POSSIBLE * floor for floor, ours in pairs)
    said.add("times that the floor was beaten, so disturbed", disturbed, "", at_most=0)
    for name in others:
        for num in size.candidates:
            goal = GOALS.get(name) if num == most else None
            times = found.times(name, num)
            said.add(f"{OURS.name} to {name}, N = {num}", times, "x", at_least=goal)
    _add_latencies(said, found)
    for part, ms in found.parts_ms.items():
        said.add(f"time of a request, N = {most}, {part}", ms, "ms")
    return said


def _add_latencies(said: Figures, found: Found) -> None:
    for (name, num, share), (p50, p99, ideal) in found.latency.items():
        where = f"N = {num}, {share} of the maximum, {name}"
        is_ours = name == OURS.name
        said.add(f"p50, {where}", p50, "ms")
        said.add(f"p99, {where}", p99, "ms")
        if share == "half":
            goal = 1.3 if is_ours else None
            said.add(f"p99 to an ideal queue, {where}", p99 / ideal, "x", at_most=goal)
        else:
            goal = 1.6 if is_ours else None
            said.add(f"p99 to p50, {where}", p99 / p50, "x", at_most=goal)


@contextmanager
def on_core(core: int) -> Iterator[None]:
    """This process, and what it starts, in the block."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {core})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def run(
    source: Workspace,
    asof: date,
    recipe: Recipe,
    out: Path,
    size: Size,
    others: Sequence[System] = OTHERS,
) -> Figures:
    """Serves the A-CTR of a day from each server in turn, and leaves out/serving.json."""
    cores = sorted(os.sched_getaffinity(0))
    folder = out / "serving"
    with on_core(cores[-1]), running_redis() as store:
        bodies = dict.fromkeys(size.candidates, size.bodies)
        served = make(source, asof, recipe, folder, store, bodies)
        found = figures(measure(served, size, others, cores[0]), size)
    found.write(out / "serving.json")
    return found


def newest_asof(workspace: Workspace) -> date:
    """The day of the newest A-CTR.

    Raises:
        WorkspaceError: there is none.
    """
    day = workspace.newest("actr-{}".format, date.max)
    if day is None:
        raise WorkspaceError(f"{workspace.root}: no A-CTR; make demo trains one")
    return day


def model_of(options: argparse.Namespace, name: str) -> tuple[Workspace, date]:
    """The workspace that a benchmark was told and the day of its newest A-CTR; ends the process
    where there is none. From then on SIGTERM is an exit, so that servers end too."""
    workspace = Workspace(options.bundle_from)
    try:
        asof = newest_asof(workspace)
    except WorkspaceError as error:
        sys.exit(f"{name}: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    return workspace, asof


def arguments_of(text: str) -> argparse.ArgumentParser:
    """What the benchmarks of a trained model are told."""
    parser = argparse.ArgumentParser(description=text)
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder")
    parser.add_argument(
        "--bundle-from", type=Path, default=Path("build/workspace"), help="workspace"
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of("This service beside other servers.")
    parser.add_argument("--quick", action="store_true", help="small, and without the peers")
    options = parser.parse_args(arguments)
    size, others = (QUICK, ()) if options.quick else (Size(), OTHERS)
    if absent := [system.name for system in others if not system.environment_ready]:
        sys.exit(f"benchmarks.serving: not installed: {', '.join(absent)}; make bench-serving does")
    workspace, asof = model_of(options, "benchmarks.serving")
    print(run(workspace, asof, complete_journey(), options.out.resolve(), size, others))


if __name__ == "__main__":
    main()
