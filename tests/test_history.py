"""Histories against a slow walk through everything that a user took before a day."""

from __future__ import annotations

import shutil
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import tiny

from training.events import EventLog
from training.history import Histories, Past

DAY = date(2017, 3, 10)


def slow_past(log: EventLog, user: str, day: date) -> dict[str, tuple[int, int]]:
    """Age in days and count by item."""
    found: dict[str, tuple[int, int]] = {}
    frame = log.behaviour(day).filter(pl.col("user_id") == user).sort("date")
    for row in frame.iter_rows(named=True):
        _, count = found.get(row["item_id"], (0, 0))
        found[row["item_id"]] = ((day - row["date"]).days, count + 1)
    return found


def past_of(log: EventLog, user: str, day: date, until: date | None = None) -> Past:
    row = int(log.users.rows(np.array([user], object))[0])
    return Histories(log, until or day).before(row, day)


def named(log: EventLog, past: Past) -> dict[str, tuple[float, float]]:
    ids = log.items.ids[past.item_rows]
    return dict(zip(ids, zip(past.age_days, past.count, strict=True), strict=True))


def test_ages_and_counts_are_those_of_a_slow_walk(tiny_log: EventLog) -> None:
    for user in ("u01", "u05", "u10"):
        expected = slow_past(tiny_log, user, DAY)
        found = named(tiny_log, past_of(tiny_log, user, DAY))
        assert found.items() <= expected.items()
        assert len(found) == min(len(expected), tiny_log.spec.history.max_length)


def test_the_newest_items_are_kept_and_come_first(tiny_log: EventLog) -> None:
    past = past_of(tiny_log, "u05", DAY)
    assert len(past.item_rows) == tiny_log.spec.history.max_length
    assert past.age_days.tolist() == sorted(past.age_days.tolist())
    expected = slow_past(tiny_log, "u05", DAY)
    left_out = [age for item, (age, _) in expected.items() if item not in named(tiny_log, past)]
    assert left_out
    assert max(past.age_days) <= min(left_out)


def test_an_item_is_there_once_however_often_it_was_taken(tiny_log: EventLog) -> None:
    past = past_of(tiny_log, "u05", DAY)
    assert len(set(past.item_rows.tolist())) == len(past.item_rows)
    assert past.count.max() > 1


def test_what_was_taken_on_the_day_or_later_is_not_there(tiny_log: EventLog) -> None:
    for user in ("u05", "u06", "u07"):
        short, long = (past_of(tiny_log, user, DAY, until) for until in (DAY, tiny.LAST))
        assert short.age_days.min() >= 1
        for name in ("item_rows", "age_days", "count"):
            assert getattr(short, name).tolist() == getattr(long, name).tolist()


def test_a_user_who_took_nothing_has_an_empty_history(tiny_log: EventLog) -> None:
    past = past_of(tiny_log, tiny.SPECIAL["shy"], DAY)
    assert (len(past.item_rows), len(past.age_days), len(past.count)) == (0, 0, 0)


def test_what_is_in_neither_domain_is_in_the_history(tiny_log: EventLog) -> None:
    assert len(past_of(tiny_log, tiny.SPECIAL["quiet"], DAY).item_rows) > 5


def test_the_order_within_a_day_says_nothing(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data" / "behaviour").glob("*/*.parquet"):
        frame = pl.read_parquet(path, hive_partitioning=False)
        frame.sort("timestamp", "item_id", descending=True).write_parquet(path)
    first, second = EventLog(tiny_data), EventLog(tmp_path / "data")
    for user in ("u04", "u08", "u12"):
        expected, found = (past_of(log, user, DAY) for log in (first, second))
        assert found.item_rows.tolist() == expected.item_rows.tolist()
        assert found.age_days.tolist() == expected.age_days.tolist()


def test_a_history_of_some_days_has_nothing_older(tiny_log: EventLog) -> None:
    row = int(tiny_log.users.rows(np.array(["u05"], object))[0])
    past = Histories(tiny_log, DAY, days=7).before(row, DAY)
    expected = slow_past(tiny_log, "u05", DAY)
    recent = {item for item, (age, _) in expected.items() if age <= 7}
    assert set(named(tiny_log, past)) == recent
    assert 0 < len(recent) < len(expected)
