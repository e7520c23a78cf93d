"""An hour at half load: a model swapped each minute, the store frozen every ten.

One service with its usual settings and one Redis, real requests at Poisson arrivals. Nothing may
fail, and the memory of the service may not grow: leaves figures and a picture of all of it.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import redis

from benchmarks.figures import Figures
from benchmarks.processes import Sampler
from benchmarks.serving import arguments_of, model_of, on_core
from benchmarks.serving_model import Served, make
from benchmarks.serving_peers import OURS, await_answer, free_port, started
from bundle.manifest import seal
from bundle.registry import Registry
from loadtest import loop
from loadtest.address import SCORE_PATH
from loadtest.bodies import Request, encode
from loadtest.client import Target
from loadtest.disturbance import Freeze, Swap
from loadtest.picture import draw
from loadtest.progress import watch
from loadtest.report import Limits, PhaseReport, Report, table
from loadtest.run import Phase, Runner, stopping_on_signals
from training.demo import running_redis
from training.recipes import Recipe, complete_journey
from training.workspace import Workspace

CANDIDATES = 200
BODIES = 40
CYCLE_S = 600.0
"""A tenth of it nothing is done to the service, then models are swapped, then the store frozen."""
FROZEN_S = 30.0
"""Length of the phase in which it is."""
SWAP_EVERY_S = 60.0
CAPACITY_S = 30.0
SHARE = 0.5
"""Of what is answered in a slow second."""


def phases(
    rate: float, seconds: float, promote: Sequence[Callable[[], object]], store_pid: int
) -> list[Phase]:
    """`seconds` of load in cycles of `CYCLE_S`, or in one that is shorter."""
    num = max(1, round(seconds / CYCLE_S))
    steady_s = seconds / num / 10
    frozen_s = min(FROZEN_S, seconds / num / 3)
    swaps_s = seconds / num - steady_s - frozen_s
    swap = Swap(promote, min(SWAP_EVERY_S, swaps_s / 4))
    freeze = Freeze(store_pid, frozen_s / 6, frozen_s / 6)
    cycle = [
        Phase("steady", steady_s, rate),
        Phase("swaps", swaps_s, rate, disturbance=swap),
        Phase("frozen", frozen_s, rate, disturbance=freeze),
    ]
    return cycle * num


def run(source: Workspace, asof: date, recipe: Recipe, out: Path, seconds: float) -> Figures:
    """Leaves out/soak.json with the figures, out/soak-report.json and out/soak.png. Ctrl-C and
    SIGTERM end it early, with the last two of what ran."""
    cores = sorted(os.sched_getaffinity(0))
    with on_core(cores[-1]), running_redis() as store:
        served = make(source, asof, recipe, out / "soak", store, {CANDIDATES: BODIES})
        bodies, registry = served.bodies[CANDIDATES], served.workspace.registry
        current = registry.current()
        assert current is not None
        ids = [_second(registry, current.current), current.current]
        promote = [partial(registry.promote, bundle_id) for bundle_id in ids]
        server = redis.Redis.from_url(store)
        store_pid = int(server.info("server")["process_id"])
        server.close()
        with serving(served, CANDIDATES, cores[0], out / "soak.log") as (pid, port):
            requests = encode(bodies, "127.0.0.1", SCORE_PATH)
            rate = SHARE * sustained(port, requests)
            runner = Runner(Target("127.0.0.1", port), requests, watch=watch)
            with Sampler(pid) as sampler:
                loop.run(_until_told(runner, phases(rate, seconds, promote, store_pid)))
    limits = Limits(max_failures=0)
    url, what = f"http://127.0.0.1:{port}", f"{BODIES} pages of {source.root.name}"
    by, reports = "python -m benchmarks.soak", runner.reports
    report = Report(by, url, 0, what, [CANDIDATES], reports, limits, started=runner.started)
    print(table(report.phases))
    report.write(out / "soak-report.json")
    draw(report, out / "soak.png", sampler.memory)
    if runner.stop.is_set():
        sys.exit(f"benchmarks.soak: ended early, so without figures; what ran is in {out}")
    found = figures(report.phases, sampler, rate)
    found.write(out / "soak.json")
    return found


async def _until_told(runner: Runner, load: Sequence[Phase]) -> None:
    with stopping_on_signals(runner.stop):
        await runner.run(load)


def figures(reports: Sequence[PhaseReport], sampler: Sampler, rate: float) -> Figures:
    """What it comes to."""
    found = Figures()
    found.add("length", sum(report.seconds for report in reports), "s")
    found.add("rate, half of what is answered in a slow second", rate, "1/s")
    found.add("requests", sum(report.due for report in reports), "")
    failed = sum(report.num_failed + report.unfinished for report in reports)
    found.add("requests that failed", failed, "", at_most=0)
    events = [event for report in reports for event in report.events]
    found.add("swaps and freezes", len(events), "")
    found.add("swaps and freezes that failed", sum(not e.ok for e in events), "", at_most=0)
    found.add("answers without a window, meant for freezes", sum(r.degraded for r in reports), "")
    p99 = {
        name: [r.latency_ms.p99 for r in reports if r.plan.name == name and r.latency_ms.p99]
        for name in ("steady", "swaps", "frozen")
    }
    for name, values in p99.items():
        found.add(f"p99, the median phase of {name}", median(values), "ms")
    found.add(
        "p99 of swaps to steady", median(p99["swaps"]) / median(p99["steady"]), "x", at_most=1.2
    )
    settled_s = sum(report.seconds for report in reports[:2])
    settled, most = sampler.most(0, settled_s), sampler.most(settled_s, float("inf"))
    found.add("memory, the most until the end of the first swaps", settled / 1e6, "MB")
    found.add("growth of memory after it", most / settled - 1, "", at_most=0.1)
    found.add("without a processor, the whole machine", sum(sampler.stolen_s), "s")
    found.add("the same, the worst second", max(sampler.stolen_s, default=0.0) * 1000, "ms")
    found.add("slowness of the machine", slowness(sampler.loop_s), "x")
    return found


def _second(registry: Registry, bundle_id: str) -> str:
    """The same bundle under another id, as if somebody had forced it."""
    with registry.draft() as draft:
        shutil.copytree(registry.path(bundle_id), draft, dirs_exist_ok=True)
        seal(draft, replace(registry.read(bundle_id), forced=True))
        return registry.publish(draft)


def sustained(port: int, requests: Sequence[Request]) -> float:
    """Requests a second of eight clients that wait for their answers, in the slowest second: what
    can be relied on where other machines share the processors."""
    runner = Runner(Target("127.0.0.1", port), requests)
    loop.run(runner.run_phase(Phase("closed", CAPACITY_S, clients=8)))
    return min(second.ok for second in runner.reports[0].timeline[:-1])


def slowness(loop_s: Sequence[float]) -> float:
    """How many times as long as usual a fixed loop took in the slowest twentieth of all seconds."""
    return float(np.quantile(loop_s, 0.95) / np.median(loop_s)) if loop_s else 1.0


def maximum(port: int, requests: Sequence[Request], seconds: float = 2.0) -> float:
    """Requests a second of one, two or eight clients that wait for their answers; the most."""
    runner = Runner(Target("127.0.0.1", port), requests)
    loop.run(runner.run([Phase("closed", seconds, clients=n) for n in (1, 2, 8)]))
    return max(report.ok_per_s for report in runner.reports)


@contextmanager
def serving(served: Served, candidates: int, core: int, log: Path) -> Iterator[tuple[int, int]]:
    """Process and port of a service with its usual settings, on one core, once it answers."""
    port = free_port()
    command = [sys.executable, "-m", "ecdctr", "--workspace", str(served.workspace.root), "serve"]
    command += ["--port", str(port), "--workers", "1", "--store", served.store]
    pinned = partial(os.sched_setaffinity, 0, {core})
    with started(command, log, preexec_fn=pinned) as process:
        content = OURS.content(served.bodies[candidates][0])
        await_answer(OURS.name, content, port, process, log)
        yield process.pid, port


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of("An hour at half load.")
    parser.add_argument("--seconds", type=float, default=3600.0, help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    workspace, asof = model_of(options, "benchmarks.soak")
    print(run(workspace, asof, complete_journey(), options.out.resolve(), options.seconds))


if __name__ == "__main__":
    main()
