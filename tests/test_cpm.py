"""CPM: which natural rows it learns from, and what it leaves behind."""

from __future__ import annotations

from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import polars as pl
import pytest
import tiny
import torch

from training.actr import train_actr
from training.config import CpmConfig
from training.cpm import cpm_name, cpm_rows, earlier_actr, train_cpm
from training.events import EventLog
from training.workspace import Workspace, WorkspaceError

FIRST, LAST = date(2017, 3, 1), date(2017, 3, 31)


def drawn(log: EventLog, seed: int = 0, **changes: float) -> pl.DataFrame:
    return cpm_rows(log, FIRST, LAST, replace(CpmConfig(), **changes), seed)  # type: ignore[arg-type]


def positives(frame: pl.DataFrame) -> pl.DataFrame:
    return frame.filter(pl.col("label") == 1)


def test_all_positives_are_kept_once(tiny_log: EventLog) -> None:
    rows = drawn(tiny_log, near_negatives=2.0, catalogue_negatives=3)
    expected = positives(tiny_log.rows("natural", FIRST, LAST))
    assert positives(rows).equals(expected)


@pytest.mark.parametrize("num", [0, 1, 5])
def test_catalogue_negatives_are_as_many_per_positive_as_asked(
    tiny_log: EventLog, num: int
) -> None:
    rows = drawn(tiny_log, near_negatives=0.0, catalogue_negatives=num)
    assert len(rows) == (1 + num) * len(positives(rows))


@pytest.mark.parametrize("per_positive", [0.5, 1.0, 2.0])
def test_near_negatives_are_about_as_many_per_positive_as_asked(
    tiny_log: EventLog, per_positive: float
) -> None:
    rows = drawn(tiny_log, near_negatives=per_positive, catalogue_negatives=0)
    num = len(positives(rows))
    assert len(rows) - num == pytest.approx(per_positive * num, rel=0.1)
    logged = tiny_log.rows("natural", FIRST, LAST).filter(pl.col("label") == 0)
    near = rows.filter(pl.col("label") == 0)
    assert len(near.join(logged, on=["request_id", "item_id"])) == len(near)


def test_more_near_negatives_than_there_are_is_all_of_them(tiny_log: EventLog) -> None:
    rows = drawn(tiny_log, near_negatives=99.0, catalogue_negatives=0)
    assert len(rows) == len(tiny_log.rows("natural", FIRST, LAST))


def test_catalogue_negatives_are_copies_of_a_positive_with_an_item_of_the_whole_catalogue(
    tiny_log: EventLog,
) -> None:
    rows = drawn(tiny_log, near_negatives=0.0, catalogue_negatives=4)
    far = rows.filter(pl.col("label") == 0)
    own = [c for c in rows.columns if c not in ("item_id", "label")]
    kept = positives(rows).select(own).unique()
    assert len(far.join(kept, on=own, nulls_equal=True)) == len(far)
    assert set(far["item_id"]) == set(tiny_log.items.ids.tolist())


def test_rows_are_in_order_of_date(tiny_log: EventLog) -> None:
    dates = drawn(tiny_log)["date"]
    assert dates.is_sorted()
    assert (dates.min(), dates.max()) == (FIRST, LAST)


def test_the_same_seed_draws_the_same_rows_and_another_seed_others(tiny_log: EventLog) -> None:
    assert drawn(tiny_log, 3).equals(drawn(tiny_log, 3))
    assert not drawn(tiny_log, 3).equals(drawn(tiny_log, 4))


def test_cpm_keeps_which_days_it_saw_and_they_end_before_its_day(
    tiny_workspace: Workspace,
) -> None:
    facts = tiny_workspace.facts(cpm_name(tiny.ASOF), "")
    before = tiny.ASOF - timedelta(days=1)
    first = tiny.ASOF - timedelta(days=tiny.RECIPE.cpm.days)
    assert (facts["from"], facts["to"]) == (str(first), str(before))


def test_cpm_without_tpm_has_a_name_of_its_own_and_needs_no_snapshot(
    tiny_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("without")
    (root / "data").symlink_to(tiny_workspace.data.resolve())
    workspace, recipe = Workspace(root), tiny.RECIPE
    with pytest.raises(WorkspaceError, match="ecdctr train tpm --through"):
        train_cpm(workspace, tiny.ASOF, recipe.network, recipe.cpm, seed=0)
    name = train_cpm(workspace, tiny.ASOF, recipe.network, recipe.cpm, seed=0, with_tpm=False)
    assert name == cpm_name(tiny.ASOF, with_tpm=False) != cpm_name(tiny.ASOF)
    assert workspace.has_model(name)
    assert not workspace.has_model(cpm_name(tiny.ASOF))


def test_cpm_starts_from_the_newest_actr_that_has_not_seen_the_month_before(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")
    config = replace(tiny.RECIPE.cpm, start_days=3)
    later = tiny.ASOF + timedelta(days=3)
    for day in (tiny.ASOF, tiny.ASOF + timedelta(days=2)):
        assert earlier_actr(workspace, day, config) is None
    assert earlier_actr(workspace, later, config) == f"actr-{tiny.ASOF}"
    assert earlier_actr(workspace, later + timedelta(days=9), config) == f"actr-{tiny.ASOF}"


def test_what_an_earlier_actr_knew_is_what_cpm_starts_from(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")
    still = replace(tiny.RECIPE.cpm.fit, learning_rate=0.0, table_learning_rate=0.0)
    config = replace(tiny.RECIPE.cpm, start_days=0, fit=still)
    name = train_cpm(workspace, tiny.ASOF, tiny.RECIPE.network, config, seed=1)
    assert workspace.facts(name, "")["start"] == f"actr-{tiny.ASOF}"
    cpm, actr = (
        torch.load(workspace.root / "models" / n / "model.pt", weights_only=True)
        for n in (name, f"actr-{tiny.ASOF}")
    )
    for layer in ("first.item.weight", "second.weight", "wide.item.weight"):
        assert torch.equal(cpm[layer], actr[layer])


def test_an_actr_after_a_cpm_that_had_a_start_sees_its_ads_fewer_times(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")
    recipe = tiny.RECIPE
    train_cpm(workspace, tiny.ASOF, recipe.network, replace(recipe.cpm, start_days=0), seed=0)
    warm = replace(recipe.actr, warm_passes=2)
    losses = [
        workspace.facts(train_actr(workspace, tiny.ASOF, recipe.network, config, 0), "")["loss"]
        for config in (warm, replace(warm, fit=replace(warm.fit, passes=2), warm_passes=1))
    ]
    once = replace(warm, warm_passes=1)
    name = train_actr(workspace, tiny.ASOF, recipe.network, once, 0)
    assert workspace.facts(name, "")["loss"] == losses[1]
    assert losses[0] != losses[1]
