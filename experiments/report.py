"""Stored results as tables, pictures, and one page that needs nothing beside it."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.results import Entry, Interval, Result

mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ecdctr", "font.size": 9})

COLOURS = ("#0b6e99", "#d9730d", "#448361", "#9065b0", "#c14c8a", "#787774", "#cb912f")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; font-size: .85rem; margin: 1rem 0; display: block;
  overflow-x: auto }
td, th { border-bottom: 1px solid #ddd; padding: .25rem .6rem; text-align: right;
  white-space: nowrap }
td:first-child, th:first-child, td:nth-child(2), th:nth-child(2) { text-align: left }
svg { max-width: 100%; height: auto }
code { background: #f3f3f3; padding: .1rem .3rem }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #1b1b1b }
  td, th { border-color: #444 } code { background: #333 } svg { background: #fff } }
"""
_COLUMNS = ("GAUC", "95 %", "AUC", "log loss", "PCOC", "GAUC lift (95 %)", "log loss lift (95 %)")


def page(results: Sequence[Result]) -> str:
    """The report as one HTML document: pictures are inside."""
    body = "\n".join(_section(result) for result in results)
    contents = "".join(f'<li><a href="#{r.name}">{html.escape(r.title)}</a></li>' for r in results)
    return document("Experiments", f"<ol>{contents}</ol>\n{body}")


def document(title: str, body: str) -> str:
    """A page of its own that needs nothing beside it; `body` is HTML."""
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        f"<style>{_STYLE}</style><h1>{title}</h1>{body}</html>\n"
    )


def _section(result: Result) -> str:
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in result.notes)
    return (
        f'<h2 id="{result.name}">{html.escape(result.title)}</h2>'
        f"<p>{html.escape(result.question)}</p>{picture(result)}"
        f"{table(rows_of(result))}{notes}"
        f"<p>{html.escape(about(result))} <code>{html.escape(result.command)}</code></p>"
    )


def table(rows: Sequence[Sequence[str]]) -> str:
    """Text as an HTML table; the first row is its head."""
    head, *body = rows
    inside = "".join(_row(row, "td") for row in body)
    return f"<table><thead>{_row(head, 'th')}</thead><tbody>{inside}</tbody></table>"


def _row(cells: Sequence[str], tag: str) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def markdown(result: Result) -> str:
    """The result's table for a document."""
    head, *rows = rows_of(result)
    lines = [head, ["---"] * len(head), *rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return f"{table}\n\n{about(result)} `{result.command}`"


def about(result: Result) -> str:
    """What the figures were measured on."""
    first = result.entries[0]
    return (
        f"{result.split}: {first.rows:,} candidates, {first.positives:,} positives,"
        f" {first.users:,} users, {len(result.seeds)} seed(s); a lift is against"
        f" {result.baseline!r}; {result.seconds / 60:.0f} min of work. Made by"
    )


def rows_of(result: Result) -> list[list[str]]:
    """The table as text, its head first; facts that entries have get columns of their own."""
    facts = list(dict.fromkeys(name for e in result.entries for name in e.facts))
    head = ["series", result.x, *_COLUMNS, *facts]
    return [head, *([*_cells(e), *(_fact(e, name) for name in facts)] for e in result.entries)]


def _cells(e: Entry) -> list[str]:
    return [
        e.series,
        e.x,
        f"{e.gauc:.4f}",
        _interval(e.gauc_interval, ".4f"),
        f"{e.auc:.4f}",
        f"{e.log_loss:.6f}",
        f"{e.pcoc:.3f}",
        _lift(e.gauc_lift, e.gauc_lift_interval, "+.4f"),
        _lift(e.log_loss_lift, e.log_loss_lift_interval, "+.6f"),
    ]


def _fact(e: Entry, name: str) -> str:
    value = e.facts.get(name, "")
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _interval(interval: Interval, form: str) -> str:
    return f"[{interval[0]:{form}}, {interval[1]:{form}}]"


def _lift(value: float | None, interval: Interval | None, form: str) -> str:
    return f"{value:{form}} {_interval(interval, form)}" if value is not None and interval else ""


def picture(result: Result) -> str:
    """GAUC and log loss with their intervals, by point and series, as SVG."""
    points = list(dict.fromkeys(e.x for e in result.entries))
    figure = Figure(figsize=(9.5, max(3.2, 0.32 * _lines(result, points) + 1.4)))
    axes = figure.subplots(1, 2)
    draw = _curves if len(points) > 1 else _bars
    for axis, name, label in zip(axes, ("gauc", "log_loss"), ("GAUC", "log loss"), strict=True):
        draw(axis, result, points, name)
        axis.set_title(label)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    return svg(figure)


def svg(figure: Figure) -> str:
    """A picture as text that can stand in a page; the same picture, the same text."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]


def _lines(result: Result, points: Sequence[str]) -> int:
    return len(result.entries) if len(points) == 1 else 0


def _curves(axis: Axes, result: Result, points: Sequence[str], name: str) -> None:
    """Points from left to right, a line per series."""
    for i, series in enumerate(dict.fromkeys(e.series for e in result.entries)):
        own = [e for e in result.entries if e.series == series]
        place = [points.index(e.x) + 0.06 * i for e in own]
        values, errors = _values(own, name)
        axis.errorbar(
            place, values, errors, label=series, color=COLOURS[i % 7], marker="o", capsize=3
        )
    axis.set_xticks(range(len(points)), points)
    axis.set_xlabel(result.x)
    axis.legend(fontsize=8)


def _bars(axis: Axes, result: Result, points: Sequence[str], name: str) -> None:
    """One line per entry: a single point has no left and right."""
    entries = result.entries[::-1]
    values, errors = _values(entries, name)
    axis.errorbar(values, range(len(entries)), xerr=errors, color=COLOURS[0], fmt="o", capsize=3)
    axis.set_yticks(range(len(entries)), [e.series for e in entries])


def _values(entries: Sequence[Entry], name: str) -> tuple[list[float], list[list[float]]]:
    values = [getattr(e, name) for e in entries]
    intervals = [getattr(e, f"{name}_interval") for e in entries]
    pairs = list(zip(values, intervals, strict=True))
    # A mean over seeds may lie a hair outside of the interval of the resamples.
    below = [max(value - low, 0.0) for value, (low, _) in pairs]
    above = [max(high - value, 0.0) for value, (_, high) in pairs]
    return values, [below, above]
