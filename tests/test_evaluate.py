"""Evaluation: whole lists of later days, several models on the same rows, and their intervals."""

from __future__ import annotations

import json
import shutil
from datetime import date, timedelta
from typing import Any

import numpy as np
import polars as pl
import pytest
import tiny
from scipy.special import expit

from training.actr import FULL, Variant
from training.evaluate import Scored, report, score_days, table
from training.events import EventLog
from training.metrics import measure
from training.parallel import in_parallel
from training.workspace import Workspace

FIRST, LAST = tiny.ASOF, tiny.LAST
VARIANTS = {"one": FULL, "shifted": Variant(cpm=False)}


@pytest.fixture(scope="module")
def workspace(tiny_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """With a second variant: the same network, and a calibration that is off by one."""
    root = tmp_path_factory.mktemp("evaluate") / "workspace"
    workspace = tiny.copy_workspace(tiny_workspace, root)
    one, other = (root / "models" / VARIANTS[name].name(tiny.ASOF) for name in VARIANTS)
    shutil.copytree(one, other)
    facts = json.loads((one / "facts.json").read_text())
    facts["offset"] += 1.0
    (other / "facts.json").write_text(json.dumps(facts))
    return workspace


def scored_days(
    workspace: Workspace, first: date, last: date, per_day: int | None = None
) -> Scored:
    network = tiny.RECIPE.network
    return score_days(workspace, tiny.ASOF, network, VARIANTS, first, last, per_day)


@pytest.fixture(scope="module")
def scored(workspace: Workspace) -> Scored:
    return scored_days(workspace, FIRST, LAST)


@pytest.fixture(scope="module")
def entries(scored: Scored) -> list[dict[str, Any]]:
    return report(scored, "one")


def test_every_candidate_of_every_day_is_scored_once_in_order(
    scored: Scored, tiny_log: EventLog
) -> None:
    days = [FIRST + timedelta(days=i) for i in range((LAST - FIRST).days + 1)]
    rows = pl.concat([tiny_log.full_lists([day]) for day in days])
    assert scored.request_id.tolist() == rows["request_id"].to_list()
    assert scored.label.tolist() == rows["label"].to_list()
    assert scored.user_row.tolist() == tiny_log.users.rows(rows["user_id"].to_numpy()).tolist()
    assert all(len(logit) == len(rows) for logit in scored.logits.values())


def test_a_days_scores_do_not_depend_on_the_days_scored_with_it(
    scored: Scored, workspace: Workspace
) -> None:
    """Nor on the process that scores it: a single day needs no other one."""
    alone = scored_days(workspace, date(2017, 4, 8), date(2017, 4, 8))
    place = np.isin(scored.request_id, alone.request_id)
    assert place.sum() == len(alone.label)
    np.testing.assert_allclose(alone.logits["one"], scored.logits["one"][place], atol=1e-6)


def test_only_the_first_requests_of_a_day_are_scored_where_asked(workspace: Workspace) -> None:
    few = scored_days(workspace, FIRST, FIRST, per_day=2)
    assert len(set(few.request_id)) == 2
    assert len(few.label) == 2 * tiny.PAGE_SIZE


def test_the_calibration_is_part_of_the_score(scored: Scored) -> None:
    np.testing.assert_allclose(scored.logits["shifted"], scored.logits["one"] + 1.0, atol=1e-9)


def test_the_report_has_the_metrics_of_each_model(
    scored: Scored, entries: list[dict[str, Any]]
) -> None:
    assert [entry["model"] for entry in entries] == ["one", "shifted"]
    for entry in entries:
        logit = scored.logits[entry["model"]]
        expected = measure(logit, scored.label, scored.user_row)
        assert entry["gauc"] == expected.gauc
        assert entry["log_loss"] == expected.log_loss
        assert entry["pcoc"] == pytest.approx(expit(logit).sum() / scored.label.sum())
        low, high = entry["gauc_interval"]
        assert low < entry["gauc"] < high


def test_a_model_that_ranks_alike_has_no_lift_and_the_baseline_has_no_entry_of_it(
    entries: list[dict[str, Any]],
) -> None:
    assert entries[1]["gauc_lift_interval"] == (0.0, 0.0)
    assert "gauc_lift_interval" not in entries[0]
    assert entries[1]["pcoc"] > entries[0]["pcoc"]


def test_without_a_baseline_there_are_no_lifts(scored: Scored) -> None:
    assert all("gauc_lift_interval" not in entry for entry in report(scored, None))


def test_the_trained_model_is_better_than_chance(entries: list[dict[str, Any]]) -> None:
    assert entries[0]["gauc"] > 0.6
    assert 0.4 < entries[0]["pcoc"] < 2.5


def test_the_table_has_a_line_per_model_and_says_how_many_were_left_out(
    entries: list[dict[str, Any]],
) -> None:
    head, first, second, foot = table(entries).splitlines()
    assert "GAUC" in head
    assert f"{entries[0]['gauc']:.4f}" in first
    assert "[+0.0000, +0.0000]" in second
    assert f"{entries[0]['rows']:,} candidates" in foot
    assert f"{entries[0]['one_class_users']} users with one class" in foot


def test_jobs_in_parallel_give_results_in_the_order_of_the_jobs() -> None:
    assert in_parallel(pow, [(2, 3), (3, 2), (2, 0)]) == [8, 9, 1]
    assert in_parallel(pow, [(2, 5)]) == [32]
    assert in_parallel(pow, []) == []


@pytest.mark.parametrize("jobs", [[(1, 0)], [(4, 2), (1, 0), (5, 2)]])
def test_an_error_in_a_job_is_the_error_of_all(jobs: list[tuple[object, ...]]) -> None:
    with pytest.raises(ZeroDivisionError):
        in_parallel(divmod, jobs)
