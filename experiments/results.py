"""What an experiment found: metrics over seeds, with intervals over users."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.metrics import Metrics, PerUser, interval, measure, resample

Floats = npt.NDArray[np.float64]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Rows:
    """What a cell is measured on: label float32 [n], user int64 [n]."""

    label: npt.NDArray[np.float32]
    user: npt.NDArray[np.int64]

    def take(self, kept: npt.NDArray[np.bool_]) -> Rows:
        return Rows(self.label[kept], self.user[kept])


@dataclass(frozen=True)
class Entry:
    """One cell of an experiment: a series at a point. Metrics are means over the seeds; intervals
    are 95 %, by bootstrap over users; a lift is the difference to the baseline, paired."""

    series: str
    x: str
    gauc: float
    auc: float
    log_loss: float
    pcoc: float
    gauc_interval: Interval
    log_loss_interval: Interval
    gauc_lift: float | None = None
    gauc_lift_interval: Interval | None = None
    log_loss_lift: float | None = None
    log_loss_lift_interval: Interval | None = None
    rows: int = 0
    positives: int = 0
    users: int = 0
    one_class_users: int = 0
    seeds: list[dict[str, float]] = field(default_factory=list)
    """The metrics of each seed."""
    facts: dict[str, Any] = field(default_factory=dict)
    """What else is to be said, such as CPU seconds, or the best that is possible."""


def entry(
    series: str,
    x: str,
    logits: Sequence[Floats],
    rows: Rows,
    baseline: Sequence[Floats] | None = None,
    **facts: Any,
) -> Entry:
    """Measures logits [n] of each seed; `baseline`: those of what it is compared with."""
    each = [measure(logit, rows.label, rows.user) for logit in logits]
    own = PerUser.of(logits, rows.label, rows.user)
    times = resample(len(own.impressions))
    lifts: dict[str, Any] = {}
    if baseline is not None:
        lifts = _lifts(own, PerUser.of(baseline, rows.label, rows.user), times)
    return Entry(
        series,
        x,
        gauc=_mean(each, "gauc"),
        auc=_mean(each, "auc"),
        log_loss=_mean(each, "log_loss"),
        pcoc=_mean(each, "pcoc"),
        gauc_interval=interval(own.gauc(times)),
        log_loss_interval=interval(own.log_loss(times)),
        **lifts,
        rows=each[0].rows,
        positives=each[0].positives,
        users=each[0].users,
        one_class_users=each[0].one_class_users,
        seeds=[_figures(one) for one in each],
        facts=facts,
    )


def _lifts(own: PerUser, other: PerUser, times: Floats) -> dict[str, Any]:
    once = np.ones((1, len(own.impressions)))
    found: dict[str, Any] = {}
    for name in ("gauc", "log_loss"):
        mine, others = getattr(own, name), getattr(other, name)
        found[f"{name}_lift"] = float((mine(once) - others(once))[0])
        found[f"{name}_lift_interval"] = interval(mine(times) - others(times))
    return found


def _mean(each: Sequence[Metrics], name: str) -> float:
    return float(np.mean([getattr(one, name) for one in each]))


def _figures(one: Metrics) -> dict[str, float]:
    return {name: getattr(one, name) for name in ("gauc", "auc", "log_loss", "pcoc")}


@dataclass(frozen=True)
class Result:
    """A whole experiment, as it is stored."""

    name: str
    title: str
    question: str
    x: str
    """What the points differ in."""
    baseline: str
    """The series that lifts are measured against."""
    command: str
    seeds: list[int]
    entries: list[Entry]
    split: str
    seconds: float
    notes: list[str] = field(default_factory=list)

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self), indent=1) + "\n")
        draft.replace(path)

    @classmethod
    def read(cls, path: Path) -> Result:
        document = json.loads(path.read_text())
        entries = [Entry(**one) for one in document.pop("entries")]
        return cls(**document, entries=entries)
