"""This service beside what people would use instead, and beside its own floor.

All serve the same trained A-CTR to the same requests from the same Redis, and give the same scores,
which is checked before anything is timed. Each has one worker on one core; the load generator and
the Redis have another. They take turns, round after round, and what is compared was measured in the
same round.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path

import numpy as np

from benchmarks.figures import Figures
from benchmarks.serving_model import Body, Served, make
from benchmarks.serving_peers import (
    ASK_TIMEOUT_S,
    OTHERS,
    OURS,
    PLAIN,
    ROOT,
    TILED,
    TUNED,
    System,
    ask,
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
    rounds: int = 2
    clients: tuple[int, ...] = (1, 2, 8)
    closed_s: float = 1.0
    open_s: float = 3.0
    own_open_s: float = 12.0
    """The same of this service, which goals hold for: the p99 of some hundred requests is that of
    two or three of them, and so of whatever the machine did meanwhile."""


QUICK = Size(
    (10, 30), 4, checked=2, rounds=1, clients=(1, 2), closed_s=0.3, open_s=0.5, own_open_s=0.5
)


@dataclass
class Round:
    """What one round found, by system and number of candidates."""

    floor: dict[int, float] = field(default_factory=dict)
    parts_ms: dict[str, float] = field(default_factory=dict)
    rate: dict[tuple[str, int], float] = field(default_factory=dict)
    """Requests a second of the best number of clients."""
    latency: dict[tuple[str, int, str], tuple[float, float, float]] = field(default_factory=dict)
    """p50, p99, and the ideal queue's p99, ms, at a share of the maximum."""


class Differing(AssertionError):
    """Two servers give different scores, so their speeds can't be compared."""


def measure(served: Served, size: Size, others: Sequence[System], server_core: int) -> list[Round]:
    """Every round each server once, and the floor before and after this service: the better one."""
    rounds, expected = [], dict[int, list[list[float]]]()
    for number in range(size.rounds):
        found = Round()
        _measure_floor(found, served, size, server_core)
        for system in (OURS, *others):
            with running(system, served, server_core) as port:
                check(system, port, served, size, expected)
                _measure_system(found, system, port, served, size, number)
            if system is OURS:
                _measure_floor(found, served, size, server_core)
            rates = {n: round(found.rate[system.name, n], 1) for n in size.candidates}
            print(f"round {number + 1}, {system.name}: {rates} requests/s", file=sys.stderr)
        rounds.append(found)
    return rounds


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


def _measure_floor(found: Round, served: Served, size: Size, core: int) -> None:
    for num, bodies in served.bodies.items():
        (served.folder / f"bodies-{num}.json").write_text(json.dumps(bodies))
    current = served.workspace.registry.current()
    assert current is not None
    bundle = served.workspace.registry.path(current.current)
    command = [sys.executable, "-m", "benchmarks.serving_floor", str(served.folder), str(bundle)]
    command += [served.store, str(size.closed_s)]
    pinned = partial(os.sched_setaffinity, 0, {core})
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True, preexec_fn=pinned)
    said = json.loads(done.stdout.splitlines()[-1])
    for num, rate in said["rates"].items():
        found.floor[int(num)] = max(found.floor.get(int(num), 0.0), rate)
    found.parts_ms |= said["parts_ms"]


def _measure_system(
    found: Round, system: System, port: int, served: Served, size: Size, seed: int
) -> None:
    most = max(size.candidates)
    for num, bodies in served.bodies.items():
        requests = [_wire(system, body, num) for body in bodies]
        run = partial(_phase, port, requests, seed, f"{system.name}, {num} candidates")
        run(Phase("warm-up", size.closed_s / 2, clients=2))
        closed = {n: run(Phase("closed", size.closed_s, clients=n)) for n in size.clients}
        best = max(report.ok_per_s for report in closed.values())
        found.rate[system.name, num] = best
        service_ms = closed[min(closed)].latency_ms.p50
        assert service_ms is not None
        seconds = size.own_open_s if system is OURS else size.open_s
        for share, (part, kind) in SHARES.items() if system is OURS or num == most else ():
            report = run(Phase("open", seconds, rate=part * best, arrivals=kind))
            p50, p99 = report.latency_ms.p50, report.latency_ms.p99
            arrivals = arrivals_of(kind, part * best, seconds, seed)
            ideal = percentile_ms(ideal_latencies(arrivals, service_ms / 1000), 99)
            assert p50
            assert p99
            assert ideal
            found.latency[system.name, num, share] = (p50, p99, ideal)
    if system is OURS:
        found.parts_ms |= _stages(port, [system.content(b) for b in served.bodies[most]])


