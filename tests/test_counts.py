"""Counts against a slow sum over the daily table: the days before, and never the day itself."""

from __future__ import annotations

import math
import shutil
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from bundle.spec import Count
from training.counts import Counts
from training.events import EventLog

DAY = date(2017, 3, 10)


def slow_total(log: EventLog, count: Count, of: str, day: date, members: set[str]) -> int:
    """The sum over the days before `day` of some users or items, row by row."""
    entity = "user" if count.by == "user_id" else "item"
    column = {"impression": "impressions", "positive": "positives"}[of]
    return sum(
        row[column]
        for row in log.days(entity).iter_rows(named=True)  # type: ignore[arg-type]
        if row["source"] == count.source
        and day - timedelta(days=count.days) <= row["date"] < day
        and row[f"{entity}_id"] in members
    )


def slow_value(log: EventLog, count: Count, day: date, members: set[str]) -> float:
    of = slow_total(log, count, count.of, day, members)
    if count.per is None:
        return float(of)
    per = slow_total(log, count, count.per, day, members)
    return math.log((of + count.strength * count.prior) / (per + count.strength))


def count_of(log: EventLog, name: str) -> Count:
    count = log.spec[name].count
    assert count is not None
    return count


@pytest.mark.parametrize("name", ["user_taken_7d", "user_ad_rate_30d"])
def test_a_count_of_users_is_the_sum_of_their_days_before(tiny_log: EventLog, name: str) -> None:
    values = Counts(tiny_log, "user").raw(DAY)[name]
    expected = [
        slow_value(tiny_log, count_of(tiny_log, name), DAY, {u}) for u in tiny_log.users.ids
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert len(set(expected)) > 3


@pytest.mark.parametrize("name", ["item_taken_30d", "item_bought_3d", "item_ad_rate_7d"])
def test_a_count_of_items_is_the_sum_of_their_days_before(tiny_log: EventLog, name: str) -> None:
    values = Counts(tiny_log, "item").raw(DAY)[name]
    expected = [
        slow_value(tiny_log, count_of(tiny_log, name), DAY, {i}) for i in tiny_log.items.ids
    ]
    np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert len(set(expected)) > 3


def test_a_count_by_kind_is_shared_by_the_kind_and_absent_without_one(tiny_log: EventLog) -> None:
    items = pl.read_parquet(tiny_log.root / "items.parquet")
    values = Counts(tiny_log, "item").raw(DAY)["kind_shown_7d"]
    count = count_of(tiny_log, "kind_shown_7d")
    for kind, value in zip(items["kind"], values, strict=True):
        members = set(items.filter(pl.col("kind") == kind)["item_id"]) if kind else set()
        assert value == slow_value(tiny_log, count, DAY, members), kind


def test_encoded_features_are_the_raw_ones_through_the_encoder(tiny_log: EventLog) -> None:
    counts = Counts(tiny_log, "item")
    encoded, raw = counts.asof(DAY), counts.raw(DAY)
    features = tiny_log.spec.of("item", "numeric")
    assert encoded.shape == (len(tiny_log.items.ids), 2 * len(features))
    for i, feature in enumerate(features):
        pair = encoded[:, 2 * i : 2 * i + 2]
        if feature.count is None:
            assert not pair.any(), "only a request knows it"
        else:
            expected = tiny_log.encoder.numeric(feature, raw[feature.name].tolist(), feature.name)
            np.testing.assert_allclose(pair, expected, atol=1e-6)


def test_before_the_log_begins_there_is_nothing_to_count(tiny_log: EventLog) -> None:
    raw = Counts(tiny_log, "user").raw(date(2016, 12, 1))
    assert not raw["user_taken_7d"].any()
    count = count_of(tiny_log, "user_ad_rate_30d")
    np.testing.assert_allclose(raw["user_ad_rate_30d"], math.log(count.prior), rtol=1e-6)


def test_a_day_moves_the_span_by_one_day(tiny_log: EventLog) -> None:
    counts = Counts(tiny_log, "user")
    days = tiny_log.days("user").filter(pl.col("source") == "behaviour")
    daily = dict(days.group_by("date").agg(pl.col("positives").sum()).iter_rows())
    first, second = (counts.raw(DAY + timedelta(days=i))["user_taken_7d"].sum() for i in range(2))
    assert second - first == daily[DAY] - daily[DAY - timedelta(days=7)]


def test_the_order_of_the_daily_table_does_not_matter(tiny_data: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    path = tmp_path / "data" / "item_days.parquet"
    pl.read_parquet(path).sample(fraction=1.0, shuffle=True, seed=3).write_parquet(path)
    expected = Counts(EventLog(tiny_data), "item").asof(DAY)
    np.testing.assert_array_equal(Counts(EventLog(tmp_path / "data"), "item").asof(DAY), expected)
