"""How good an A-CTR is on days that no tier has seen: every candidate, nothing sampled away."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import date
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.actr import Actr
from training.events import EventLog, Ints, days_between
from training.examples import builder_for
from training.fit import predict
from training.metrics import Metrics, gauc_interval, measure
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
    log: EventLog,
    models: Mapping[str, Actr],
    first: date,
    last: date,
    per_day: int | None,
) -> Scored:
    """Scores all candidates of the first `per_day` requests (all: None) of first .. last.

    One day is held at a time; every feature is as it stood before that day.
    """
    builder = builder_for(workspace, log, first, last)
    logits: dict[str, list[Floats]] = {name: [] for name in models}
    rows: list[tuple[npt.NDArray[np.float32], Ints, Ints]] = []
    for day in tqdm(days_between(first, last), "evaluate", unit="day"):
        examples = builder.build(log.full_lists([day], per_day))
        for name, model in models.items():
            logits[name].append(predict(model.network, examples) + model.offset)
        rows.append((examples.label, examples.user_row, examples.request_id))
    label, user_row, request_id = (np.concatenate(column) for column in zip(*rows, strict=True))
    joined = {name: np.concatenate(parts) for name, parts in logits.items()}
    return Scored(joined, label, user_row, request_id)


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
