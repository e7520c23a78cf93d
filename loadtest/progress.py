"""How far a run is, on stderr: a bar at a terminal, a line a second elsewhere."""

from __future__ import annotations

import asyncio
import sys

import numpy as np

from loadtest.client import clock_s
from loadtest.report import Plan, percentile_ms
from loadtest.traffic import Traffic

EVERY_S = 1.0


async def watch(plan: Plan, traffic: Traffic) -> None:
    """Shows a phase once a second until it is cancelled."""
    show = _bar if sys.stderr.isatty() else _lines
    await show(plan, traffic)


async def _bar(plan: Plan, traffic: Traffic) -> None:
    from tqdm import tqdm

    form = "{desc} |{bar:20}| {n:.0f}/{total:.0f} s {postfix}"
    shown = 0
    with tqdm(total=plan.seconds, desc=plan.name, bar_format=form) as bar:
        while True:
            await asyncio.sleep(EVERY_S)
            bar.set_postfix_str(state(traffic, shown), refresh=False)
            bar.update(min(clock_s() - traffic.started_s, plan.seconds) - bar.n)
            shown = len(traffic.samples)


async def _lines(plan: Plan, traffic: Traffic) -> None:
    shown = 0
    while True:
        await asyncio.sleep(EVERY_S)
        at_s = clock_s() - traffic.started_s
        print(f"{plan.name} {at_s:.0f} s: {state(traffic, shown)}", file=sys.stderr, flush=True)
        shown = len(traffic.samples)


def state(traffic: Traffic, since: int) -> str:
    """Counts so far, and p99 of the answers after the first `since` of them."""
    samples = traffic.samples
    recent = np.array(samples.done_s[since:]) - np.array(samples.intended_s[since:])
    p99 = percentile_ms(recent, 99)
    failed = len(samples) - samples.num_ok
    shown = "-" if p99 is None else f"{p99:.1f} ms"
    return f"{samples.num_ok} ok, {failed} failed, {traffic.under_way} under way, p99 {shown}"
