"""A replay as one page: every day's quality, what was trained for it, what was refused."""

from __future__ import annotations

import html
from collections.abc import Sequence
from datetime import date

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.report import COLOURS, document, svg, table
from training.simulate import WEEK, Line, weekly_sums

_HEAD = ["day", "trained", "GAUC", "log loss", "PCOC", "positives", "live", "refused, and notes"]
Floats = npt.NDArray[np.float64]
_GOAL = (0.85, 1.15)
"""Where the PCOC of seven days should be."""


def replay_page(lines: Sequence[Line], summary: str, command: str) -> str:
    """The report as one HTML document. lines: as `training.simulate` writes them, oldest first;
    summary: its table for people."""
    title = f"Replay of {lines[0]['date']} to {lines[-1]['date']}" if lines else "Replay of no day"
    body = (
        "<p>On every day the update of that day ran, then the day's requests were scored by what"
        " was live: by models that had learned from earlier days alone."
        f" <code>{html.escape(command)}</code></p><pre>{html.escape(summary)}</pre>"
        f"{_picture(lines)}{table([_HEAD, *map(_cells, lines)])}"
    )
    return document(title, body)


def _cells(line: Line) -> list[str]:
    said = [*line["refused"], *line["notes"]]
    figures = ["", "", ""]
    if "gauc" in line:
        figures = [f"{line['gauc']:.4f}", f"{line['log_loss']:.6f}", f"{line['pcoc']:.3f}"]
    positives = str(line.get("positives", ""))
    live = line["live"] or "nothing"
    return [line["date"], ", ".join(line["trained"]), *figures, positives, live, "; ".join(said)]


def _picture(lines: Sequence[Line]) -> str:
    """GAUC, log loss and PCOC by day, with the days on which the slower tiers were trained."""
    scored = [line for line in lines if "gauc" in line]
    if not scored:
        return ""
    figure = Figure(figsize=(9.5, 7.5))
    axes = figure.subplots(3, 1, sharex=True)
    for axis, name, label in zip(
        axes, ("gauc", "log_loss", "pcoc"), ("GAUC", "log loss", "PCOC"), strict=True
    ):
        _curve(axis, scored, name)
        axis.set_title(label)
        axis.grid(alpha=0.3)
        _mark(axis, lines)
    axes[2].axhspan(*_GOAL, color=COLOURS[2], alpha=0.12)
    axes[2].xaxis_date()
    axes[0].legend(fontsize=8, ncols=4)
    figure.tight_layout()
    return svg(figure)


def _curve(axis: Axes, scored: Sequence[Line], name: str) -> None:
    day = [_place(line) for line in scored]
    value = np.array([line[name] for line in scored])
    axis.plot(day, value, ".", color=COLOURS[0], alpha=0.5, label="day")
    if len(scored) >= WEEK:
        axis.plot(day[WEEK - 1 :], _weekly(scored, name), color=COLOURS[0], label="seven days")


def _place(line: Line) -> float:
    """Days since 1970, as matplotlib counts dates."""
    return float((date.fromisoformat(line["date"]) - date(1970, 1, 1)).days)


def _weekly(scored: Sequence[Line], name: str) -> Floats:
    """Over seven scored days on end: PCOC of their sums, the mean of the others."""
    if name == "pcoc":
        return weekly_sums(scored, "expected") / weekly_sums(scored, "positives")
    return weekly_sums(scored, name) / WEEK


def _mark(axis: Axes, lines: Sequence[Line]) -> None:
    for tier, colour, style in (("tpm", COLOURS[1], "-"), ("cpm", COLOURS[5], ":")):
        for i, line in enumerate(line for line in lines if tier in line["trained"]):
            label = f"{tier} trained" if not i else None
            axis.axvline(_place(line), color=colour, ls=style, lw=0.8, label=label)
    for line in lines:
        if line["refused"]:
            axis.axvline(_place(line), color="red", lw=2)
