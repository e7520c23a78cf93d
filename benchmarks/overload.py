"""What a service does with more requests than it can answer: how many it still answers in time, and
how soon all is as before.

One service with its usual settings on one core, real requests at Poisson arrivals. The capacity is
what it answers to clients that wait for their answers.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from benchmarks.figures import Figures
from benchmarks.serving import arguments_of, model_of, on_core
from benchmarks.serving_model import make
from benchmarks.soak import maximum, serving
from loadtest import loop
from loadtest.address import SCORE_PATH
from loadtest.bodies import encode
from loadtest.client import Target
from loadtest.progress import watch
from loadtest.report import PhaseReport, table
from loadtest.run import Phase, Runner
from training.demo import running_redis
from training.recipes import Recipe, complete_journey
from training.workspace import Workspace

CANDIDATES, BODIES = 500, 40
IN_TIME_S = 0.1
TIMES = 2.0
"""The capacity that is asked for."""
CALM, AGAIN_S = 0.5, 2
"""Of the capacity, before and after; and the seconds after which all is as before."""


def run(workspace: Workspace, asof: date, recipe: Recipe, out: Path, seconds: float) -> Figures:
    """Leaves out/overload.json."""
    cores = sorted(os.sched_getaffinity(0))
    with on_core(cores[-1]), running_redis() as store:
        served = make(workspace, asof, recipe, out / "overload", store, {CANDIDATES: BODIES})
        with serving(served, CANDIDATES, cores[0], out / "overload.log") as (_, port):
            requests = encode(served.bodies[CANDIDATES], "127.0.0.1", SCORE_PATH)
            most = maximum(port, requests)
            runner = Runner(Target("127.0.0.1", port, timeout_s=IN_TIME_S), requests, watch=watch)
            rates = {"before": CALM, "at the peak": 1.0, "flood": TIMES, "after": CALM}
            loop.run(runner.run([Phase(n, seconds, r * most) for n, r in rates.items()]))
    print(table(runner.reports))
    found = figures(runner.reports, most)
    found.write(out / "overload.json")
    return found


def figures(reports: Sequence[PhaseReport], most: float) -> Figures:
    """What it comes to."""
    _, peak, flood, after = reports
    found = Figures()
    found.add("capacity, closed loop", most, "1/s")
    found.add("in time at the capacity", peak.ok_per_s, "1/s")
    found.add("in time at twice the capacity", flood.ok_per_s, "1/s")
    found.add("the same, of the capacity", flood.ok_per_s / most, "")
    goodput = flood.ok_per_s / peak.ok_per_s if peak.ok_per_s else 0.0
    found.add("the same, of what is in time at the capacity", goodput, "", at_least=0.9)
    # Of a flood that is one: a capacity that was measured too low makes a calm day of it.
    turned_away = flood.failed.get("http_503", 0) / flood.due
    found.add("turned away at twice the capacity", turned_away, "", at_least=0.4)
    late = sum(second.due - second.ok for second in after.timeline if second.second >= AGAIN_S)
    found.add("not in time, from 2 s after the flood", late, "", at_most=0)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of("A flood of requests.")
    parser.add_argument("--seconds", type=float, default=15.0, help="a phase (%(default)s)")
    options = parser.parse_args(arguments)
    workspace, asof = model_of(options, "benchmarks.overload")
    print(run(workspace, asof, complete_journey(), options.out.resolve(), options.seconds))


if __name__ == "__main__":
    main()
