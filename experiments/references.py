"""Reference lines: how good simple scores are on the rows that networks are measured on.

Popularity and repeats are logistic in one or two facts; trees are LightGBM on every number that the
log offers point in time, without and with what TPM's windows say. All learn from the rows that
A-CTR learns from. Negatives were kept at a rate r, so here each counts 1/r times: that is the
likelihood of all candidates, which log loss measures. The networks' loss shifts the logit instead,
which loses less where a model can be right; two facts can't be.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

import lightgbm
import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.linear_model import LogisticRegression

from experiments.windows import item_rows
from training.events import EventLog, days_between
from training.evaluate import Scored
from training.examples import Builder, Examples, builder_for
from training.fit import calibration
from training.parallel import progress
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]
Score = Callable[[Examples], Floats]
"""Logits float64 [n] of all candidates' clicks."""
_Facts = Callable[[Examples], Floats]
"""What a reference sees of each row: float64 [n, F]."""
_Logits = Callable[[Floats], Floats]

POPULARITY_DAYS = 30
_PSEUDO_POSITIVES = 0.4
"""Of an average item, added to each one's own: 300 impressions on Complete Journey."""
_REPEATS = 2
"""Column of the hard match: log of 1 + how often the user took the item."""
_VALIDATION_DAYS = 7
"""The last days of training: they say how many trees there are, and set the offset."""
_MAX_TREES = 600
_PATIENCE = 50
_TREES = {
    "objective": "binary",
    "learning_rate": 0.05,
    "num_leaves": 31,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}


def score_references(
    workspace: Workspace,
    asof: date,
    first: date,
    last: date,
    per_day: int | None,
    seed: int,
    days: int = 30,
    with_tpm: bool = True,
) -> Scored:
    """Fits the references on the `days` days of ads before `asof` and scores first .. last: the
    rows of `training.evaluate.score_days`, in the same order. with_tpm: False where the workspace
    has no windows; the reference that reads them is left out then."""
    log, start, end = workspace.log(), asof - timedelta(days=days), asof - timedelta(days=1)
    learned = builder_for(workspace, log, start, end, with_tpm).days("ad", start, end)
    references = fit_references(log, learned, seed)
    builder = builder_for(workspace, log, first, last, with_tpm)
    steps = progress(days_between(first, last), "references", unit="day")
    return _joined([_score(log, builder, references, day, per_day) for day in steps])


def fit_references(log: EventLog, rows: Examples, seed: int) -> dict[str, Score]:
    """The references by name, fitted on ads rows of more than seven days. Same seed, same scores.

    Raises:
        ValueError: too few days.
    """
    popularity = _Popularity(log)
    facts: dict[str, tuple[_Facts, Callable[[Floats, Examples, int], _Logits]]] = {
        "popularity": (popularity, _linear),
        "repeats": (_repeats, _linear),
        "popularity x repeats": (lambda e: np.hstack([popularity(e), _repeats(e)]), _linear),
        "trees on counts": (_counts, _trees),
    }
    if rows.window_dim:
        facts["trees on counts and windows"] = (
            lambda e: np.hstack([_counts(e), _windows(e)]),
            _trees,
        )
    return {name: _fitted(of, fit, rows, seed) for name, (of, fit) in facts.items()}


def _fitted(
    facts: _Facts, fit: Callable[[Floats, Examples, int], _Logits], rows: Examples, seed: int
) -> Score:
    """Calibrated on the last days, as A-CTR is."""
    logits = fit(facts(rows), rows, seed)
    recent = rows.take(np.flatnonzero(_is_recent(rows)))
    offset = calibration(logits(facts(recent)), recent)
    return lambda examples: logits(facts(examples)) + offset


def _linear(facts: Floats, rows: Examples, seed: int) -> _Logits:
    model = LogisticRegression(C=np.inf, max_iter=1000)
    model.fit(facts, rows.label, _times(rows))

    def logits(facts: Floats) -> Floats:
        found: Floats = model.decision_function(facts)
        return found

    return logits


