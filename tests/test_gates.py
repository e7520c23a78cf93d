"""Each gate lets a good bundle through, and stops a bundle with the one fault that it is for."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Exported

from bundle.encode import Encoder
from bundle.items import ItemTable
from bundle.manifest import MANIFEST, Verdict, read_manifest, refusals, verify
from bundle.registry import RegistryError
from embeddings_store import WindowRef
from training.actr import load_actr
from training.config import GatesConfig
from training.examples import builder_for
from training.export import Export, export_actr, publish_bundle
from training.gates import Gates, Judged
from training.network import Network
from training.requests import RequestMaker
from training.workspace import Workspace

DAY = tiny.ASOF + timedelta(days=1)
"""Nobody has learned from it."""
CONFIG = GatesConfig(requests=100, min_spread=0.01)
"""A tiny model knows little: its scores differ little."""
JUDGED = {"window", "signature", "finite", "spread", "pcoc", "gauc", "log_loss"}


@pytest.fixture
def workspace(tiny_exported: Exported, tmp_path: Path) -> Workspace:
    return tiny.copy_workspace(tiny_exported.workspace, tmp_path / "workspace")


def live_of(workspace: Workspace) -> Path:
    current = workspace.registry.current()
    assert current is not None
    return workspace.registry.path(current.current)


def failed_by(workspace: Workspace, change: Callable[[Network], object]) -> set[str]:
    """The gates that a bundle with changed weights fails at."""
    return failed(verify(changed(workspace, change)).gates)


def changed(workspace: Workspace, change: Callable[[Network], object]) -> Path:
    """A bundle of the same day as the live one, judged by the gates, with changed weights."""
    actr, live = load_actr(workspace, tiny.ASOF, tiny.RECIPE.network), live_of(workspace)
    with torch.no_grad():
        change(actr.network)
    log, about = workspace.log(), read_manifest(live)
    yesterday = tiny.ASOF - timedelta(days=1)
    builder = builder_for(workspace, log, yesterday, tiny.ASOF)
    rows = log.full_lists([yesterday], 2)
    requests = [request for request, _ in RequestMaker(log, builder, yesterday).requests(rows)]
    export = Export(
        network=actr.network,
        offset=actr.offset,
        correction=actr.correction,
        asof=tiny.ASOF,
        window=about.window,
        lineage=about.lineage,
        seed=about.seed,
        metrics={},
    )
    window, registry = builder.window(tiny.ASOF), workspace.registry
    gates = Gates(workspace, DAY, CONFIG, live)
    made = publish_bundle(export, log, builder, window, requests, registry, gates)
    return registry.path(made)


def last_layers(network: Network) -> list[torch.nn.Parameter]:
    return [network.logit.weight, network.wide.user.weight, network.wide.item.weight]


def failed(verdicts: Sequence[Verdict]) -> set[str]:
    return {verdict.gate for verdict in verdicts if not verdict.passed}


def judged_live(workspace: Workspace, live: Path | None, config: GatesConfig = CONFIG) -> Judged:
    """What gates say of the live bundle, when `live` is what it is compared with."""
    own = live_of(workspace)
    return Gates(workspace, DAY, config, live).judge(own, read_manifest(own))


def test_a_good_bundle_passes_every_gate_and_brings_its_figures(workspace: Workspace) -> None:
    found = judged_live(workspace, live_of(workspace))
    assert {verdict.gate for verdict in found.verdicts} == JUDGED
    assert failed(found.verdicts) == set()
    assert found.metrics.keys() == {"gauc", "auc", "log_loss", "pcoc"}


def test_a_first_bundle_has_nothing_to_be_compared_with(workspace: Workspace) -> None:
    said = {verdict.gate: verdict for verdict in judged_live(workspace, None).verdicts}
    assert said.keys() == JUDGED
    assert all(verdict.passed for verdict in said.values())
    alone = {name for name, verdict in said.items() if verdict.detail == "nothing is live"}
    assert alone == {"signature", "gauc", "log_loss"}


def test_scores_that_are_no_numbers_are_refused(workspace: Workspace) -> None:
    def spoil(network: Network) -> None:
        network.second.bias.fill_(torch.nan)

    assert failed_by(workspace, spoil) == {"finite", "parity"}


def test_scores_that_are_all_alike_are_refused(workspace: Workspace) -> None:
    def flatten(network: Network) -> None:
        for parameter in last_layers(network):
            parameter.zero_()

    assert "spread" in failed_by(workspace, flatten)


def test_a_model_that_ranks_much_worse_than_the_live_one_is_refused(workspace: Workspace) -> None:
    def turn_round(network: Network) -> None:
        for parameter in last_layers(network):
            parameter.neg_()

    assert {"gauc", "log_loss"} <= failed_by(workspace, turn_round)


def test_worse_by_chance_or_by_less_than_the_tolerance_is_not_refused(workspace: Workspace) -> None:
    def blur(network: Network) -> None:
        noise = np.random.default_rng(0).normal(size=network.second.weight.shape)
        network.second.weight += torch.from_numpy((0.02 * noise).astype(np.float32))

    assert not {"gauc", "log_loss"} & failed_by(workspace, blur)


@pytest.mark.parametrize("offset", [-3.0, 3.0])
def test_predictions_far_from_what_is_clicked_are_refused(
    workspace: Workspace, offset: float
) -> None:
    found = failed_by(workspace, lambda network: network.logit.bias.add_(offset))
    assert "pcoc" in found
    assert "gauc" not in found


def test_what_the_held_out_day_has_corrected_is_not_judged_by_it(workspace: Workspace) -> None:
    """Or a model whose calibration is broken would pass: the day has just mended it."""
    folder = changed(workspace, lambda network: network.logit.bias.add_(0.5))
    gates = Gates(workspace, DAY, CONFIG, live_of(workspace))
    before = judged_live(workspace, live_of(workspace)).metrics
    after = gates.judge(folder, read_manifest(folder), correction=0.5).metrics
    assert after == pytest.approx(before, rel=1e-4)
    broken = gates.judge(folder, read_manifest(folder), correction=3.5)
    assert failed(broken.verdicts) == {"pcoc", "log_loss"}


def test_a_window_that_is_not_whole_in_the_store_is_refused(workspace: Workspace) -> None:
    window = read_manifest(live_of(workspace)).window
    workspace.store.remove(WindowRef(window.month, window.build))
    found = judged_live(workspace, live_of(workspace)).verdicts
    assert failed(found) == {"window"}
    assert window.month in found[0].detail


def test_snapshots_that_have_changed_since_are_refused(workspace: Workspace) -> None:
    path = workspace.root / "snapshots" / tiny.MONTHS[-1] / "users" / "biases.npy"
    np.save(path, np.load(path) + 1)
    assert failed(judged_live(workspace, live_of(workspace)).verdicts) == {"window"}


def changed_signature(workspace: Workspace) -> Path:
    """The live bundle, with an input less than a candidate has."""
    folder = workspace.root / "other-live"
    shutil.copytree(live_of(workspace), folder)
    document = json.loads((folder / MANIFEST).read_text())
    document["item_inputs"] = [i for i in document["item_inputs"] if i["name"] != "item_num"]
    (folder / MANIFEST).write_text(json.dumps(document))
    return folder


def test_other_inputs_than_those_of_the_live_bundle_are_refused(workspace: Workspace) -> None:
    found = judged_live(workspace, changed_signature(workspace)).verdicts
    assert failed(found) == {"signature"}
    assert "item_num" in str(found[1])


def test_other_inputs_may_be_declared(workspace: Workspace) -> None:
    config = replace(CONFIG, allow_signature_change=True)
    assert failed(judged_live(workspace, changed_signature(workspace), config).verdicts) == set()


def test_counts_of_the_held_out_day_do_not_reach_its_own_scores(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The candidate's item table counts up to the day it is for: after the held-out one."""
    held_out = tiny.ASOF - timedelta(days=2)
    seen: list[np.ndarray] = []

    class Spy:
        def __init__(self, encoder: Encoder, folder: Path, *, own_items: bool) -> None:
            seen.append(np.array(encoder.items.numeric))
            assert not own_items  # else the bundle's parts would count up to that day too

        def score_all(self, _: object, requests: Sequence[Any]) -> list[np.ndarray]:
            return [np.full(len(request.item_ids), 0.1) for request in requests]

    monkeypatch.setattr("training.gates.BundleScorer", Spy)
    live = live_of(workspace)
    Gates(workspace, held_out, CONFIG, live).judge(live, read_manifest(live))
    log = workspace.log()
    as_of_day = builder_for(workspace, log, held_out, held_out).item_numbers(held_out)
    expected = ItemTable.build(log.items.keys, log.items.categorical, as_of_day).numeric
    assert len(seen) == 2
    assert all(np.array_equal(table, expected) for table in seen)
    today = builder_for(workspace, log, tiny.ASOF, tiny.ASOF).item_numbers(tiny.ASOF)
    assert not np.array_equal(as_of_day, today)


