"""The synthetic world does what its config says, and what is known of it holds."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.actr import FULL, train_actr
from training.checks import check_inputs
from training.cpm import train_cpm
from training.datasets.synthetic import SyntheticConfig, best_possible, write_synthetic
from training.evaluate import score_days
from training.events import EventLog, days_between
from training.tpm import train_through
from training.workspace import Workspace

QUICK = SyntheticConfig(
    users=150,
    items=120,
    first=date(2017, 7, 1),
    last=date(2017, 11, 7),
    page_size=12,
    natural_requests=0.5,
    ad_requests=0.4,
    ad_rate=0.05,
    cold_days=20,
)
SMALL = replace(QUICK, users=60, items=40, first=date(2017, 10, 1), cold_days=10)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("synthetic") / "data"
    write_synthetic(target, QUICK)
    return target


def truth(root: Path, domain: str = "ad") -> pl.DataFrame:
    return pl.read_parquet(
        root / "truth" / f"domain={domain}" / "*" / "*.parquet", hive_partitioning=False
    )


def whole_pages(root: Path, config: SyntheticConfig = QUICK) -> pl.DataFrame:
    """Every candidate of ads, with its label and its true probability."""
    rows = EventLog(root).full_lists(days_between(config.first, config.last))
    return rows.join(truth(root), on=["request_id", "item_id"])


def made(tmp_path: Path, **changes: Any) -> Path:
    write_synthetic(tmp_path / "data", replace(SMALL, **changes))
    return tmp_path / "data"


def test_the_log_passes_the_input_checks(root: Path) -> None:
    for domain in ("natural", "ad"):
        assert check_inputs(root, domain, QUICK.first, QUICK.last) == []  # type: ignore[arg-type]


def test_clicks_are_as_many_as_the_true_probabilities_say(root: Path) -> None:
    pages = whole_pages(root)
    for kept in (pl.lit(True), pl.col("position") <= 3, pl.col("true_probability") > 0.1):
        part = pages.filter(kept)
        chance = part["true_probability"].to_numpy()
        deviation = np.sqrt((chance * (1 - chance)).sum())
        assert abs(part["label"].sum() - chance.sum()) < 4 * deviation


def test_the_rate_of_clicks_is_about_what_was_asked(root: Path) -> None:
    assert truth(root)["true_probability"].mean() == pytest.approx(QUICK.ad_rate, rel=0.35)
    natural = truth(root, "natural")["true_probability"]
    assert natural.mean() == pytest.approx(QUICK.natural_rate, rel=0.35)


def test_the_same_config_gives_the_same_log_and_another_seed_another(tmp_path: Path) -> None:
    first, again, other = (
        EventLog(made(tmp_path / name, seed=seed)).rows("ad", SMALL.last, SMALL.last)
        for name, seed in (("a", 0), ("b", 0), ("c", 1))
    )
    assert first.equals(again)
    assert not first.equals(other)


def test_sampled_negatives_stand_for_those_of_their_page(root: Path) -> None:
    logged = EventLog(root).rows("ad", QUICK.first, QUICK.last)
    negatives = logged.filter(pl.col("label") == 0)
    stood_for = negatives.group_by("request_id").agg(pl.col("sample_weight").sum())
    pages = whole_pages(root).filter(pl.col("label") == 0).group_by("request_id").len()
    both = stood_for.join(pages, on="request_id")
    assert len(both) == len(pages)
    np.testing.assert_allclose(both["sample_weight"], both["len"], rtol=1e-5)


def correlation_of_items(root: Path, config: SyntheticConfig) -> float:
    """Between an item's mean probability in one domain and in the other."""
    means = [
        truth(root, domain).group_by("item_id").agg(pl.col("true_probability").log().mean())
        for domain in ("natural", "ad")
    ]
    both = means[0].join(means[1], on="item_id", suffix="_ad")
    return float(np.corrcoef(both["true_probability"], both["true_probability_ad"])[0, 1])


def test_domains_are_as_alike_as_was_asked(tmp_path: Path) -> None:
    found = [
        correlation_of_items(made(tmp_path / str(c), correlation=c), SMALL)
        for c in (1.0, 0.0, -1.0)
    ]
    assert found[0] > 0.8
    assert abs(found[1]) < 0.5
    assert found[2] < -0.3


def test_tastes_drift_by_the_month_and_stand_still_without_drift(tmp_path: Path) -> None:
    def alike(drift: float) -> float:
        config = {"drift": drift, "first": date(2017, 7, 1), "position_bias": 0.0}
        root = made(tmp_path / str(drift), cold_share=0.0, **config)
        rows = truth(root).join(pl.read_parquet(root / "requests.parquet"), on="request_id")
        by = rows.group_by("user_id", "item_id", pl.col("timestamp").dt.month().alias("month")).agg(
            pl.col("true_probability").log().mean().alias("score")
        )
        first, last = (by.filter(pl.col("month") == m) for m in (7, 11))
        both = first.join(last, on=["user_id", "item_id"], suffix="_later")
        return float(np.corrcoef(both["score"], both["score_later"])[0, 1])

    assert alike(0.0) > 0.9
    assert alike(0.8) < alike(0.0) - 0.2


