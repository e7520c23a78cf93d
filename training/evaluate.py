"""How good an A-CTR is on days that no tier has seen: every candidate, nothing sampled away."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from training.actr import Variant, load_actr
from training.config import NetworkConfig
from training.events import Ints, days_between
from training.examples import builder_for
from training.fit import predict
from training.metrics import Metrics, gauc_interval, measure
from training.parallel import in_parallel, progress
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scored:
    """Logits float64 [n] by model name, on the same rows: label float32 [n], user_row int64 [n]."""

    logits: dict[str, Floats]
    label: npt.NDArray[np.float32]
    user_row: Ints
    request_id: Ints

    def metrics(self, name: str) -> Metrics:
        return measure(self.logits[name], self.label, self.user_row)

    def gauc_interval(self, name: str, against: str | None = None) -> tuple[float, float]:
        """95 % interval of GAUC, or of its difference to that of the model `against`."""
        other = None if against is None else self.logits[against]
        return gauc_interval(self.logits[name], other, self.label, self.user_row)


def score_days(
    workspace: Workspace,
    asof: date,
    network: NetworkConfig,
    variants: Mapping[str, Variant],
    first: date,
    last: date,
    per_day: int | None,
) -> Scored:
    """Scores all candidates of the first `per_day` requests (all: None) of first .. last with the
    A-CTR variants of the day `asof`.

    A core holds one day at a time; every feature is as it stood before that day.
    """
    days = days_between(first, last)
    parts = np.array_split(np.arange(len(days)), min(len(days), len(os.sched_getaffinity(0))))
    jobs = [
        (workspace.root, asof, network, dict(variants), [days[i] for i in part], per_day)
        for part in parts
    ]
    return _joined(in_parallel(_score, jobs))


def _score(
    root: Path,
    asof: date,
    network: NetworkConfig,
    variants: dict[str, Variant],
    days: list[date],
    per_day: int | None,
) -> Scored:
    workspace = Workspace(root)
    log = workspace.log()
    models = {name: load_actr(workspace, asof, network, v) for name, v in variants.items()}
    builder = builder_for(workspace, log, days[0], days[-1])
    parts = []
    for day in progress(days, "evaluate", unit="day"):
        examples = builder.build(log.full_lists([day], per_day))
        logits = {n: predict(m.network, examples) + m.offset for n, m in models.items()}
        parts.append(Scored(logits, examples.label, examples.user_row, examples.request_id))
    return _joined(parts)


def _joined(parts: Sequence[Scored]) -> Scored:
    return Scored(
        {name: np.concatenate([p.logits[name] for p in parts]) for name in parts[0].logits},
        np.concatenate([p.label for p in parts]),
        np.concatenate([p.user_row for p in parts]),
        np.concatenate([p.request_id for p in parts]),
    )


def report(scored: Scored, baseline: str | None) -> list[dict[str, Any]]:
    """One entry per model: its metrics, the interval of its GAUC, and of its lift over the
    baseline."""
    entries = []
    for name in scored.logits:
        entry = {"model": name, **asdict(scored.metrics(name))}
        entry["gauc_interval"] = scored.gauc_interval(name)
        if baseline is not None and name != baseline:
            entry["gauc_lift_interval"] = scored.gauc_interval(name, baseline)
        entries.append(entry)
    return entries


def table(entries: list[dict[str, Any]]) -> str:
    """The report as a table for people."""
    lines = [
        f"{'model':<26}{'GAUC':>8} {'95 % interval':>18}{'AUC':>8}{'log loss':>10}{'PCOC':>7}"
        f"  {'GAUC lift (95 %)':<22}"
    ]
    for entry in entries:
        low, high = entry["gauc_interval"]
        lift = entry.get("gauc_lift_interval")
        lines.append(
            f"{entry['model']:<26}{entry['gauc']:>8.4f} {f'[{low:.4f}, {high:.4f}]':>18}"
            f"{entry['auc']:>8.4f}{entry['log_loss']:>10.6f}{entry['pcoc']:>7.3f}"
            f"  {f'[{lift[0]:+.4f}, {lift[1]:+.4f}]' if lift else '':<22}"
        )
    first = entries[0]
    lines.append(
        f"{first['rows']:,} candidates, {first['positives']:,} positives, {first['users']:,} users;"
        f" {first['one_class_users']:,} users with one class only are left out of GAUC"
    )
    return "\n".join(lines)
