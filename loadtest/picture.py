"""A run at a glance: rate, latency, and which model answered, second by second."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.report import PhaseReport, Report, Second

MARKED = 300
"""Most seconds that get a dot each."""
LETTERS = 120
"""Of a phase's name that fit beside each other."""
COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f")


def draw(report: Report, path: Path, memory: Sequence[tuple[float, int]] = ()) -> None:
    """Writes the picture, PNG or SVG by the end of its name, to a temporary name and renames.
    memory: seconds since the start and bytes of the service, where they were watched."""
    figure = Figure(figsize=(11, 10 if memory else 8), layout="constrained")
    heights = [3, 3, 2, 2][: 4 if memory else 3]
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    rate, latency, models = axes[:3]
    starts = _starts(report.phases)
    _rates(rate, report.phases, starts)
    _latencies(latency, report, starts)
    _models(models, report.phases, starts)
    if memory:
        _memory(axes[3], memory)
    for axis in axes:
        _shade(axis, report.phases, starts)
    _names(rate, report.phases, starts)
    axes[-1].set_xlabel(f"seconds of load; {report.target}, {report.started}")
    draft = path.with_name(f".{os.getpid()}.{path.name}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(draft, dpi=110)
    draft.replace(path)


def _starts(phases: Sequence[PhaseReport]) -> list[float]:
    return list(accumulate((phase.seconds for phase in phases), initial=0.0))[:-1]


def _points(
    phases: Sequence[PhaseReport], starts: Sequence[float]
) -> tuple[list[float], list[Second]]:
    """The middles of all seconds, and the seconds."""
    pairs = [
        (start + second.second + 0.5, second)
        for phase, start in zip(phases, starts, strict=True)
        for second in phase.timeline
    ]
    return [x for x, _ in pairs], [second for _, second in pairs]


def _rates(axis: Axes, phases: Sequence[PhaseReport], starts: Sequence[float]) -> None:
    x, seconds = _points(phases, starts)
    axis.step(x, [s.due for s in seconds], where="mid", color="#222222", lw=1, label="due")
    kinds = sorted({kind for second in seconds for kind in second.failed})
    rows = [[s.ok - s.degraded for s in seconds], [s.degraded for s in seconds]]
    rows += [[s.failed.get(kind, 0) for s in seconds] for kind in kinds]
    labels = ["ok", "ok, degraded", *kinds]
    colours = ["#448361", "#cb912f", *("#c1352c", "#9065b0", "#c14c8a", "#787774", "#0b6e99") * 2]
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        below = [sum(column) for column in zip(*rows[:i], strict=True)] or [0] * len(x)
        axis.bar(x, row, 1.0, below, color=colours[i % len(colours)], alpha=0.7, label=label)
    most = max((s.due for s in seconds), default=1)
    failing = [middle for middle, second in zip(x, seconds, strict=True) if second.failed]
    if failing:  # of 200 requests, one is less than a pixel
        heights = [1.04 * most] * len(failing)
        axis.plot(failing, heights, "v", color="#c1352c", ms=5, label="a second with failures")
    axis.set_ylim(0, 1.08 * most)
    axis.set_ylabel("requests by second due")
    _legend(axis)


def _latencies(axis: Axes, report: Report, starts: Sequence[float]) -> None:
    x, seconds = _points(report.phases, starts)
    style = ".-" if len(seconds) <= MARKED else "-"
    for name, colour in (("max_ms", "#bbbbbb"), ("p99_ms", COLOURS[1]), ("p50_ms", COLOURS[0])):
        axis.plot(x, [getattr(s, name) for s in seconds], style, color=colour, lw=1, label=name)
    if report.limits.slo_p99_ms:
        axis.axhline(report.limits.slo_p99_ms, color="#c1352c", ls="--", lw=1, label="limit of p99")
    axis.set_yscale("log")
    axis.set_ylabel("ms from intended time")
    axis.grid(alpha=0.3)
    _legend(axis)


def _models(axis: Axes, phases: Sequence[PhaseReport], starts: Sequence[float]) -> None:
    x, seconds = _points(phases, starts)
    below = [0.0] * len(x)
    for i, model in enumerate(sorted({m for second in seconds for m in second.models})):
        shares = [s.models.get(model, 0) / max(1, s.ok) for s in seconds]
        axis.bar(x, shares, 1.0, below, color=COLOURS[i % len(COLOURS)], alpha=0.7, label=model)
        below = [a + b for a, b in zip(below, shares, strict=True)]
    axis.set_ylabel("share of ok, by model")
    if seconds:
        _legend(axis)


def _memory(axis: Axes, memory: Sequence[tuple[float, int]]) -> None:
    axis.plot([at_s for at_s, _ in memory], [size / 1e6 for _, size in memory], color="#222222")
    axis.set_ylim(bottom=0)
    axis.set_ylabel("MB resident")
    axis.grid(alpha=0.3)


def _legend(axis: Axes) -> None:
    """Beside the axes, where it hides nothing."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _shade(axis: Axes, phases: Sequence[PhaseReport], starts: Sequence[float]) -> None:
    """A phase as dark as the others of its name."""
    names = list(dict.fromkeys(phase.plan.name for phase in phases))
    for phase, start in zip(phases, starts, strict=True):
        darkness = 0.06 * (names.index(phase.plan.name) % 3)
        axis.axvspan(start, start + phase.seconds, color="#000000", alpha=darkness, lw=0)
        for event in phase.events:
            axis.axvline(start + event.at_s, color="#787774", lw=0.7, ls=":")


def _names(axis: Axes, phases: Sequence[PhaseReport], starts: Sequence[float]) -> None:
    """Upright where they would run into each other."""
    letter_s = sum(phase.seconds for phase in phases) / LETTERS
    upright = any(phase.seconds < letter_s * len(phase.plan.name) for phase in phases)
    for phase, start in zip(phases, starts, strict=True):
        where, angle = (start + phase.seconds / 2, 1.01), 90 if upright else 0
        name, transform = phase.plan.name, axis.get_xaxis_transform()
        axis.text(*where, name, transform=transform, ha="center", rotation=angle, fontsize=9)
