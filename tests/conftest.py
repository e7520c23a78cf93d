"""What is made once per session: the data sets, the trained workspaces, a running service.

Whatever is here is shared, so no test changes it; `tiny.copy_workspace` gives a copy to change.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from commands import ROOT, Run

# Before torch is loaded, by us or by a process that we start: more threads than one wait for each
# other on a machine that is busy with something else. Not torch.set_num_threads: importing torch
# here would cost the tests that don't need it a second and a half.
os.environ["OMP_NUM_THREADS"] = "1"

if TYPE_CHECKING:
    from bundles import Place

    from training.datasets.complete_journey import Summary
    from training.events import EventLog
    from training.recipes import Recipe
    from training.workspace import Workspace

JOURNEY_ASOF = date(2017, 10, 5)
"""All rows that the quick recipe needs see one window, September's."""


@dataclass(frozen=True)
class Journey:
    """The real data set, imported, and what the import said of it."""

    root: Path
    summary: Summary


@dataclass(frozen=True)
class Exported:
    """A workspace with all tiers trained and a bundle of them, promoted."""

    workspace: Workspace
    recipe: Recipe
    asof: date
    bundle_id: str

    @property
    def bundle(self) -> Path:
        return self.workspace.registry.path(self.bundle_id)


def pytest_collection_finish() -> None:
    """What all modules have imported lives as long as the run: without this, each of the many full
    collections walks through it for a quarter of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A registry in which a small bundle is live, and a store with its window; one for a module."""
    from bundles import add_live_bundle, make_place

    place = make_place(tmp_path_factory.mktemp("place"))
    add_live_bundle(place)
    return place


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    return Run(capsys)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import tiny

    return tiny.write_data(tmp_path_factory.mktemp("tiny") / "data")


@pytest.fixture(scope="session")
def tiny_log(tiny_data: Path) -> EventLog:
    from training.events import EventLog

    return EventLog(tiny_data)


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Workspace:
    """TPM, CPM and A-CTR trained on the tiny data set with `tiny.RECIPE`."""
    import tiny

    from training.actr import train_actr
    from training.workspace import Workspace

    root = tmp_path_factory.mktemp("tiny-workspace")
    (root / "data").symlink_to(tiny_data)
    workspace = Workspace(root)
    tiny.train_before_ads(workspace)
    train_actr(workspace, tiny.ASOF, tiny.RECIPE.network, tiny.RECIPE.actr, seed=0)
    return workspace


@pytest.fixture(scope="session")
def tiny_exported(tmp_path_factory: pytest.TempPathFactory, tiny_workspace: Workspace) -> Exported:
    import tiny

    from training.export import export_actr

    root = tmp_path_factory.mktemp("tiny-exported") / "workspace"
    workspace = tiny.copy_workspace(tiny_workspace, root)
    bundle_id = export_actr(workspace, tiny.ASOF, tiny.RECIPE)
    workspace.registry.promote(bundle_id)
    return Exported(workspace, tiny.RECIPE, tiny.ASOF, bundle_id)


@pytest.fixture(scope="session")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Journey:
    """Complete Journey from the installed package: the one import of the session."""
    from training.datasets.complete_journey import import_complete_journey, source_folder

    root = tmp_path_factory.mktemp("journey") / "data"
    return Journey(root, import_complete_journey(root, source_folder()))


@pytest.fixture(scope="session")
def journey_log(journey: Journey) -> EventLog:
    from training.events import EventLog

    return EventLog(journey.root)


@pytest.fixture(scope="session")
def journey_exported(tmp_path_factory: pytest.TempPathFactory, journey: Journey) -> Exported:
    """The whole path on a few days of real data, too short to be any good."""
    from training.actr import train_actr
    from training.config import ActrConfig, CpmConfig, TpmConfig
    from training.cpm import train_cpm
    from training.export import export_actr
    from training.recipes import Recipe, complete_journey
    from training.tpm import train_through
    from training.workspace import Workspace

    root = tmp_path_factory.mktemp("journey-workspace")
    (root / "data").symlink_to(journey.root)
    workspace, asof = Workspace(root), JOURNEY_ASOF
    # The network is that of the command line, so that its verbs can load what was trained here.
    network = complete_journey().network
    quick = TpmConfig(dim=8, history_months=1, store_negatives=1, catalogue_negatives=1)
    quick = replace(quick, in_batch=0.0, batch_size=8192)
    cpm = CpmConfig(days=1, near_negatives=1.0, catalogue_negatives=1)
    recipe = Recipe(network, quick, cpm, ActrConfig(days=3, calibration_days=3))
    train_through(workspace, "2017-09", 3, recipe.tpm, seed=0)
    train_cpm(workspace, asof, recipe.network, recipe.cpm, seed=0)
    train_actr(workspace, asof, recipe.network, recipe.actr, seed=0)
    bundle_id = export_actr(workspace, asof, recipe)
    workspace.registry.promote(bundle_id)
    return Exported(workspace, recipe, asof, bundle_id)


@pytest.fixture(scope="session")
def journey_url(journey_exported: Exported) -> Iterator[str]:
    """The bundle of `journey_exported` behind real HTTP."""
    from training.demo import running_service

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        # A busy machine must not make an answer a degraded one.
        patch.setenv("ECDCTR_STORE_DEADLINE_MS", "5000")
        with running_service(journey_exported.workspace) as url:
            yield url