def _phase(
    port: int, requests: Sequence[Request], seed: int, what: str, phase: Phase
) -> PhaseReport:
    """A runner's first phase has its arrivals from the seed itself."""
    runner = Runner(Target("127.0.0.1", port), requests, seed)
    report = loop.run(runner.run_phase(phase))
    if report.num_failed or report.degraded:
        raise RuntimeError(f"{what}: failed {report.failed}, degraded {report.degraded_by}")
    return report


def _wire(system: System, body: Body, num: int) -> Request:
    content = system.content(body)
    head = f"POST {SCORE_PATH} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
    return Request(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content, num)


def _stages(port: int, contents: Sequence[bytes]) -> dict[str, float]:
    """Median milliseconds of the service's own stages, and of what a client waits beyond them."""
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


def figures(rounds: Sequence[Round], size: Size) -> Figures:
    """Medians over the rounds; a ratio is that of two figures of one round."""
    found, systems = Figures(), list(dict.fromkeys(name for name, _ in rounds[0].rate))
    fewest, most = min(size.candidates), max(size.candidates)
    for num in size.candidates:
        floor = statistics.median(r.floor[num] for r in rounds)
        found.add(f"requests per second, N = {num}, no HTTP (floor)", floor, "1/s")
        for name in systems:
            rate = statistics.median(r.rate[name, num] for r in rounds)
            found.add(f"requests per second, N = {num}, {name}", rate, "1/s")
    for num in size.candidates:
        share = statistics.median(r.rate[OURS.name, num] / r.floor[num] for r in rounds)
        goal = {fewest: 0.8, most: 0.9}.get(num)
        found.add(f"{OURS.name} to its floor, N = {num}", share, "x", at_least=goal)
    ratios = [r.rate[OURS.name, num] / r.floor[num] for r in rounds for num in size.candidates]
    disturbed = sum(ratio > POSSIBLE for ratio in ratios)
    found.add("times that the floor was beaten, so disturbed", disturbed, "", at_most=0)
    for name in systems[1:]:
        for num in size.candidates:
            times = statistics.median(r.rate[OURS.name, num] / r.rate[name, num] for r in rounds)
            goal = GOALS.get(name) if num == most else None
            found.add(f"{OURS.name} to {name}, N = {num}", times, "x", at_least=goal)
    _add_latencies(found, rounds)
    for part in rounds[0].parts_ms:
        ms = statistics.median(r.parts_ms[part] for r in rounds)
        found.add(f"time of a request, N = {most}, {part}", ms, "ms")
    return found


def _add_latencies(found: Figures, rounds: Sequence[Round]) -> None:
    for name, num, share in rounds[0].latency:
        each = [r.latency[name, num, share] for r in rounds]
        p50, p99, _ = (statistics.median(column) for column in zip(*each, strict=True))
        where = f"N = {num}, {share} of the maximum, {name}"
        found.add(f"p50, {where}", p50, "ms")
        found.add(f"p99, {where}", p99, "ms")
        is_ours = name == OURS.name
        if share == "half":
            times = statistics.median(p99 / ideal for _, p99, ideal in each)
            goal = 1.3 if is_ours else None
            found.add(f"p99 to an ideal queue, {where}", times, "x", at_most=goal)
        else:
            times = statistics.median(p99 / p50 for p50, p99, _ in each)
            goal = 1.6 if is_ours else None
            found.add(f"p99 to p50, {where}", times, "x", at_most=goal)


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
