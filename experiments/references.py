"""Reference lines: how good simple scores are on the rows that networks are measured on.

Popularity and repeats are logistic in one or two facts; trees are LightGBM on every number that the
log offers point in time, without and with what TPM's windows say. All learn from the rows that
A-CTR learns from, of whose negatives only a share r was kept. Two facts can't be right about every
row, so there each negative counts 1/r times: that is the likelihood of all candidates, which log
loss measures. Trees can, and heavy negatives make their splits noisy: like a network's loss, theirs
adds log(1/r) to the logit instead. On the last week of training on Complete Journey that gave a log
loss of 0.0047, weights 0.0059.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, timedelta

import lightgbm
import numpy as np
import numpy.typing as npt
import polars as pl
from sklearn.linear_model import LogisticRegression

from experiments.windows import item_rows
from training.events import EventLog
from training.examples import Examples
from training.fit import calibration

Floats = npt.NDArray[np.float64]
Score = Callable[[Examples], Floats]
"""Logits float64 [n] of all candidates' clicks."""
_Facts = Callable[[Examples], Floats]
"""What a reference sees of each row: float64 [n, F]."""
_Logits = Callable[[Floats], Floats]

POPULARITY = "item popularity"
REPEATS = "household x product counts"
BOTH = "popularity and counts"
TREES = "trees on counts"
TREES_AND_WINDOWS = "trees on counts and windows"
REFERENCES = (POPULARITY, REPEATS, BOTH, TREES, TREES_AND_WINDOWS)

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
    "num_leaves": 15,
    "min_data_in_leaf": 100,
    "feature_fraction": 0.5,
    "deterministic": True,
    "force_row_wise": True,
    "num_threads": 1,
    "verbosity": -1,
}


def fit_reference(name: str, log: EventLog, rows: Examples, seed: int) -> Score:
    """The reference of a name, fitted on ads rows of more than seven days, and calibrated on the
    last seven, as A-CTR is. Same seed, same scores.

    Raises:
        ValueError: no such reference; too few days.
    """
    facts, fit = _reference(name, log)
    logits = fit(facts(rows), rows, seed)
    recent = rows.take(np.flatnonzero(_is_recent(rows)))
    offset = calibration(logits(facts(recent)), recent)
    return lambda examples: logits(facts(examples)) + offset


def _reference(
    name: str, log: EventLog
) -> tuple[_Facts, Callable[[Floats, Examples, int], _Logits]]:
    """What it sees of a row, and how it learns."""
    if name == POPULARITY:
        return _Popularity(log), _linear
    if name == REPEATS:
        return _repeats, _linear
    if name == BOTH:
        popularity = _Popularity(log)
        return lambda e: np.hstack([popularity(e), _repeats(e)]), _linear
    if name == TREES:
        return _counts, _trees
    if name == TREES_AND_WINDOWS:
        return lambda e: np.hstack([_counts(e), _windows(e)]), _trees
    raise ValueError(f"reference {name!r}: must be one of {', '.join(REFERENCES)}")


def _linear(facts: Floats, rows: Examples, seed: int) -> _Logits:
    model = LogisticRegression(C=np.inf, max_iter=1000)
    model.fit(facts, rows.label, rows.times)

    def logits(facts: Floats) -> Floats:
        found: Floats = model.decision_function(facts)
        return found

    return logits


def _trees(facts: Floats, rows: Examples, seed: int) -> _Logits:
    """As many trees as do best on the last days, then as many on all of them."""
    recent, choices = _is_recent(rows), {**_TREES, "seed": seed}
    stop = lightgbm.early_stopping(_PATIENCE, verbose=False)
    early, late = (_dataset(facts, rows, kept) for kept in (~recent, recent))
    tried = lightgbm.train(choices, early, _MAX_TREES, valid_sets=[late], callbacks=[stop])
    everything = _dataset(facts, rows, np.ones_like(recent))
    model = lightgbm.train(choices, everything, tried.best_iteration)

    def logits(facts: Floats) -> Floats:
        # The raw score is without the offset: the logit among all candidates.
        return np.asarray(model.predict(facts, raw_score=True, num_threads=1), np.float64)

    return logits


def _dataset(facts: Floats, rows: Examples, kept: npt.NDArray[np.bool_]) -> lightgbm.Dataset:
    offset = np.log(rows.weight[kept])
    return lightgbm.Dataset(facts[kept], rows.label[kept], init_score=offset)


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
