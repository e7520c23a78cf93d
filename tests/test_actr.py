"""A-CTR: what it takes over from CPM and what not, and its calibration."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit
from torch import Tensor

from training.actr import FULL, Actr, Variant, load_actr, train_actr
from training.config import ActrConfig
from training.cpm import cpm_name, train_cpm
from training.examples import Examples, builder_for
from training.fit import calibration, predict
from training.network import Network
from training.workspace import Workspace, WorkspaceError

ACTR = tiny.RECIPE.actr
STILL = replace(
    ACTR,
    fit=replace(
        ACTR.fit, learning_rate=0.0, table_learning_rate=0.0, large_table_learning_rate=0.0
    ),
)
"""Learns nothing, so its parameters are those that it began with."""


@pytest.fixture(scope="module")
def examples(tiny_workspace: Workspace) -> Examples:
    log, days = tiny_workspace.log(), tiny.days_before(tiny.ASOF, ACTR.days)
    builder = builder_for(tiny_workspace, log, days[0], days[-1])
    return builder.build(log.rows("ad", days[0], days[-1]))


@pytest.fixture
def workspace(tiny_workspace: Workspace, tmp_path: Path) -> Workspace:
    return tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")


def trained(
    workspace: Workspace, config: ActrConfig = ACTR, seed: int = 0, variant: Variant = FULL
) -> Actr:
    train_actr(workspace, tiny.ASOF, tiny.RECIPE.network, config, seed, variant)
    return load_actr(workspace, tiny.ASOF, tiny.RECIPE.network, variant)


def cpm(workspace: Workspace) -> Network:
    log = workspace.log()
    network = Network(log.spec, log.encoder, tiny.RECIPE.network, tiny.RECIPE.tpm.dim)
    workspace.load_model(cpm_name(tiny.ASOF), network, "")
    return network


def statistics(network: Network) -> dict[str, Tensor]:
    names = {name for name, _ in network.named_parameters()}
    return {name: tensor for name, tensor in network.state_dict().items() if name not in names}


def changed(network: Network, before: Network) -> set[str]:
    """Names of the parameters that differ."""
    expected = dict(before.named_parameters())
    found = network.named_parameters()
    return {name for name, p in found if not torch.equal(p, expected[name])}


def test_cpms_parameters_are_taken_over(workspace: Workspace) -> None:
    """All but the overall rate of positives, which is the ads domain's own from the start."""
    assert changed(trained(workspace, STILL).network, cpm(workspace)) == {"logit.bias"}
    alone = trained(workspace, STILL, variant=Variant(cpm=False)).network
    assert len(changed(alone, cpm(workspace))) > 5


def test_cpms_normalisation_statistics_are_not_taken_over(
    workspace: Workspace, examples: Examples
) -> None:
    found, of_cpm = statistics(trained(workspace, STILL).network), statistics(cpm(workspace))
    for part in ("user_numbers", "item_numbers", "match_numbers"):
        names = [name for name in found if name.startswith(part)]
        assert names, part
        assert all(not torch.equal(found[name], of_cpm[name]) for name in names), part
    # They are those of the ads rows, as a network takes them that knows no CPM.
    log = workspace.log()
    fresh = Network(log.spec, log.encoder, tiny.RECIPE.network, tiny.RECIPE.tpm.dim)
    fresh.fit_statistics(examples.batch(np.arange(len(examples))))
    of_ads = statistics(fresh)
    # Those of windows depend on CPM's parameters, which aggregate them.
    for name in set(found) - {n for n in found if n.startswith("window")}:
        torch.testing.assert_close(found[name], of_ads[name], atol=1e-5, rtol=1e-5)


def test_fine_tuning_changes_parameters(workspace: Workspace) -> None:
    assert len(changed(trained(workspace).network, cpm(workspace))) > 5


def test_the_same_seed_gives_the_same_loss_and_another_seed_another(workspace: Workspace) -> None:
    first, second, other = (trained(workspace, seed=seed).facts for seed in (0, 0, 1))
    assert first == second
    assert first["loss"] != other["loss"]


def test_a_loaded_model_scores_as_the_trained_one_did(
    workspace: Workspace, examples: Examples
) -> None:
    one = trained(workspace)
    other = load_actr(Workspace(workspace.root), tiny.ASOF, tiny.RECIPE.network)
    assert np.array_equal(predict(one.network, examples), predict(other.network, examples))
    assert one.offset == other.offset
    assert not other.network.training


