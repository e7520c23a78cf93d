"""The event log: what is read of it, and what it says when something is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny

from bundle.ids import hash_ids
from bundle.spec import read_spec
from training.events import DataError, EventLog, days_between
from training.vocabulary import fit_vocabulary

DAY = date(2017, 3, 10)


@pytest.fixture
def copied(tiny_data: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_data, tmp_path / "data"))


def test_rows_are_those_of_all_days_from_first_to_last(tiny_log: EventLog) -> None:
    days = days_between(DAY, date(2017, 3, 12))
    rows = tiny_log.rows("natural", days[0], days[-1])
    assert rows["date"].unique().sort().to_list() == days
    parts = [tiny_log.rows("natural", day, day) for day in days]
    assert rows.equals(pl.concat(parts))
    assert set(rows["label"].unique()) == {0, 1}


def test_the_two_domains_are_apart(tiny_log: EventLog) -> None:
    ad, natural = (tiny_log.rows(d, DAY, DAY) for d in ("ad", "natural"))  # type: ignore[arg-type]
    assert set(ad["request_id"]) & set(natural["request_id"]) == set()
    assert natural["slot"].null_count() == len(natural)


def test_behaviour_ends_before_the_day(tiny_log: EventLog) -> None:
    found = tiny_log.behaviour(DAY)
    assert found["date"].max() == date(2017, 3, 9)
    assert found["date"].min() == tiny.FIRST
    assert len(tiny_log.behaviour(date(2017, 3, 11))) > len(found)


def test_full_lists_hold_every_candidate_of_every_request_once(tiny_log: EventLog) -> None:
    rows = tiny_log.full_lists([DAY])
    requests = pl.read_parquet(tiny_log.root / "requests.parquet").filter(pl.col("date") == DAY)
    assert len(rows) == len(requests) * tiny.PAGE_SIZE
    assert rows.select("request_id", "item_id").is_duplicated().sum() == 0
    assert rows["sample_weight"].unique().to_list() == [1.0]
    assert set(tiny_log.rows("ad", DAY, DAY).columns) == set(rows.columns)


def test_full_lists_have_the_labels_of_the_log_and_counts_of_the_day(tiny_log: EventLog) -> None:
    rows = tiny_log.full_lists([DAY])
    pair = ["request_id", "item_id"]
    taken = tiny_log.rows("ad", DAY, DAY).filter(pl.col("label") == 1)
    found = rows.filter(pl.col("label") == 1)
    assert found.select(pair).sort(pair).equals(taken.select(pair).sort(pair))
    counts = tiny_log.days("item").filter((pl.col("date") == DAY) & (pl.col("source") == "ad"))
    by_item = rows.group_by("item_id").agg(impressions=pl.len(), positives=pl.col("label").sum())
    joined = counts.join(by_item, on="item_id", how="full", suffix="_of_lists")
    assert joined["impressions"].equals(joined["impressions_of_lists"].cast(pl.Int64))
    assert joined["positives"].equals(joined["positives_of_lists"].cast(pl.Int64))


def test_the_first_requests_of_a_day_are_part_of_more_of_them(tiny_log: EventLog) -> None:
    days = [DAY, date(2017, 3, 11)]
    few, more = (tiny_log.full_lists(days, per_day) for per_day in (2, 4))
    counts = few.group_by("date").agg(pl.col("request_id").n_unique())
    assert dict(counts.iter_rows()) == dict.fromkeys(days, 2)
    assert set(few["request_id"]) < set(more["request_id"])
    order = [(r * 2654435761) % 2**32 for r in tiny_log.full_lists([DAY])["request_id"].unique()]
    first = few.filter(pl.col("date") == DAY)["request_id"].unique()
    assert sorted((r * 2654435761) % 2**32 for r in first) == sorted(order)[:2]


def test_entities_are_encoded_by_the_one_encoder(tiny_log: EventLog) -> None:
    items, frame = tiny_log.items, pl.read_parquet(tiny_log.root / "items.parquet")
    assert items.keys.tolist() == hash_ids(frame["item_id"].to_list()).tolist()
    names = [f.name for f in tiny_log.spec.of("item", "categorical")]
    kind = items.categorical[:, names.index("kind")]
    known = tiny_log.vocabulary["kind"]
    assert [known[i - 1] if i else None for i in kind] == frame["kind"].to_list()
    # What only requests know is missing in the table.
    assert set(items.categorical[:, names.index("slot")].tolist()) == {0}


def test_rows_of_entities_are_found_whatever_the_order(tiny_log: EventLog) -> None:
    shuffled = np.random.default_rng(0).permutation(tiny_log.users.ids)
    rows = tiny_log.users.rows(shuffled)
    assert tiny_log.users.ids[rows].tolist() == shuffled.tolist()


def test_an_id_that_is_in_no_table_is_named(tiny_log: EventLog) -> None:
    with pytest.raises(DataError, match="'nobody'"):
        tiny_log.users.rows(np.array(["u05", "nobody"], object))


@pytest.mark.parametrize(
    ("read", "words"),
    [
        (lambda log: log.rows("ad", date(2017, 4, 9), date(2017, 4, 11)), "2017-04-11: no part"),
        (lambda log: log.rows("natural", DAY, date(2017, 3, 9)), "first is after the last"),
        (lambda log: log.behaviour(tiny.FIRST), "nothing before 2016-12-01"),
    ],
)
def test_days_that_are_not_there_are_an_error_that_names_them(
    tiny_log: EventLog, read: Callable[[EventLog], object], words: str
) -> None:
    with pytest.raises(DataError, match=words):
        read(tiny_log)


def test_a_day_without_behaviour_is_no_error_but_one_without_events_is(copied: Path) -> None:
    shutil.rmtree(copied / "behaviour" / f"date={DAY}")
    shutil.rmtree(copied / "events" / "domain=ad" / f"date={DAY}")
    log = EventLog(copied)
    assert DAY not in set(log.behaviour(date(2017, 3, 12))["date"])
    with pytest.raises(DataError, match=str(DAY)):
        log.rows("ad", date(2017, 3, 9), date(2017, 3, 12))


def test_a_folder_without_a_data_set_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="ecdctr import"):
        EventLog(tmp_path)


def test_a_vocabulary_is_only_ever_appended_to(tiny_data: Path) -> None:
    spec = read_spec(tiny_data / "features.toml")
    first = fit_vocabulary(spec, [pl.DataFrame({"kind": ["soap", "bread", None, "soap"]})], {})
    assert first == {"kind": ["bread", "soap"]}
    second = fit_vocabulary(spec, [pl.DataFrame({"kind": ["apple", "soap", "milk"]})], first)
    assert second == {"kind": ["bread", "soap", "apple", "milk"]}
    assert first == {"kind": ["bread", "soap"]}
    assert fit_vocabulary(spec, [pl.DataFrame({"kind": ["bread"]})], second) == second