def test_a_refused_bundle_is_kept_with_its_reasons_and_goes_live_by_force_alone(
    workspace: Workspace,
) -> None:
    before, registry = workspace.registry.current(), workspace.registry
    gates = Gates(workspace, DAY, replace(CONFIG, pcoc_band=(0.0, 0.001)), live_of(workspace))
    refused, forced = (
        export_actr(workspace, tiny.ASOF, tiny.RECIPE, gates, force) for force in (False, True)
    )
    manifest = verify(registry.path(refused))
    assert {verdict.gate for verdict in manifest.gates} == JUDGED | {"parity"}
    assert failed(manifest.gates) == {"pcoc"}
    assert manifest.metrics.keys() == {"gauc", "auc", "log_loss", "pcoc"}
    assert len(refusals(manifest)) == 1
    with pytest.raises(RegistryError, match=rf"{refused} was refused: pcoc [0-9.]+, must be"):
        registry.promote(refused)
    assert registry.current() == before
    assert forced != refused
    assert registry.read(forced).forced
    assert failed(registry.read(forced).gates) == {"pcoc"}
    assert registry.promote(forced).current == forced


def test_a_manifest_without_gates_is_read_as_one_that_was_never_judged(
    workspace: Workspace,
) -> None:
    path = live_of(workspace) / MANIFEST
    document = json.loads(path.read_text())
    for name in ("gates", "forced"):
        document.pop(name)
    path.write_text(json.dumps(document))
    manifest = verify(live_of(workspace))
    assert (manifest.gates, manifest.forced) == ((), False)
    assert workspace.registry.promote(manifest.id).current == manifest.id


def test_a_verdict_reads_as_a_sentence() -> None:
    verdict = Verdict("gauc", False, -0.0123, "at most 0.005 below the live bundle's", "of 7 users")
    assert (
        str(verdict) == "gauc -0.0123, must be at most 0.005 below the live bundle's (of 7 users)"
    )