def test_it_keeps_which_days_it_saw_and_which_cpm_it_came_from(tiny_workspace: Workspace) -> None:
    facts = load_actr(tiny_workspace, tiny.ASOF, tiny.RECIPE.network).facts
    first = tiny.ASOF - timedelta(days=ACTR.days)
    assert (facts["from"], facts["to"]) == (str(first), str(tiny.ASOF - timedelta(days=1)))
    assert facts["cpm"]["name"] == cpm_name(tiny.ASOF)
    assert facts["cpm"]["to"] == facts["to"]
    assert facts["window_dim"] == tiny.RECIPE.tpm.dim


def test_calibration_makes_predicted_positives_as_many_as_real_ones(examples: Examples) -> None:
    logit = np.random.default_rng(0).normal(size=len(examples))
    for shift in (-9.0, 0.0, 7.0):
        offset = calibration(logit + shift, examples)
        times = np.where(examples.label > 0, 1.0, examples.weight)
        predicted = float((expit(logit + shift + offset) * times).sum())
        assert predicted == pytest.approx(float(examples.label.sum()), rel=1e-6)


def test_a_calibrated_model_is_calibrated_on_its_most_recent_days(
    tiny_workspace: Workspace, examples: Examples
) -> None:
    model = load_actr(tiny_workspace, tiny.ASOF, tiny.RECIPE.network)
    recent = examples.since(tiny.ASOF - timedelta(days=ACTR.calibration_days))
    assert len(recent) < len(examples)
    logit = predict(model.network, recent) + model.offset
    times = np.where(recent.label > 0, 1.0, recent.weight)
    assert (expit(logit) * times).sum() == pytest.approx(recent.label.sum(), rel=1e-5)


@given(
    positives=st.integers(0, 500),
    expected=st.floats(1.0, 500.0),
    prior=st.floats(1.0, 200.0),
)
def test_a_prior_draws_the_offset_towards_none_by_as_many_positives_as_it_is(
    examples: Examples, positives: int, expected: float, prior: float
) -> None:
    """Of probabilities so small that they multiply as odds do."""
    label = np.zeros(len(examples), np.float32)
    label[:positives] = 1
    rows = replace(examples, label=label, weight=np.full(len(label), 1e6, np.float32))
    times = np.where(label > 0, 1.0, 1e6).sum()
    offset = calibration(np.full(len(label), np.log(expected / times)), rows, prior)
    assert offset == pytest.approx(np.log((positives + prior) / (expected + prior)), abs=1e-4)


def test_without_positives_there_is_nothing_to_calibrate_by(examples: Examples) -> None:
    negatives = replace(examples, label=np.zeros_like(examples.label))
    assert calibration(np.zeros(len(examples)), negatives) == 0.0


def test_variants_are_kept_side_by_side(workspace: Workspace) -> None:
    recipe = tiny.RECIPE
    train_cpm(workspace, tiny.ASOF, recipe.network, recipe.cpm, seed=0, with_tpm=False)
    variants = [FULL, Variant(tpm=False), Variant(cpm=False), Variant(tpm=False, cpm=False)]
    names = [v.name(tiny.ASOF) for v in variants]
    assert len(set(names)) == 4
    for variant in variants:
        found = trained(workspace, variant=variant)
        assert found.network.window_dim == (recipe.tpm.dim if variant.tpm else 0)
        assert (found.facts["cpm"] is not None) == variant.cpm
    assert all(workspace.has_model(name) for name in names)


@pytest.mark.parametrize(
    ("variant", "command"),
    [(FULL, "train cpm"), (Variant(tpm=False), "train cpm"), (Variant(cpm=False), "train tpm")],
)
def test_a_tier_that_is_missing_is_named_with_the_command_that_makes_it(
    tiny_data: Path, tiny_workspace: Workspace, tmp_path: Path, variant: Variant, command: str
) -> None:
    (tmp_path / "data").symlink_to(tiny_data)
    workspace = Workspace(tmp_path)
    if command == "train cpm":
        (tmp_path / "snapshots").symlink_to(tiny_workspace.root / "snapshots")
    with pytest.raises(WorkspaceError, match=f"ecdctr {command}"):
        trained(workspace, variant=variant)
    assert not workspace.has_model(variant.name(tiny.ASOF))
    with pytest.raises(WorkspaceError, match=f"ecdctr train actr --asof {tiny.ASOF}"):
        load_actr(workspace, tiny.ASOF, tiny.RECIPE.network, variant)
