"""Reference lines see what a row may know, correct for sampled negatives, and learn something."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import tiny
from scipy.special import expit
from sklearn.metrics import roc_auc_score
from test_synthetic import QUICK

from embeddings_store import Windows
from experiments.arms import Arm, Split
from experiments.lab import Lab
from experiments.references import (
    BOTH,
    POPULARITY,
    REFERENCES,
    REPEATS,
    TREES,
    TREES_AND_WINDOWS,
    Score,
    fit_reference,
)
from experiments.windows import item_rows
from training.datasets.synthetic import best_possible, write_synthetic
from training.events import EventLog, days_between
from training.examples import Builder, Examples
from training.metrics import measure
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]

WORLD = replace(QUICK, first=date(2017, 8, 15), ad_requests=0.5)
ASOF = date(2017, 11, 1)
TEST_DAYS = days_between(ASOF, WORLD.last)
LINES = REFERENCES[:-1]
"""Those that need no windows."""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    root = tmp_path_factory.mktemp("references")
    write_synthetic(root / "data", WORLD)
    return Workspace(root)


@pytest.fixture(scope="module")
def builder(world: Workspace) -> Builder:
    return Builder(world.log(), {}, WORLD.last + timedelta(days=1))


@pytest.fixture(scope="module")
def learned(builder: Builder) -> Examples:
    return builder.days("ad", ASOF - timedelta(days=30), ASOF - timedelta(days=1))


@pytest.fixture(scope="module")
def pages(builder: Builder) -> Examples:
    """Every candidate of the days that were learned from."""
    days = days_between(ASOF - timedelta(days=30), ASOF - timedelta(days=1))
    return builder.build(builder.log.full_lists(days))


@pytest.fixture(scope="module")
def test(builder: Builder) -> Examples:
    """Every candidate of the days after."""
    return builder.build(builder.log.full_lists(TEST_DAYS))


def fit_references(
    log: EventLog, rows: Examples, seed: int, names: Sequence[str] = LINES
) -> dict[str, Score]:
    return {name: fit_reference(name, log, rows, seed) for name in names}


@pytest.fixture(scope="module")
def references(world: Workspace, learned: Examples) -> dict[str, Score]:
    return fit_references(world.log(), learned, seed=0)


def clicks_by_item(log: EventLog, day: date) -> pl.DataFrame:
    """Clicks and impressions of ads by item row, in the 30 days before a day, of whole pages."""
    rows = log.full_lists(days_between(day - timedelta(days=30), day - timedelta(days=1)))
    item = log.items.rows(rows["item_id"].to_numpy())
    return rows.with_columns(item=item).group_by("item").agg(pl.len(), pl.col("label").sum())


@pytest.mark.parametrize("name", REFERENCES)
def test_a_reference_is_an_arm_that_scores_the_rows_of_networks(
    tiny_data: Path, tmp_path: Path, name: str
) -> None:
    lab = Lab(tiny_data, tmp_path / "lab")
    tpm = name == TREES_AND_WINDOWS
    arm = Arm(tiny.RECIPE, tpm, tiny.MONTHS[-1], len(tiny.MONTHS), "random", reference=name)
    split = Split(tiny.ASOF, tiny.ASOF, tiny.ASOF + timedelta(days=2), 3)
    logit = lab.logits(arm, split, 0)
    assert logit.dtype == np.float64
    assert logit.shape == lab.test(arm, split).label.shape
    assert np.isfinite(logit).all()


def test_nothing_of_the_scored_day_or_later_is_learned_from(
    tiny_data: Path, tmp_path: Path
) -> None:
    """Scores are what they are where the log is another one from that day on."""
    altered = tiny.alter_from(tiny_data, tmp_path / "altered", tiny.ASOF, remove=False)
    split = Split(tiny.ASOF, tiny.ASOF, tiny.ASOF, None)
    asked = Lab(tiny_data, tmp_path / "asked").test(Arm(tiny.RECIPE), split)
    for name in LINES:
        logits = []
        for data in (tiny_data, altered):
            lab = Lab(data, tmp_path / data.parent.name / data.name)
            rows = lab._ads(Arm(tiny.RECIPE), tiny.ASOF, 0)
            logits.append(fit_reference(name, EventLog(tiny_data), rows, 0)(asked))
        np.testing.assert_array_equal(*logits, err_msg=name)


def test_another_reference_is_refused_in_one_line(world: Workspace, learned: Examples) -> None:
    with pytest.raises(ValueError, match=r"^reference 'forest': must be one of item popularity, "):
        fit_reference("forest", world.log(), learned, 0)


def test_popularity_is_the_smoothed_rate_of_the_thirty_days_before(
    world: Workspace, references: dict[str, Score], test: Examples
) -> None:
    log = world.log()
    item = item_rows(test, log)
    expected = np.empty(len(test))
    for day in TEST_DAYS:
        counted = clicks_by_item(log, day)
        shown, taken = np.zeros(len(log.items.ids)), np.zeros(len(log.items.ids))
        shown[counted["item"]], taken[counted["item"]] = counted["len"], counted["label"]
        # An item that was never shown has the rate of all.
        rate = taken.sum() / shown.sum()
        here = test.day == np.datetime64(day)
        expected[here] = np.log((taken + 0.4) / (shown + 0.4 / rate))[item[here]]
    found = references[POPULARITY](test)
    assert slope_of(found, expected) > 0


def test_repeats_are_how_often_the_user_took_the_item(
    world: Workspace, references: dict[str, Score], test: Examples
) -> None:
    log = world.log()
    behaviour = log.behaviour(WORLD.last + timedelta(days=1))
    user, item = (
        rows.rows(behaviour[name].to_numpy())
        for rows, name in ((log.users, "user_id"), (log.items, "item_id"))
    )
    taken = np.zeros((len(log.users.ids), len(log.items.ids)))
    expected = np.empty(len(test))
    for day in TEST_DAYS:
        before = (behaviour["date"] < day).to_numpy()
        taken[:] = 0
        np.add.at(taken, (user[before], item[before]), 1)
        here = test.day == np.datetime64(day)
        expected[here] = np.log1p(taken[test.user_row[here], item_rows(test, log)[here]])
    assert len(np.unique(expected)) > 3
    assert slope_of(references[REPEATS](test), expected) > 0


def slope_of(found: Floats, fact: Floats) -> float:
    """Of a line through (fact, found), on which all points have to lie."""
    slope, start = np.polyfit(fact, found, 1)
    np.testing.assert_allclose(found, slope * fact + start, atol=1e-5)
    return float(slope)


def test_both_facts_together_are_one_line_in_each(
    references: dict[str, Score], test: Examples
) -> None:
    facts = [references[name](test) for name in (POPULARITY, REPEATS)]
    columns = np.stack([*facts, np.ones(len(test))], axis=1)
    found = references[BOTH](test)
    weight, *_ = np.linalg.lstsq(columns, found, rcond=None)
    np.testing.assert_allclose(columns @ weight, found, atol=1e-5)
    assert (weight[:2] > 0).all()


@pytest.mark.parametrize("name", [POPULARITY, TREES])
def test_sampled_negatives_are_corrected_for(
    world: Workspace, references: dict[str, Score], pages: Examples, name: str
) -> None:
    """Of what is popular one negative in eight is kept, of the rest all: only what knows that has
    the right number of clicks in both halves."""
    popularity = references[POPULARITY](pages)
    popular = popularity > np.median(popularity)
    kept = np.random.default_rng(0).random(len(pages)) < np.where(popular, 1 / 8, 1.0)
    weight = np.where(popular, 8.0, 1.0).astype(np.float32)
    sampled = replace(pages, weight=weight).take(np.flatnonzero(kept | (pages.label > 0)))
    logit = fit_reference(name, world.log(), sampled, seed=0)(pages)
    for half in (popular, ~popular):
        assert expit(logit[half]).sum() / pages.label[half].sum() == pytest.approx(1.0, abs=0.35)


def test_the_last_days_of_training_set_the_offset(
    references: dict[str, Score], learned: Examples
) -> None:
    recent = learned.since(ASOF - timedelta(days=7))
    times = np.where(recent.label > 0, 1.0, recent.weight)
    for name, score in references.items():
        predicted = (expit(score(recent)) * times).sum()
        assert predicted == pytest.approx(recent.label.sum(), rel=1e-4), name


def test_trees_stop_where_there_is_nothing_to_learn(world: Workspace, learned: Examples) -> None:
    rng = np.random.default_rng(0)
    noise = replace(learned, label=(rng.random(len(learned)) < 0.1).astype(np.float32))
    noise = replace(noise, weight=np.ones_like(noise.weight))
    logit = fit_reference(TREES, world.log(), noise, seed=0)(noise)
    assert logit.std() < 0.3


def test_the_same_seed_gives_the_same_scores_and_another_seed_other_trees(
    world: Workspace, learned: Examples, references: dict[str, Score], test: Examples
) -> None:
    again, other = (fit_references(world.log(), learned, seed) for seed in (0, 1))
    for name in LINES:
        np.testing.assert_array_equal(again[name](test), references[name](test))
    assert not np.array_equal(other[TREES](test), references[TREES](test))


@pytest.mark.parametrize("part", ["item_num", "match", "context_num", "context_cat", "user_num"])
def test_trees_see_every_kind_of_number(world: Workspace, learned: Examples, part: str) -> None:
    """Clicks that only one column explains are found, whichever part of the row has it."""
    rng = np.random.default_rng(0)
    of_user = part == "user_num"
    values = np.array(getattr(learned.sides if of_user else learned, part))
    values[:, 0] = rng.integers(0, 10, len(values))
    clicked = values[learned.side, 0] if of_user else values[:, 0]
    rows = replace(
        learned,
        label=(clicked > 7).astype(np.float32),
        **{"sides": replace(learned.sides, user_num=values)} if of_user else {part: values},
    )
    found = fit_reference(TREES, world.log(), rows, seed=0)(rows)
    assert roc_auc_score(rows.label, found) > 0.99


def test_trees_see_the_product_of_the_windows_and_their_biases(
    world: Workspace, learned: Examples
) -> None:
    """Clicks that only TPM's logit explains are found with windows, and not without them."""
    rng = np.random.default_rng(0)
    users, items = len(learned.sides.user_cat), len(learned.item_windows.present)
    user, item = (rng.normal(size=(num, 3, 5)).astype(np.float32) for num in (users, items))
    sides = replace(
        learned.sides, user_window=user, user_window_present=np.ones((users, 3), np.bool_)
    )
    logit = np.einsum("nd,nd->n", user[learned.side, 0, :4], item[learned.item_window_row, 0, :4])
    logit += user[learned.side, 0, 4] + item[learned.item_window_row, 0, 4]
    rows = replace(
        learned,
        sides=sides,
        item_windows=Windows(item, np.ones((items, 3), np.bool_)),
        label=(logit > np.quantile(logit, 0.8)).astype(np.float32),
        weight=np.ones_like(learned.weight),
    )
    found = fit_references(world.log(), rows, 0, (TREES, TREES_AND_WINDOWS))
    auc = {name: roc_auc_score(rows.label, found[name](rows)) for name in found}
    assert auc[TREES_AND_WINDOWS] > 0.97
    assert auc[TREES] < auc[TREES_AND_WINDOWS] - 0.05


def test_lines_rank_as_they_know_more_and_none_beats_what_is_possible(
    world: Workspace, references: dict[str, Score], test: Examples
) -> None:
    best = best_possible(world.data, ASOF, WORLD.last)
    lines = {name: measure(references[name](test), test.label, test.user_row) for name in LINES}
    assert lines[TREES].rows == best.rows
    for name in LINES:
        assert 0.55 < lines[name].auc < best.auc + 0.01, name
        assert lines[name].log_loss > best.log_loss - 0.001, name
    assert lines[TREES].gauc > lines[BOTH].gauc
    assert lines[TREES].log_loss < lines[BOTH].log_loss


def test_a_week_of_rows_is_too_few(world: Workspace, learned: Examples) -> None:
    with pytest.raises(ValueError, match=r"^rows are of 7 days, must be of more than 7$"):
        fit_reference(TREES, world.log(), learned.since(ASOF - timedelta(days=7)), seed=0)
