"""What a user's history says of each candidate: has the same item, type or category been there, how
often, how long ago; and how long the history is.

`training.layers.HardMatch` is the same function on tensors; a bundle is checked against it before
it exists. Here the history is summed up once per distinct value, and candidates only look that up:
a comparison of every step with every candidate takes ten times as long.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MATCH_VALUES = 6
"""Numbers per matched level: present, log distinct items, log count, log decayed count, log recent
items, log age."""
DECAY_DAYS = 30.0
"""An item this old counts for 1/e in the decayed count."""
RECENT_DAYS = 14.0
"""An item this old counts for 1/e of a recent item."""
NEVER_DAYS = 1000.0
"""The age of what has not been there: older than all that has."""

Floats = npt.NDArray[np.float32]
Values = npt.NDArray[np.int64] | npt.NDArray[np.int32]


def match_width(num_matched: int) -> int:
    """Columns that `hard_match` gives for the item itself and `num_matched` of its features."""
    return MATCH_VALUES * (1 + num_matched) + 2


class History:
    """A history that candidates are matched with: ages and counts [L], newest first, with which
    levels of values [L] go (the item's key, then its features); 0 in a level matches nothing."""

    def __init__(self, age_days: npt.NDArray[np.float64], count: npt.NDArray[np.float64]) -> None:
        age = age_days.clip(max=NEVER_DAYS)
        decayed, recent = count * np.exp(-age / DECAY_DAYS), np.exp(-age / RECENT_DAYS)
        self._sums = np.stack([np.ones_like(age), count, decayed, recent], axis=1)
        self._age = np.log1p(age)

    def match(self, levels: list[tuple[Values, Values]]) -> Floats:
        """float32 [N, MATCH_VALUES * levels + 2] for pairs of a level's values in the history [L]
        and of the candidates [N]."""
        num = len(levels[0][1])
        totals: Floats = np.log1p(self._sums[:, :2].sum(axis=0)).astype(np.float32)
        parts = [self._level(history, candidates) for history, candidates in levels]
        return np.concatenate([*parts, np.broadcast_to(totals, (num, 2))], axis=1)

    def _level(self, history: Values, candidates: Values) -> Floats:
        if not len(history):
            history = np.zeros(1, history.dtype)  # which matches nothing
            return History(np.zeros(1), np.zeros(1))._level(history, candidates)
        order = history.argsort(kind="stable")
        ordered = history.take(order)
        is_start = np.ones(len(ordered), np.bool_)
        np.not_equal(ordered[1:], ordered[:-1], out=is_start[1:])
        starts = is_start.nonzero()[0]
        values = ordered.take(starts)
        facts = np.zeros((len(values) + 1, MATCH_VALUES), np.float32)
        facts[-1, -1] = np.log1p(NEVER_DAYS)
        facts[:-1, 0] = 1.0
        sums = np.add.reduceat(self._sums.take(order, axis=0), starts, axis=0)
        facts[:-1, 1:-1] = np.log1p(sums)
        facts[:-1, -1] = self._age.take(order.take(starts))  # newest first
        at = values.searchsorted(candidates)
        at[(values.take(at, mode="clip") != candidates) | (candidates <= 0)] = len(values)
        return facts.take(at, axis=0)