def _trees(facts: Floats, rows: Examples, seed: int) -> _Logits:
    """As many trees as do best on the last days, then as many on all of them."""
    recent = _is_recent(rows)
    early, late = (
        lightgbm.Dataset(facts[kept], rows.label[kept], weight=_times(rows)[kept])
        for kept in (~recent, recent)
    )
    choices = {**_TREES, "seed": seed}
    stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
    tried = lightgbm.train(choices, early, _MAX_TREES, valid_sets=[late], callbacks=[stop])
    everything = lightgbm.Dataset(facts, rows.label, weight=_times(rows))
    model = lightgbm.train(choices, everything, tried.best_iteration)

    def logits(facts: Floats) -> Floats:
        return np.asarray(model.predict(facts, raw_score=True, num_threads=1), np.float64)

    return logits


def _times(rows: Examples) -> npt.NDArray[np.float32]:
    """How many candidates each row stands for, float32 [n]; a positive for itself."""
    return np.where(rows.label > 0, np.float32(1), rows.weight)


def _is_recent(rows: Examples) -> npt.NDArray[np.bool_]:
    recent: npt.NDArray[np.bool_] = rows.day > rows.day.max() - np.timedelta64(_VALIDATION_DAYS)
    if recent.all():
        days = len(np.unique(rows.day))
        raise ValueError(f"rows are of {days} days, must be of more than {_VALIDATION_DAYS}")
    return recent


class _Popularity:
    """Log of an item's smoothed rate of positives among its impressions as ads, before the day."""

    def __init__(self, log: EventLog) -> None:
        self._log = log
        self._days = log.days("item").filter(pl.col("source") == "ad")
        self._item = log.items.rows(self._days["item_id"].to_numpy())

    def __call__(self, examples: Examples) -> Floats:
        """float64 [n, 1]."""
        item, found = item_rows(examples, self._log), np.zeros((len(examples), 1))
        for day in np.unique(examples.day):
            here = examples.day == day
            found[here, 0] = self._asof(day.item())[item[here]]
        return found

    def _asof(self, day: date) -> Floats:
        """float64 [num items]."""
        before = pl.col("date").is_between(day - timedelta(days=POPULARITY_DAYS), day, "left")
        kept = self._days.select(before).to_series().to_numpy()
        shown, taken = (
            np.bincount(
                self._item[kept], self._days[name].to_numpy()[kept], len(self._log.items.ids)
            )
            for name in ("impressions", "positives")
        )
        rate = max(taken.sum(), 1.0) / max(shown.sum(), 1.0)
        smoothed: Floats = (taken + _PSEUDO_POSITIVES) / (shown + _PSEUDO_POSITIVES / rate)
        return np.log(smoothed)


def _repeats(examples: Examples) -> Floats:
    """Log of 1 + how often the user took the item before the day: float64 [n, 1]."""
    return examples.match[:, [_REPEATS]].astype(np.float64)


def _counts(examples: Examples) -> Floats:
    """All numbers of the row, and the context's buckets."""
    parts = [
        examples.item_num,
        examples.sides.user_num[examples.side],
        examples.context_num,
        examples.context_cat,
        examples.match,
    ]
    return np.hstack(parts).astype(np.float64)


def _windows(examples: Examples) -> Floats:
    """TPM's logit of each month, its parts, and what is there: float64 [n, 5 M]."""
    users, items = examples.sides, examples.item_windows
    user, item = users.user_window[examples.side], items.vectors[examples.item_window_row]
    size = examples.window_dim
    dot = np.einsum("nmd,nmd->nm", user[..., :size], item[..., :size])
    there = (users.user_window_present[examples.side], items.present[examples.item_window_row])
    return np.hstack([dot, user[..., size], item[..., size], *there]).astype(np.float64)


def _score(
    log: EventLog,
    builder: Builder,
    references: dict[str, Score],
    day: date,
    per_day: int | None,
) -> Scored:
    examples = builder.build(log.full_lists([day], per_day))
    logits = {name: score(examples) for name, score in references.items()}
    return Scored(logits, examples.label, examples.user_row, examples.request_id)


def _joined(parts: Sequence[Scored]) -> Scored:
    names = parts[0].logits
    return Scored(
        {name: np.concatenate([part.logits[name] for part in parts]) for name in names},
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.user_row for part in parts]),
        np.concatenate([part.request_id for part in parts]),
    )
