"""Nothing that a row of a day is joined with may depend on that day or a later one.

The check is a real one: the log is written a second time with everything from that day on changed,
or gone, and all that is derived of it has to stay the same. Planted leaks have to be found.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import fields
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny

from bundle.golden import body_of
from training.counts import Counts, Floats
from training.cpm import cpm_rows
from training.events import EventLog
from training.examples import Builder, builder_for, month_before
from training.export import item_table
from training.history import Histories, Past
from training.requests import RequestMaker
from training.tpm import train_through
from training.workspace import Workspace

MID_MONTH, FIRST_OF_MONTH = date(2017, 3, 15), date(2017, 4, 1)
ONE_DAY = timedelta(days=1)
MakeBuilder = Callable[[Workspace, EventLog, date], Builder]


def honest(workspace: Workspace, log: EventLog, day: date) -> Builder:
    return builder_for(workspace, log, day, day)


def derived(builder: Builder, rows: pl.DataFrame, day: date) -> dict[str, Any]:
    """All that is joined to rows of a day: arrays for training, and requests for the service."""
    examples = builder.build(rows)
    found: dict[str, Any] = {
        f"sides.{field.name}": getattr(examples.sides, field.name)
        for field in fields(examples.sides)
    }
    batch = examples.batch(np.arange(len(examples)))
    found |= {f"batch.{name}": tensor.numpy() for name, tensor in batch.items()}
    requests = RequestMaker(builder.log, builder, day).requests(rows)
    found["requests"] = [json.dumps(body_of(request)) for request, _ in requests]
    items = item_table(builder.log, builder, day)
    found |= {"items.categorical": items.categorical, "items.numeric": items.numeric}
    return found


def leaks(
    make: MakeBuilder, before: Workspace, after: Workspace, day: date, rows: pl.DataFrame
) -> set[str]:
    """Names of what differs between two workspaces whose logs differ from `day` on."""
    one, other = (derived(make(w, w.log(), day), rows, day) for w in (before, after))
    assert one.keys() == other.keys()
    return {name for name in one if not np.array_equal(one[name], other[name])}


class Pair:
    """Two workspaces whose logs are equal before `day`, and differ from then on."""

    def __init__(self, data: Path, root: Path, day: date, *, remove: bool) -> None:
        self.day = day
        self.before, self.after = Workspace(root / "before"), Workspace(root / "after")
        self.before.root.mkdir(parents=True)
        self.before.data.symlink_to(data)
        tiny.alter_from(data, self.after.data, day, remove=remove)
        last = f"{day:%Y-%m}" if day == MID_MONTH and not remove else month_before(day)
        for workspace in (self.before, self.after):
            # Up to the running month where there is one, for a leak to be planted.
            num_months = tiny.MONTHS.index(last) + 1
            train_through(workspace, last, num_months, tiny.RECIPE.tpm, seed=0)

    def rows(self, day: date) -> pl.DataFrame:
        """The rows that are asked about, of both domains and full lists: the same ones for both."""
        log = self.before.log()
        parts = [log.rows("ad", day, day), log.rows("natural", day, day), log.full_lists([day])]
        columns = parts[0].columns
        return pl.concat([part.select(columns) for part in parts], how="vertical_relaxed")

    def leaks(self, make: MakeBuilder, day: date | None = None) -> set[str]:
        asked = day or self.day
        return leaks(make, self.before, self.after, asked, self.rows(asked))


@pytest.fixture(
    scope="module",
    params=[
        (MID_MONTH, False),
        (MID_MONTH, True),
        (FIRST_OF_MONTH, False),
        (FIRST_OF_MONTH, True),
    ],
    ids=lambda param: f"{param[0]}-{'removed' if param[1] else 'changed'}",
)
def pair(
    request: pytest.FixtureRequest, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory
) -> Pair:
    day, remove = request.param
    return Pair(tiny_data, tmp_path_factory.mktemp("pair"), day, remove=remove)


@pytest.fixture(scope="module")
def changed(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(tiny_data, tmp_path_factory.mktemp("changed"), MID_MONTH, remove=False)


def test_nothing_of_a_day_depends_on_that_day_or_later(pair: Pair) -> None:
    assert pair.leaks(honest) == set()


def test_earlier_days_do_not_depend_on_it_either(pair: Pair) -> None:
    for days in (1, 5):
        assert pair.leaks(honest, pair.day - days * ONE_DAY) == set()


def test_the_next_day_does_depend_on_it(pair: Pair) -> None:
    """Or the check would see nothing at all."""
    found = pair.leaks(honest, pair.day + ONE_DAY)
    expected = {"batch.user_num", "batch.item_num", "batch.match", "sides.history_item"}
    assert expected | {"items.numeric", "requests"} <= found


def test_the_window_stays_the_same_until_the_month_has_ended(pair: Pair) -> None:
    found = pair.leaks(honest, pair.day + ONE_DAY)
    assert not {name for name in found if "window" in name}


class CountsOfToday(Counts):
    """A span that includes the day itself."""

    def asof(self, day: date) -> Floats:
        return super().asof(day + ONE_DAY)

    def raw(self, day: date) -> dict[str, Floats]:
        return super().raw(day + ONE_DAY)


class HistoriesOfToday(Histories):
    """A history that goes up to the next day."""

    def before(self, user_row: int, day: date) -> Past:
        past = super().before(user_row, day + ONE_DAY)
        return Past(past.item_rows, past.age_days - 1, past.count)


def plant_item_counts(workspace: Workspace, log: EventLog, day: date) -> Builder:
    builder = honest(workspace, log, day)
    builder._item_counts = CountsOfToday(log, "item")
    return builder


def plant_user_counts(workspace: Workspace, log: EventLog, day: date) -> Builder:
    builder = honest(workspace, log, day)
    builder._user_counts = CountsOfToday(log, "user")
    return builder


def plant_history(workspace: Workspace, log: EventLog, day: date) -> Builder:
    builder = honest(workspace, log, day)
    builder._histories = HistoriesOfToday(log, day + ONE_DAY)
    return builder


def plant_window(workspace: Workspace, log: EventLog, day: date) -> Builder:
    """The window of the running month in place of the one before it."""
    running = f"{day:%Y-%m}"
    windows = {month_before(day): workspace.windows(log, [running])[running]}
    return Builder(log, windows, day + ONE_DAY)


@pytest.mark.parametrize(
    ("plant", "found"),
    [
        (plant_item_counts, {"batch.item_num", "items.numeric"}),
        (plant_user_counts, {"sides.user_num", "batch.user_num", "requests"}),
        (plant_history, {"sides.history_item", "batch.history_num", "batch.match", "requests"}),
        (plant_window, {"sides.user_window", "batch.user_window", "batch.item_window"}),
    ],
)
def test_a_planted_leak_is_found(changed: Pair, plant: MakeBuilder, found: set[str]) -> None:
    assert found <= changed.leaks(plant)


def test_a_planted_leak_touches_nothing_else(changed: Pair) -> None:
    """So the check points at its cause."""
    assert changed.leaks(plant_item_counts) == {"batch.item_num", "items.numeric"}


def test_the_rows_that_cpm_learns_from_are_older_than_its_day(pair: Pair) -> None:
    last = pair.day - ONE_DAY
    one, other = (
        cpm_rows(w.log(), last - 6 * ONE_DAY, last, tiny.RECIPE.cpm, seed=0)
        for w in (pair.before, pair.after)
    )
    assert one.equals(other)
    assert one["date"].max() == last


def test_snapshots_of_months_that_ended_do_not_depend_on_later_days(pair: Pair) -> None:
    for workspace in (pair.before, pair.after):
        assert month_before(pair.day) in workspace.months()
    one, other = (w.windows(w.log(), [month_before(pair.day)]) for w in (pair.before, pair.after))
    assert one[month_before(pair.day)].ref == other[month_before(pair.day)].ref


def test_both_copies_really_differ_from_the_day_on(pair: Pair) -> None:
    def after(workspace: Workspace) -> Iterator[bytes]:
        for path in sorted(workspace.data.glob("behaviour/date=*/*.parquet")):
            if path.parent.name >= f"date={pair.day}":
                yield path.read_bytes()

    one, other = list(after(pair.before)), list(after(pair.after))
    assert one
    assert not other or all(a != b for a, b in zip(one, other, strict=True))
