"""Export: the graph is the network at every size, or there is no bundle."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from conftest import Exported

import training.export
from bundle.artifact import Artifact, open_artifact
from bundle.encode import Arrays, Request
from bundle.golden import TOLERANCE
from bundle.manifest import MANIFEST, verify
from bundle.registry import Registry
from embeddings_store import WindowRef, window_months
from service.scorer import absent_windows, item_inputs, user_inputs
from service.settings import Settings
from service.vetting import load
from service.windows import WindowSource
from training.actr import Actr, load_actr
from training.cpm import cpm_name
from training.examples import builder_for
from training.export import (
    Export,
    ExportError,
    Reference,
    graph_inputs,
    is_per_candidate,
    publish_bundle,
    resized,
    whole_inputs,
)
from training.requests import RequestMaker
from training.scoring import BundleScorer
from training.workspace import Workspace, WorkspaceError

SIZES = (1, 2, 7, 500)


@pytest.fixture(scope="module")
def artifact(tiny_exported: Exported) -> Artifact:
    return open_artifact(tiny_exported.bundle)


@pytest.fixture(scope="module")
def actr(tiny_exported: Exported) -> Actr:
    return load_actr(tiny_exported.workspace, tiny_exported.asof, tiny.RECIPE.network)


@pytest.fixture(scope="module")
def scorer(artifact: Artifact) -> BundleScorer:
    return BundleScorer(artifact.encoder, artifact.folder)


def longest(artifact: Artifact, num: int = 7) -> tuple[Request, Arrays]:
    """A real request with a long history, its candidates and their windows repeated up to `num`."""
    golden = max(artifact.golden, key=lambda g: len(g.request.history_items))
    windows = {
        name: np.resize(array, (num, *array.shape[1:])) if name.startswith("item_") else array
        for name, array in golden.windows.items()
    }
    return resized(golden.request, num), windows


def by_torch(
    artifact: Artifact, actr: Actr, request: Request, windows: Arrays
) -> np.ndarray[Any, np.dtype[np.float64]]:
    inputs = {**whole_inputs(artifact.encoder, request), **windows}
    reference = Reference(actr.network, actr.offset).eval()
    tensors = {name: torch.from_numpy(array) for name, array in inputs.items()}
    return reference(tensors).double().numpy()  # type: ignore[no-any-return]


@pytest.mark.parametrize("from_table", [True, False])
@pytest.mark.parametrize("num", SIZES)
def test_the_graphs_are_the_network_at_every_number_of_candidates(
    artifact: Artifact, actr: Actr, scorer: BundleScorer, num: int, from_table: bool
) -> None:
    request, windows = longest(artifact, num)
    found = scorer.score(request, windows, from_table=from_table)
    assert found.shape == (num,)
    np.testing.assert_allclose(found, by_torch(artifact, actr, request, windows), atol=1e-6)


@pytest.mark.parametrize("steps", [0, 1, 2, 4, 5, 12])
def test_the_graphs_are_the_network_at_every_length_of_the_history(
    artifact: Artifact, actr: Actr, scorer: BundleScorer, steps: int
) -> None:
    request, windows = longest(artifact)
    assert len(request.history_items) == 12
    request = replace(
        request,
        history_items=request.history_items[:steps],
        history_age_days=request.history_age_days[:steps],
        history_count=request.history_count[:steps],
    )
    expected = by_torch(artifact, actr, request, windows)
    np.testing.assert_allclose(scorer.score(request, windows), expected, atol=1e-6)


def test_the_graphs_are_the_network_without_windows(
    artifact: Artifact, actr: Actr, scorer: BundleScorer
) -> None:
    request, _ = longest(artifact)
    absent = absent_windows(7, tiny.RECIPE.tpm.dim)
    windows = {**user_inputs(absent.user), **item_inputs(absent.items)}
    found = scorer.score(request, windows, from_table=False)
    assert np.isfinite(found).all()
    expected = by_torch(artifact, actr, request, windows)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_request_that_knows_better_than_the_item_table_is_scored_by_what_it_says(
    artifact: Artifact, actr: Actr, scorer: BundleScorer
) -> None:
    request, windows = longest(artifact)
    name = next(f.name for f in artifact.encoder.spec.of("item", "numeric") if not f.given)
    own = replace(request, item_features={**request.item_features, name: [3.0] * 7})
    found = scorer.score(own, windows)
    np.testing.assert_allclose(found, by_torch(artifact, actr, own, windows), atol=1e-6)
    assert not np.allclose(found, scorer.score(request, windows), atol=1e-6)


def test_the_graphs_inputs_are_named_typed_and_free_in_the_number_of_candidates(
    artifact: Artifact,
) -> None:
    encoded = artifact.encoder.request(longest(artifact, 3)[0])
    absent = absent_windows(3, tiny.RECIPE.tpm.dim)
    made = {
        **encoded.inputs,
        **artifact.encoder.item_inputs(encoded, np.arange(3)),
        **user_inputs(absent.user),
        **item_inputs(absent.items),
        "item_part": artifact.parts[:3],
    }
    for model, listed in (
        (artifact.model, artifact.manifest.inputs),
        (artifact.item_model, artifact.manifest.item_inputs),
    ):
        assert graph_inputs(model) == listed
        for tensor in listed:
            array = made[tensor.name]
            assert tensor.dtype == array.dtype.name
            free = [i for i, size in enumerate(tensor.shape) if isinstance(size, str)]
            assert free == ([0] if is_per_candidate(tensor.name) else []), tensor
            fixed = [i for i in range(array.ndim) if i not in free]
            assert [tensor.shape[i] for i in fixed] == [array.shape[i] for i in fixed]


def test_the_bundle_passes_its_own_check_and_that_of_the_service(tiny_exported: Exported) -> None:
    manifest = verify(tiny_exported.bundle)
    assert manifest.id == tiny_exported.bundle_id

    async def go_live() -> str:
        settings = Settings("unused", "unused")
        source = WindowSource(settings, tiny_exported.workspace.store)
        scorer = await load(tiny_exported.bundle, source, 1000.0)
        await source.let_go(scorer.reader)
        return scorer.id

    assert asyncio.run(go_live()) == tiny_exported.bundle_id


def test_the_manifest_says_where_the_bundle_comes_from(
    artifact: Artifact, tiny_exported: Exported
) -> None:
    manifest, asof = artifact.manifest, tiny_exported.asof
    before, recipe = str(asof - timedelta(days=1)), tiny_exported.recipe
    assert (manifest.dataset, manifest.asof, manifest.seed) == ("tiny", str(asof), 0)
    lineage = manifest.lineage
    assert lineage.tpm_months == window_months("2017-03")
    assert lineage.cpm_id == cpm_name(asof)
    assert (lineage.cpm_from, lineage.cpm_to) == (
        str(asof - timedelta(days=recipe.cpm.days)),
        before,
    )
    assert (lineage.actr_from, lineage.actr_to) == (
        str(asof - timedelta(days=recipe.actr.days)),
        before,
    )
    window = WindowRef(manifest.window.month, manifest.window.build)
    assert window == tiny_exported.workspace.pack("2017-03").ref
    assert manifest.window.dim == recipe.tpm.dim


def test_golden_requests_are_real_ones_with_their_scores(
    artifact: Artifact, scorer: BundleScorer
) -> None:
    assert len(artifact.golden) > 1
    for golden in artifact.golden:
        found = scorer.score(golden.request, golden.windows)
        np.testing.assert_allclose(found, golden.scores, atol=TOLERANCE)
        assert golden.windows["item_window_present"].any()
    everything = np.concatenate([golden.scores for golden in artifact.golden])
    reference = json.loads((artifact.folder / "reference.json").read_text())
    assert reference["count"] == len(everything)
    assert reference["quantiles"][0] == pytest.approx(everything.min())
    assert reference["quantiles"][-1] == pytest.approx(everything.max())


Publish = Callable[..., str]


@pytest.fixture
def publish(
    tiny_exported: Exported, actr: Actr, artifact: Artifact, tmp_path: Path
) -> tuple[Publish, Registry]:
    """Publishes a bundle of a given export into a registry of its own."""
    workspace, asof = tiny_exported.workspace, tiny_exported.asof
    log = workspace.log()
    yesterday = asof - timedelta(days=1)
    builder = builder_for(workspace, log, yesterday, asof)
    window = workspace.windows(log, ["2017-03"])["2017-03"]
    rows = log.full_lists([yesterday], 2)
    requests = [r for r, _ in RequestMaker(log, builder, yesterday).requests(rows)]
    registry = Registry(tmp_path / "registry")
    manifest = artifact.manifest

    def run(**changes: Any) -> str:
        export = Export(
            correction=0.0,
            network=actr.network,
            offset=actr.offset,
            asof=asof,
            window=manifest.window,
            lineage=manifest.lineage,
            seed=manifest.seed,
            metrics={},
        )
        return publish_bundle(replace(export, **changes), log, builder, window, requests, registry)

    return run, registry


class Growing(torch.nn.Module):
    """A network whose logit moves at every call: what is exported is never what is checked."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.inner, self.calls = network, 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("inner"), name)

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.inner(x) + 0.01 * self.calls


