"""Experiments on the tiny data set: they find what they should, once, and say how."""

from __future__ import annotations

import re
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny

from experiments.arms import Arm, Split, key
from experiments.catalogue import EXPERIMENTS, FULL, Cell, Experiment, Size
from experiments.features import SHORT, data_with
from experiments.lab import Lab
from experiments.references import REFERENCES
from experiments.report import markdown, page
from experiments.results import Entry, Result, Rows, entry
from experiments.run import run_experiment
from experiments.windows import attach, hide, item_rows, load_windows
from training.datasets.synthetic import SyntheticConfig
from training.events import EventLog
from training.examples import builder_for
from training.workspace import Workspace

SPLIT = Split(tiny.ASOF, tiny.ASOF, tiny.ASOF + timedelta(days=2), 40)
BASE = Arm(tiny.RECIPE, last_snapshot=tiny.MONTHS[-1], snapshots=len(tiny.MONTHS))
ALONE = replace(BASE, tpm=False, start="random")
SIZE = Size(BASE, SPLIT, seeds=(0, 1), few_days=5, links=1, log_months=4, cycles=1)


@pytest.fixture(scope="module")
def lab(tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    return Lab(tiny_data, tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def result(lab: Lab) -> Result:
    return run_experiment(EXPERIMENTS["tiers"](SIZE), SIZE, lab.data, lab.root, "ecdctr experiment")


def test_a_result_has_every_arm_at_every_point_with_intervals_and_seeds(result: Result) -> None:
    tiers = ("A-CTR alone", "CPM + A-CTR", "TPM + A-CTR", "TPM + CPM + A-CTR")
    lines = ("alone, natural and ads mixed", *REFERENCES)
    assert [(e.series, e.x) for e in result.entries] == [
        (series, f"{days} days{memory}")
        for memory in ("", ", counts of 30")
        for days in (14, 5)
        for series in (*tiers, *(lines if (memory, days) == ("", 14) else ()))
    ]
    for found in result.entries:
        assert len(found.seeds) == 2
        assert found.gauc == pytest.approx(np.mean([s["gauc"] for s in found.seeds]))
        assert found.gauc_interval[0] < found.gauc < found.gauc_interval[1]
        assert (found.gauc_lift is None) == (found.series == "A-CTR alone")


def test_a_lift_is_the_difference_to_the_baseline_at_the_same_point(result: Result) -> None:
    by = {(e.series, e.x): e for e in result.entries}
    for (series, x), found in by.items():
        if series != "A-CTR alone":
            expected = found.gauc - by["A-CTR alone", x].gauc
            assert found.gauc_lift == pytest.approx(expected)
            assert found.log_loss_lift == pytest.approx(
                found.log_loss - by["A-CTR alone", x].log_loss
            )


def test_what_has_been_scored_is_not_trained_again(
    lab: Lab, result: Result, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object) -> float:
        raise AssertionError("trained again")

    monkeypatch.setattr("experiments.lab.fit", never)
    again = run_experiment(EXPERIMENTS["tiers"](SIZE), SIZE, lab.data, lab.root, result.command)
    assert again.entries == result.entries


def test_a_result_is_read_as_it_was_written(result: Result, tmp_path: Path) -> None:
    result.write(tmp_path / "results" / "tiers.json")
    assert Result.read(tmp_path / "results" / "tiers.json").entries[0].gauc_interval == list(
        result.entries[0].gauc_interval
    )
    assert markdown(Result.read(tmp_path / "results" / "tiers.json")) == markdown(result)


def test_the_report_is_one_page_with_pictures_that_needs_nothing_else(result: Result) -> None:
    text = page([result])
    assert text.count("<svg") == 1
    assert f"{result.entries[0].gauc:.4f}" in text
    outside = re.findall(r"""(?:src|href)=["'](?!#)([^"']+)""", text)
    assert outside == []
    assert page([result]) == text


def test_hidden_windows_change_scores_and_not_the_training(lab: Lab) -> None:
    whole = lab.logits(BASE, SPLIT, 0)
    found = [lab.logits(replace(BASE, hides=h), SPLIT, 0) for h in (("user",), ("item",))]
    for logits in found:
        assert logits.shape == whole.shape
        assert not np.allclose(logits, whole)
    assert not np.allclose(*found)


def test_an_arm_that_continues_is_another_one_than_one_that_restarts(lab: Lab) -> None:
    once = replace(BASE, links=1)
    arms = [replace(once, start=start) for start in ("cpm", "continued", "mixed", "ads only")]  # type: ignore[arg-type]
    logits = [lab.logits(arm, SPLIT, 0) for arm in [BASE, *arms]]
    for i, one in enumerate(logits):
        assert all(not np.array_equal(one, other) for other in logits[:i])


def test_kept_statistics_are_those_of_cpm(lab: Lab) -> None:
    kept, _ = lab._actr(replace(BASE, keeps_statistics=True), SPLIT.asof, 0)
    fresh, _ = lab._actr(BASE, SPLIT.asof, 0)
    cpm = lab._cpm(replace(BASE, keeps_statistics=True), SPLIT.asof, 0)
    assert np.array_equal(kept.item_numbers.standardise.mean, cpm["item_numbers.standardise.mean"])
    assert not np.array_equal(
        fresh.item_numbers.standardise.mean, cpm["item_numbers.standardise.mean"]
    )


def test_a_share_of_the_ads_is_whole_requests(lab: Lab) -> None:
    everything = lab._ads(ALONE, SPLIT.asof, 0)
    some = lab._ads(replace(ALONE, requests_share=0.5), SPLIT.asof, 0)
    names, counts = np.unique(some.request_id, return_counts=True)
    of_all, all_counts = np.unique(everything.request_id, return_counts=True)
    assert len(names) == round(0.5 * len(of_all))
    assert np.array_equal(counts, all_counts[np.isin(of_all, names)])


def test_mixed_domains_are_both_domains_rows(lab: Lab) -> None:
    ads, both = (lab._ads(replace(ALONE, mixes=m), SPLIT.asof, 0) for m in (False, True))
    natural = lab._natural(ALONE, SPLIT.asof, 0)
    assert len(both) == len(ads) + len(natural)


def test_attached_windows_are_those_that_a_builder_gives(tiny_workspace: Workspace) -> None:
    log, day = tiny_workspace.log(), tiny.ASOF
    rows = log.full_lists([day - timedelta(days=5), day], 20)
    expected = builder_for(tiny_workspace, log, day - timedelta(days=5), day).build(rows)
    bare = builder_for(tiny_workspace, log, day - timedelta(days=5), day, with_tpm=False).build(
        rows
    )
    dim = tiny.RECIPE.tpm.dim
    windows = load_windows(tiny_workspace, log, ["2017-02", "2017-03"], 3, dim)
    found = attach(bare, log, windows).batch(np.arange(len(bare)))
    for name, tensor in expected.batch(np.arange(len(bare))).items():
        assert np.array_equal(found[name], tensor), name


def test_windows_of_other_lengths_are_cut_or_joined_from_stored_ones(
    tiny_workspace: Workspace,
) -> None:
    log, dim = tiny_workspace.log(), tiny.RECIPE.tpm.dim
    one, three, six = (
        load_windows(tiny_workspace, log, ["2017-03"], size, dim)["2017-03"].items
        for size in (1, 3, 6)
    )
    assert np.array_equal(one.vectors, three.vectors[:, :1])
    assert np.array_equal(six.vectors[:, :3], three.vectors)
    # The log begins in December: the window of December to October is not whole.
    assert not six.present[:, 3:].any()


def test_the_items_of_rows_are_found_by_their_keys(lab: Lab) -> None:
    rows = lab._ads(ALONE, SPLIT.asof, 0)
    log = lab.log()
    assert np.array_equal(log.items.keys[item_rows(rows, log)].astype(np.int64), rows.item_key)


def test_hiding_nothing_changes_nothing(lab: Lab) -> None:
    rows = lab._ads(ALONE, SPLIT.asof, 0)
    assert hide(rows, ()) is rows


def test_short_features_have_no_long_counts(journey_log: EventLog, tmp_path: Path) -> None:
    short = EventLog(data_with(SHORT, journey_log.root, tmp_path))
    names = {f.name for f in journey_log.spec.features} - {f.name for f in short.spec.features}
    assert names
    assert all(name.endswith("_365d") for name in names)
    assert short.name == journey_log.name
    with pytest.raises(ValueError, match=r"features 'long': must be 'short'"):
        data_with("long", journey_log.root, tmp_path)


def test_segments_are_the_rows_whose_user_or_item_is_new(lab: Lab) -> None:
    few = BASE.with_actr(days=1)
    cells = (Cell("full", "", few, SPLIT, baseline=True),)
    experiment = Experiment("x", "X", "?", "x", cells, seeds=(0,), segments=True)
    found = {e.series: e for e in run_experiment(experiment, SIZE, lab.data, lab.root, "").entries}
    log, day = lab.log(), SPLIT.asof - timedelta(days=1)
    known = set(log.rows("ad", day, day)["item_id"])
    test = log.full_lists([SPLIT.asof + timedelta(days=i) for i in range(3)], SPLIT.per_day)
    assert found["full, new items"].rows == sum(item not in known for item in test["item_id"])
    assert found["full, new users"].rows < found["full"].rows


def test_the_schedule_costs_less_than_everything_every_day(lab: Lab) -> None:
    arms = {"fresh": BASE, "old": replace(BASE, cpm_age_days=3)}
    cells = tuple(Cell(n, "", arm, SPLIT, n == "fresh") for n, arm in arms.items())
    experiment = Experiment("x", "X", "?", "x", cells, seeds=(0,), costs=True)
    fresh, old = run_experiment(experiment, SIZE, lab.data, lab.root, "").entries
    assert 0 < old.facts["CPU s a day"] < fresh.facts["CPU s a day"]
    assert fresh.gauc != old.gauc
    assert not (lab.root / "cost").exists()


def test_cells_of_a_synthetic_world_say_what_is_the_best_possible(lab: Lab) -> None:
    world = SyntheticConfig(60, 40, date(2016, 12, 1), tiny.LAST, 10, cold_days=10, ad_requests=0.5)
    cells = (Cell("alone", "0.8", ALONE, replace(SPLIT, per_day=None), True, world),)
    experiment = Experiment("x", "X", "?", "x", cells, seeds=(0,))
    (found,) = run_experiment(experiment, SIZE, lab.data, lab.root, "").entries
    assert found.log_loss > found.facts["best log loss"] > 0
    assert 0.5 < found.facts["best GAUC"] < 1
    assert "best GAUC" in markdown(a_result(found))


def a_result(*entries: Entry) -> Result:
    return Result("x", "X", "?", "x", "alone", "", [0], list(entries), "", 0.0)


def test_a_seed_average_has_the_mean_of_the_lifts() -> None:
    rng = np.random.default_rng(0)
    label = (rng.random(600) < 0.3).astype(np.float32)
    user = np.repeat(np.arange(30), 20)
    good = [label + rng.normal(size=600) for _ in range(3)]
    bad = [rng.normal(size=600) for _ in range(3)]
    found = entry("good", "", good, Rows(label, user), bad)
    assert found.gauc_lift is not None
    assert found.gauc_lift_interval is not None
    assert found.gauc_lift_interval[0] > 0
    again = entry("bad", "", bad, Rows(label, user), good)
    assert again.gauc_lift == pytest.approx(-found.gauc_lift)
    assert again.gauc_lift_interval is not None
    assert again.gauc_lift_interval[1] < 0


@pytest.mark.parametrize("name", sorted(EXPERIMENTS))
def test_every_experiment_has_one_name_baselines_and_distinct_cells(name: str) -> None:
    experiment = EXPERIMENTS[name](FULL)
    assert experiment.name == name
    assert any(cell.baseline for cell in experiment.cells)
    places = [(c.series, c.x) for c in experiment.cells]
    assert len(set(places)) == len(places)
    made = [key(c.world, c.arm, c.split) for c in experiment.cells]
    assert len(set(made)) == len(made)
    assert len(experiment.seeds) >= 2
