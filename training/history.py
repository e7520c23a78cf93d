"""A user's behaviour history as it stood before a day: the same function fills training rows and
the requests that go to the service."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import date

import numpy as np
import numpy.typing as npt

from training.events import EventLog, Ints

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Past:
    """Distinct items, newest first: rows int64 [l] in the item table, age in days, count."""

    item_rows: Ints
    age_days: Floats
    count: Floats


class Histories:
    """All users' behaviour up to a day, sorted by user and time."""

    def __init__(self, log: EventLog, until: date, days: int | None = None) -> None:
        """days: how far back a history reaches; None is to the beginning of the log."""
        self._days = days
        frame = log.behaviour(until)
        user = log.users.rows(frame["user_id"].to_numpy())
        item = log.items.rows(frame["item_id"].to_numpy())
        day = frame["date"].to_numpy().astype("datetime64[D]").astype(np.int64)
        order = np.lexsort((item, day, user))
        self._item, self._day = item[order], day[order]
        self._start = np.searchsorted(user[order], np.arange(len(log.users.ids) + 1))
        self._max_length = log.spec.history.max_length

    def before(self, user_row: int, day: date) -> Past:
        """What the user took before `day`, at most the spec's max_length distinct items. Among
        items of one day the order is that of their rows, so it says nothing of the day."""
        start, end = self._start[user_row], self._start[user_row + 1]
        number = int(np.datetime64(day, "D").astype(np.int64))
        end = start + np.searchsorted(self._day[start:end], number)
        if self._days is not None:
            start += np.searchsorted(self._day[start:end], number - self._days)
        # Reversed, the first occurrence of an item is its last time.
        items, days = self._item[start:end][::-1], self._day[start:end][::-1]
        distinct, first, count = np.unique(items, return_index=True, return_counts=True)
        newest = np.argsort(first)[: self._max_length]
        age = number - days[first[newest]]
        return Past(distinct[newest], age.astype(np.float32), count[newest].astype(np.float32))
