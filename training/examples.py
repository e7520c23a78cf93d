"""Rows of the log as the arrays that the network reads, joined point in time.

What belongs to a user on a day (features, history, window) is kept once as a *side* and shared by
that day's rows; item windows stay in one table per window. A batch gathers from all of them. The
match features, which no parameter changes, are computed here once, by the network's own module;
of the history itself only the newest part, which is attended to, is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import date, timedelta
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import torch
from torch import Tensor

from bundle.encode import Value
from bundle.spec import Domain, Entity, Feature
from embeddings_store import Windows, window_months
from embeddings_store.window import all_absent
from training.counts import Counts
from training.distributed import own_rows, world
from training.events import DataError, EventLog, Ints, days_between
from training.history import Histories, Past
from training.layers import HardMatch
from training.workspace import WindowTable, Workspace

Floats = npt.NDArray[np.float32]
Batch = dict[str, Tensor]


def month_before(day: date, lag_days: int = 0) -> str:
    """The newest month that ended more than `lag_days` days before `day`: what its rows may have
    a snapshot of."""
    day -= timedelta(days=lag_days)
    year, month = (day.year, day.month - 1) if day.month > 1 else (day.year - 1, 12)
    return f"{year}-{month:02d}"


def window_month(workspace: Workspace, day: date) -> str | None:
    """Which window rows of `day` see, and a bundle made for that day: the newest published one
    whose last month ended more than the workspace's lag before it. None where the log is too young
    for any. Where it is not and there is none, the month that should be there."""
    month = month_before(day, workspace.lag_days)
    if published := [m for m in workspace.whole_windows() if m <= month]:
        return published[-1]
    return month if min(window_months(month)) >= first_month(workspace.log()) else None


def first_month(log: EventLog) -> str:
    """The first month that the natural domain has from its first day on."""
    first = partitions(log, "natural")[0]
    return f"{first if first.day == 1 else first.replace(day=28) + timedelta(days=4):%Y-%m}"


def newest_day(log: EventLog, domain: Domain, before: date) -> date:
    """The last day before `before` that a domain has rows of.

    Raises:
        DataError: there is none.
    """
    earlier = [day for day in partitions(log, domain) if day < before]
    if not earlier:
        raise DataError(f"{log.root}: the {domain} domain has no day before {before}")
    return earlier[-1]


def partitions(log: EventLog, domain: Domain) -> list[date]:
    """The days that a domain has a partition of, in order.

    Raises:
        DataError: there are none.
    """
    folder = log.root / "events" / f"domain={domain}"
    names = [path.name.removeprefix("date=") for path in folder.glob("date=*")]
    if not names:
        raise DataError(f"{folder}: no day at all")
    return sorted(map(date.fromisoformat, names))


@dataclass(frozen=True)
class Sides:
    """S user sides, one per user and day. Shapes as in `bundle.encode.Encoded`, S instead of 1 and
    at most the spec's `attend` history steps."""

    user_cat: npt.NDArray[np.int32]
    user_num: Floats
    history_item: Ints
    history_cat: npt.NDArray[np.int32]
    history_num: Floats
    user_window: Floats
    user_window_present: npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Examples:
    """n rows. side and item_window_row say where a row's shared parts are; weight is one over the
    rate at which negatives were kept; user_row, request_id and day say whose row it is."""

    sides: Sides
    item_windows: Windows
    side: Ints
    item_window_row: Ints
    item_key: Ints
    item_cat: npt.NDArray[np.int32]
    item_num: Floats
    match: Floats
    context_cat: npt.NDArray[np.int32]
    context_num: Floats
    label: Floats
    weight: Floats
    user_row: Ints
    request_id: Ints
    day: npt.NDArray[np.datetime64]

    def __len__(self) -> int:
        return len(self.label)

    @property
    def window_dim(self) -> int:
        """D of the windows, 0 where there are none."""
        return int(self.item_windows.vectors.shape[2]) - 1

    @property
    def times(self) -> Floats:
        """How many candidates of the whole traffic each row stands for: 1 / rate where it was
        sampled, and a positive for itself."""
        return np.where(self.label > 0, 1.0, self.weight)

    def since(self, day: date) -> Examples:
        """The rows dated on or after `day`."""
        return self.take(np.flatnonzero(self.day >= np.datetime64(day, "D")))

    def take(self, kept: Ints) -> Examples:
        """Some of the rows."""
        per_row = [f.name for f in fields(self) if f.name not in ("sides", "item_windows")]
        return replace(self, **{name: getattr(self, name)[kept] for name in per_row})

    def batch(self, rows: Ints) -> Batch:
        """The named inputs of the network for some rows; all tensors have len(rows) first."""
        side = self.side[rows]
        window_rows = self.item_window_row[rows]
        arrays: dict[str, npt.NDArray[Any]] = {
            "user_cat": self.sides.user_cat[side],
            "user_num": self.sides.user_num[side],
            "history_item": self.sides.history_item[side],
            "history_cat": self.sides.history_cat[side],
            "history_num": self.sides.history_num[side],
            "user_window": self.sides.user_window[side],
            "user_window_present": self.sides.user_window_present[side],
            "item_key": self.item_key[rows],
            "item_cat": self.item_cat[rows],
            "item_num": self.item_num[rows],
            "match": self.match[rows],
            "item_window": self.item_windows.vectors[window_rows],
            "item_window_present": self.item_windows.present[window_rows],
            "context_cat": self.context_cat[rows],
            "context_num": self.context_num[rows],
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


class DayCache:
    """What builders of one log share when one follows the other: histories, counts, windows, and
    the days that were built last. The log must not change meanwhile. None of it is as of a day:
    what a row may know is decided when it is built."""

    def __init__(self, log: EventLog, until: date, size: int = 40) -> None:
        """until: no row is dated on or after this day. size: how many built days are kept."""
        self.log, self.until, self._size = log, until, size
        self.histories = Histories(log, until)
        self.user_counts, self.item_counts = Counts(log, "user"), Counts(log, "item")
        self._windows: dict[str, WindowTable] = {}
        self._days: dict[tuple[object, ...], Examples] = {}

    def windows(self, workspace: Workspace, months: Sequence[str]) -> dict[str, WindowTable]:
        """As `Workspace.windows`, each read once."""
        lacking = sorted(set(months) - self._windows.keys())
        self._windows |= workspace.windows(self.log, lacking)
        return {month: self._windows[month] for month in months}

    def day(self, key: tuple[object, ...], build: Callable[[], Examples]) -> Examples:
        """The examples that `key` names, built unless they are among the newest `size`."""
        self._days[key] = self._days.pop(key) if key in self._days else build()
        for old in list(self._days)[: -self._size]:
            del self._days[old]
        return self._days[key]


class Builder:
    """Builds examples from rows of the log, one day at a time."""

    def __init__(
        self,
        log: EventLog,
        windows: Mapping[str, WindowTable],
        until: date,
        history_days: int | None = None,
        month_of: Callable[[date], str | None] = month_before,
        cache: DayCache | None = None,
        window_dim: int | None = None,
    ) -> None:
        """windows: by month; a day uses that of `month_of`, by default of the newest month that
        ended before it, and no window at all where that one is absent. until: no row is dated on
        or after this day. history_days: how far back histories reach; None is as far as the log
        does. cache: what earlier builders of the same log left; its histories are whole.
        window_dim: D of windows that are absent on all days; 0 where it is not known."""
        self.log = log
        self._windows = windows
        self._month_of = month_of
        self._cache = cache
        self._window_dim = window_dim or 0
        self._histories = cache.histories if cache else Histories(log, until, history_days)
        self._user_counts = cache.user_counts if cache else Counts(log, "user")
        self._item_counts = cache.item_counts if cache else Counts(log, "item")
        item_cat = [f.name for f in log.spec.of("item", "categorical")]
        self._columns = [item_cat.index(name) for name in log.spec.history.match]
        self._match = HardMatch(self._columns)

    def build(self, rows: pl.DataFrame) -> Examples:
        """Examples of all rows, in their order, which must be by date."""
        days = rows.partition_by("date", as_dict=True, maintain_order=True)
        return concatenate([self._day(day, frame) for (day,), frame in days.items()])

    def days(self, domain: Domain, first: date, last: date) -> Examples:
        """Examples of a domain's rows dated first .. last, or of this process's share of them."""
        rows = own_rows(self.log, domain, first, last)
        days = rows.partition_by("date", as_dict=True, maintain_order=True)
        return concatenate([self._kept(domain, day, frame) for (day,), frame in days.items()])

    def _kept(self, domain: Domain, day: date, rows: pl.DataFrame) -> Examples:
        if self._cache is None:
            return self._day(day, rows)
        key = (domain, day, self.window(day).ref, self.window_dim)
        return self._cache.day(key, lambda: self._day(day, rows))

    def window(self, day: date) -> WindowTable:
        """The window that rows of `day` see, all of it."""
        return self._windows.get(self._month_of(day) or "") or self._absent

    def _day(self, day: date, rows: pl.DataFrame) -> Examples:
        user_row = self.log.users.rows(rows["user_id"].to_numpy())
        item_row = self.log.items.rows(rows["item_id"].to_numpy())
        side_users, side = np.unique(user_row, return_inverse=True)
        window = self.window(day)
        item_cat = self.log.items.categorical[item_row]
        for i, feature in enumerate(self.log.spec.of("item", "categorical")):
            if feature.name in rows.columns and feature.name != "item_id":
                given = _encode(self.log, feature, rows[feature.name])
                item_cat[:, i] = np.where(given > 0, given, item_cat[:, i])
        item_key = self.log.items.keys[item_row].astype(np.int64)
        sides = self._sides(side_users, day, window)
        item_num = self._item_counts.asof(day)[item_row]
        for i, feature in enumerate(self.log.spec.of("item", "numeric")):
            if feature.name in rows.columns:
                item_num[:, 2 * i : 2 * i + 2] = _encode_numbers(self.log, feature, rows)
        return Examples(
            sides=_newest(sides, self.log.spec.history.attend),
            item_windows=window.items,
            side=side,
            item_window_row=item_row,
            item_key=item_key,
            item_cat=item_cat,
            match=self._matched(sides, side, item_key, item_cat),
            item_num=item_num,
            context_cat=_context(self.log, rows, "context"),
            context_num=_context_numbers(self.log, rows),
            label=rows["label"].to_numpy().astype(np.float32),
            weight=rows["sample_weight"].to_numpy().astype(np.float32),
            user_row=user_row,
            request_id=rows["request_id"].to_numpy(),
            day=np.full(len(rows), np.datetime64(day, "D")),
        )

    def _sides(self, users: Ints, day: date, window: WindowTable) -> Sides:
        pasts = [self._histories.before(int(user), day) for user in users]
        length = self.log.spec.history.max_length
        item = _padded([self.log.items.keys[p.item_rows].astype(np.int64) for p in pasts], length)
        numbers = [np.stack([p.age_days, p.count], axis=1) for p in pasts]
        matched = [self.log.items.categorical[p.item_rows][:, self._columns] for p in pasts]
        return Sides(
            user_cat=self.log.users.categorical[users],
            user_num=self._user_counts.asof(day)[users],
            history_item=item,
            history_cat=_padded(matched, length),
            history_num=_padded(numbers, length),
            user_window=window.users.vectors[users],
            user_window_present=window.users.present[users],
        )

    @property
    def window_dim(self) -> int:
        """D of the windows, 0 where there are none."""
        dims = (w.users.vectors.shape[2] - 1 for w in self._windows.values())
        return next(dims, self._window_dim)

    @torch.no_grad()
    def _matched(
        self, sides: Sides, side: Ints, item_key: Ints, item_cat: npt.NDArray[np.int32]
    ) -> Floats:
        matched = np.empty((len(side), self._match.width), np.float32)
        order = np.argsort(side, kind="stable")
        for rows in np.split(order, np.flatnonzero(np.diff(side[order])) + 1):
            own = slice(side[rows[0]], side[rows[0]] + 1)
            # Without the padding, which matches nothing.
            length = max(int(np.count_nonzero(sides.history_item[own])), 1)
            history = (sides.history_item, sides.history_cat, sides.history_num)
            arrays = [*(part[own, :length] for part in history), item_key[rows], item_cat[rows]]
            matched[rows] = self._match(*map(torch.from_numpy, arrays)).numpy()
        return matched

    def past(self, user_row: int, day: date) -> Past:
        """A user's history before a day, for a request to the service."""
        return self._histories.before(user_row, day)

    def user_features(self, day: date) -> dict[str, Floats]:
        """Raw user counts by name, as a request carries them: float32 [num users]."""
        return self._user_counts.raw(day)

    def item_numbers(self, day: date) -> Floats:
        """Encoded numeric features of all items on a day, for the bundle's item table."""
        return self._item_counts.asof(day)

    @cached_property
    def _absent(self) -> WindowTable:
        users, items = len(self.log.users.ids), len(self.log.items.ids)
        dim = self.window_dim
        return WindowTable(None, all_absent(users, dim), all_absent(items, dim))


def _newest(sides: Sides, length: int) -> Sides:
    return replace(
        sides,
        history_item=sides.history_item[:, :length],
        history_cat=sides.history_cat[:, :length],
        history_num=sides.history_num[:, :length],
    )


def builder_for(
    workspace: Workspace,
    log: EventLog,
    first: date,
    last: date,
    with_tpm: bool = True,
    window_dim: int | None = None,
) -> Builder:
    """A builder for rows dated first .. last, with the windows that those days need; it shares
    what is in the workspace's cache, where that has one. window_dim: as in `Builder`."""
    until, cache = last + timedelta(days=1), workspace.cache
    months = {day: window_month(workspace, day) for day in days_between(first, last) if with_tpm}
    needed = sorted({month for month in months.values() if month})
    if cache is None:
        windows = world().in_turn(lambda: workspace.windows(log, needed))
        return Builder(log, windows, until, month_of=months.get, window_dim=window_dim)
    if until > cache.until:
        raise ValueError(f"{last} is not before {cache.until}, which the cache of days ends with")
    windows = cache.windows(workspace, needed)
    return Builder(log, windows, until, None, months.get, cache, window_dim)


def _context(log: EventLog, rows: pl.DataFrame, entity: Entity) -> npt.NDArray[np.int32]:
    columns = [_encode(log, f, rows[f.name]) for f in log.spec.of(entity, "categorical")]
    return np.stack(columns, axis=1)


def _context_numbers(log: EventLog, rows: pl.DataFrame) -> Floats:
    features = log.spec.of("context", "numeric")
    columns = [_encode_numbers(log, feature, rows) for feature in features]
    return np.concatenate(columns, axis=1) if columns else np.zeros((len(rows), 0), np.float32)


def _encode_numbers(log: EventLog, feature: Feature, rows: pl.DataFrame) -> Floats:
    values, place = _distinct(rows[feature.name])
    return log.encoder.numeric(feature, values, feature.name).take(place, axis=0)


def _encode(log: EventLog, feature: Feature, column: pl.Series) -> npt.NDArray[np.int32]:
    values, place = _distinct(column)
    return log.encoder.categorical(feature, values, feature.name).take(place)


def _distinct(column: pl.Series) -> tuple[Sequence[Value], Ints]:
    """The distinct values of a column, and where each row's stands among them."""
    distinct = column.unique(maintain_order=True)
    values: Sequence[Value] = distinct.to_list()
    places = pl.DataFrame({"value": distinct, "place": np.arange(len(distinct))})
    column_frame = column.alias("value").to_frame()
    joined = column_frame.join(
        places, on="value", nulls_equal=True, maintain_order="left", how="left"
    )
    return values, joined["place"].to_numpy()


def _padded(columns: Sequence[npt.NDArray[Any]], length: int) -> npt.NDArray[Any]:
    padded = np.zeros((len(columns), length, *columns[0].shape[1:]), columns[0].dtype)
    for row, column in zip(padded, columns, strict=True):
        row[: len(column)] = column
    return padded


def concatenate(parts: Sequence[Examples]) -> Examples:
    """One after the other; equal windows are kept once."""
    tables: list[Windows] = []
    sides, shifted_side, shifted_item = 0, [], []
    for part in parts:
        if not any(part.item_windows is table for table in tables):
            tables.append(part.item_windows)
        before = tables[: next(i for i, t in enumerate(tables) if t is part.item_windows)]
        shifted_item.append(part.item_window_row + sum(len(t.present) for t in before))
        shifted_side.append(part.side + sides)
        sides += len(part.sides.user_cat)
    values: dict[str, Any] = {
        f.name: np.concatenate([getattr(part, f.name) for part in parts])
        for f in fields(Examples)
        if f.name not in ("sides", "item_windows", "side", "item_window_row")
    }
    return Examples(
        sides=Sides(
            *(np.concatenate([getattr(p.sides, f.name) for p in parts]) for f in fields(Sides))
        ),
        item_windows=Windows(
            np.concatenate([t.vectors for t in tables]), np.concatenate([t.present for t in tables])
        ),
        side=np.concatenate(shifted_side),
        item_window_row=np.concatenate(shifted_item),
        **values,
    )