def test_a_graph_that_is_not_the_network_is_an_error_and_leaves_nothing(
    publish: tuple[Publish, Registry], actr: Actr
) -> None:
    run, registry = publish
    with pytest.raises(ExportError, match="the graph's scores differ from torch's: parity"):
        run(network=Growing(actr.network))
    assert list(registry.root.iterdir()) == []
    assert registry.ids() == []


def test_scores_that_are_no_numbers_are_an_error_and_leave_nothing(
    publish: tuple[Publish, Registry],
) -> None:
    run, registry = publish
    with pytest.raises(ExportError):
        run(offset=float("nan"))
    assert list(registry.root.iterdir()) == []


def test_a_day_without_a_trained_model_says_what_to_run(
    tiny_exported: Exported, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    (tmp_path / "data").symlink_to(tiny_exported.workspace.data)
    with pytest.raises(WorkspaceError, match=f"ecdctr train actr --asof {tiny.ASOF}"):
        training.export.export_actr(workspace, tiny.ASOF, tiny.RECIPE)
    assert not (tmp_path / "registry").exists()


def test_a_bundle_that_was_changed_after_its_export_is_not_promoted(
    tiny_exported: Exported, tmp_path: Path
) -> None:
    shutil.copytree(tiny_exported.workspace.registry.root, tmp_path / "registry")
    registry = Registry(tmp_path / "registry")
    golden = registry.path(tiny_exported.bundle_id) / "golden.json"
    golden.write_text(golden.read_text() + " ")
    with pytest.raises(ValueError, match=r"golden\.json: checksum differs"):
        registry.promote(tiny_exported.bundle_id)
    assert (registry.path(tiny_exported.bundle_id) / MANIFEST).is_file()
