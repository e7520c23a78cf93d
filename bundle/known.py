"""Rows of items by their ids, of those that were asked for before.

A bundle knows items by their keys, and to hash an id takes five times as long as to look it up. Ids
that are integers come as arrays, and are looked up as a whole: a Python object for each would take
longer than all the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from bundle.ids import Id

Rows = npt.NDArray[np.int64]

MOST = 1 << 18
"""Ids of one kind that are remembered; then all are forgotten, and those in use come back."""
UNKNOWN = -1
_LEAST_SLOTS = 1 << 10
_SLOTS_PER_ID = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
"""2**64 over the golden ratio, which spreads numbers that follow each other (Knuth, TAOCP 6.4)."""


class KnownRows:
    """Ids of any kind; 17 and "17" are remembered apart."""

    def __init__(self) -> None:
        self._texts: dict[Id, int] = {}
        self._integers = _Integers()

    def find(self, ids: Sequence[Id]) -> Rows:
        """[n], `UNKNOWN` for each id that is not remembered."""
        if isinstance(ids, np.ndarray):
            return self._integers.find(ids)
        return np.fromiter(map(self._texts.get, ids, repeat(UNKNOWN)), np.int64, len(ids))

    def learn(self, ids: Sequence[Id], rows: Rows) -> None:
        """Remembers the rows [n], none of them `UNKNOWN`, of n ids."""
        if isinstance(ids, np.ndarray):
            self._integers.learn(ids, rows)
            return
        if len(self._texts) + len(ids) > MOST:
            self._texts.clear()
        self._texts.update(zip(ids, rows.tolist(), strict=True))


class _Integers:
    """A hash table in arrays: where a place is taken, the next one is tried."""

    def __init__(self) -> None:
        self._clear(0)

    def find(self, ids: Rows) -> Rows:
        return self._rows.take(self._places(ids))

    def learn(self, ids: Rows, rows: Rows) -> None:
        num = self._num + len(ids)
        if num > MOST:
            self._clear(len(ids))
        elif num * _SLOTS_PER_ID > len(self._ids):
            taken = self._rows != UNKNOWN
            before = self._ids[taken], self._rows[taken]
            self._clear(num)
            self._put(*before)
        self._put(ids, rows)

    def _clear(self, num: int) -> None:
        """Makes room for so many ids."""
        num_slots = max(_LEAST_SLOTS, 1 << (num * _SLOTS_PER_ID).bit_length())
        self._num = 0
        self._ids = np.zeros(num_slots, np.int64)
        self._rows = np.full(num_slots, UNKNOWN, np.int64)
        self._shift = np.uint64(65 - num_slots.bit_length())

    def _put(self, ids: Rows, rows: Rows) -> None:
        self._num += len(ids)
        while len(ids):
            at = self._places(ids)
            # Of those that would have the same place, one gets it.
            self._ids[at], self._rows[at] = ids, rows
            without = self._ids.take(at) != ids
            ids, rows = ids[without], rows[without]

    def _places(self, ids: Rows) -> Rows:
        """Where each id is, or the free place where it would be."""
        at: Rows = (ids.view(np.uint64) * _GOLDEN >> self._shift).view(np.int64)
        lost = (self._ids.take(at) != ids).nonzero()[0]
        while (lost := lost[self._rows.take(at.take(lost)) != UNKNOWN]).size:
            at[lost] = (at.take(lost) + 1) & (len(self._ids) - 1)
            lost = lost[self._ids.take(at.take(lost)) != ids.take(lost)]
        return at