def test_what_kinds_explain_they_explain_after_months_of_drift_too(tmp_path: Path) -> None:
    """Wholly explained: users of one segment feel the same about an item, at the same hour."""
    root = made(tmp_path, explained=1.0, drift=0.9, position_bias=0.0, first=date(2017, 7, 1))
    last = pl.read_parquet(root / "requests.parquet").filter(pl.col("date") >= date(2017, 11, 1))
    rows = (
        truth(root)
        .join(last, on="request_id")
        .join(pl.read_parquet(root / "users.parquet"), on="user_id")
    )
    by = rows.group_by("segment", "item_id", "hour").agg(
        pl.col("user_id").n_unique(),
        spread=pl.col("true_probability").max() / pl.col("true_probability").min(),
    )
    shared = by.filter(pl.col("user_id") > 1)
    assert len(shared) > 20
    assert shared["spread"].max() == pytest.approx(1.0, abs=1e-9)


def test_the_higher_on_the_page_the_more_clicks(root: Path) -> None:
    by = whole_pages(root).group_by("position").agg(pl.col("true_probability").mean())
    means = by.sort("position")["true_probability"].to_numpy()
    assert np.corrcoef(np.arange(len(means)), means)[0, 1] < -0.8
    expected = QUICK.page_size**-QUICK.position_bias
    assert means[-1] / means[0] == pytest.approx(expected, rel=0.3)


def test_cold_users_and_items_come_late_and_some_items_only_in_ads(root: Path) -> None:
    log = EventLog(root)
    cold_from = QUICK.last - timedelta(days=QUICK.cold_days - 1)
    before = log.rows("ad", QUICK.first, cold_from - timedelta(days=1))
    after = log.rows("ad", cold_from, QUICK.last)
    for name, num in (("user_id", QUICK.users), ("item_id", QUICK.items)):
        late = set(after[name]) - set(before[name])
        assert 0.03 * num < len(late) < 0.2 * num
    natural = set(log.rows("natural", QUICK.first, QUICK.last)["item_id"])
    assert 0 < len(set(after["item_id"]) - natural) < 0.15 * QUICK.items


def test_nothing_is_left_of_a_world_that_could_not_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.datasets.synthetic._Writer._count", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"correlation": 1.5}, "correlation is 1.5, must be within -1 and 1"),
        ({"users": 3}, "users is 3, must be within 10 and 1e\\+06"),
        ({"last": date(2016, 1, 1)}, "last is 2016-01-01, must not be before first, 2017-10-01"),
        ({"page_size": 30}, "page_size is 30, must be at most 20, half of items"),
        ({"drift": float("nan")}, "drift is nan, must be within 0 and 1"),
    ],
)
def test_a_world_that_cannot_be_is_refused_in_one_line(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        replace(SMALL, **changes)


def test_a_rate_that_positions_do_not_allow_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"ad_rate is 0\.5, must be below"):
        made(tmp_path, position_bias=3.0, natural_rate=0.01, ad_rate=0.5)


def test_a_page_that_early_items_do_not_fill_is_refused(tmp_path: Path) -> None:
    """It would be filled with items that are not there yet."""
    with pytest.raises(ValueError, match=r"^page_size is 20, must be at most \d+: so many items"):
        made(tmp_path, page_size=20, cold_share=0.5, ads_only_share=0.5)
    assert list(tmp_path.iterdir()) == []


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    users=st.integers(10, 40),
    items=st.integers(60, 90),
    page_size=st.integers(2, 10),
    correlation=st.floats(-1, 1),
    cold_share=st.floats(0, 0.5),
    seed=st.integers(0, 99),
)
def test_any_small_world_gives_a_log_that_hangs_together(
    tmp_path_factory: pytest.TempPathFactory, **changes: Any
) -> None:
    config = replace(
        SMALL, first=date(2017, 11, 1), natural_requests=0.9, ad_requests=0.9, **changes
    )
    target = tmp_path_factory.mktemp("any") / "data"
    summary = write_synthetic(target, config)
    log, days = EventLog(target), days_between(config.first, config.last)
    for domain in ("natural", "ad"):
        rows = log.rows(domain, config.first, config.last)  # type: ignore[arg-type]
        log.users.rows(rows["user_id"].to_numpy())
        log.items.rows(rows["item_id"].to_numpy())
    pages = log.full_lists(days)
    assert len(pages) == summary.ad_impressions
    assert pages["label"].sum() == summary.ad_positives
    distinct = pages.group_by("request_id").agg(pl.col("item_id").n_unique())["item_id"]
    assert distinct.unique().to_list() == [config.page_size]


def test_the_full_method_learns_and_does_not_beat_what_is_possible(
    root: Path, tmp_path: Path
) -> None:
    asof, recipe = date(2017, 11, 1), tiny.RECIPE
    (tmp_path / "data").symlink_to(root)
    workspace = Workspace(tmp_path)
    train_through(workspace, "2017-10", 4, recipe.tpm, seed=0)
    train_cpm(workspace, asof, recipe.network, recipe.cpm, seed=0)
    actr = replace(recipe.actr, days=30, fit=replace(recipe.actr.fit, passes=3))
    train_actr(workspace, asof, recipe.network, actr, seed=0)
    scored = score_days(workspace, asof, recipe.network, {"full": FULL}, asof, QUICK.last, None)
    found, best = scored.metrics("full"), best_possible(root, asof, QUICK.last)
    assert (found.rows, found.positives) == (best.rows, best.positives)
    assert 0.55 < found.auc < best.auc + 0.01
    assert best.log_loss < found.log_loss + 0.001
    assert best.pcoc == pytest.approx(1.0, abs=0.25)
