"""The workspace: each thing there as a whole or not at all, and what lacks is named."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import nn

from embeddings_store import read_snapshot
from training.events import DataError, EventLog
from training.workspace import Workspace, WorkspaceError


@dataclass
class Unpicklable:
    """Facts that can't be written."""


def model(value: float) -> nn.Linear:
    layer = nn.Linear(2, 1)
    nn.init.constant_(layer.weight, value)
    return layer


def leftovers(root: Path) -> list[Path]:
    return [path for path in root.rglob(".*") if path.name != ".lock"]


def test_a_model_comes_back_with_its_facts(tmp_path: Path) -> None:
    workspace, found = Workspace(tmp_path), model(0.0)
    workspace.save_model("one", model(3.0), {"loss": 0.5, "cpm": None})
    assert workspace.load_model("one", found, "") == {"loss": 0.5, "cpm": None}
    assert torch.equal(found.weight, torch.full((1, 2), 3.0))
    assert workspace.has_model("one")


def test_a_model_that_is_not_there_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    assert not workspace.has_model("one")
    with pytest.raises(WorkspaceError, match="no model one; run 'ecdctr train one' first"):
        workspace.load_model("one", model(0.0), "ecdctr train one")


def test_saving_again_replaces(tmp_path: Path) -> None:
    workspace, found = Workspace(tmp_path), model(0.0)
    for value in (1.0, 2.0):
        workspace.save_model("one", model(value), {"value": value})
    assert workspace.load_model("one", found, "") == {"value": 2.0}
    assert torch.equal(found.weight, torch.full((1, 2), 2.0))
    assert leftovers(tmp_path) == []


def test_saving_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    workspace = Workspace(tmp_path)
    workspace.save_model("one", model(1.0), {"value": 1.0})
    for name in ("one", "two"):
        with pytest.raises(TypeError):
            workspace.save_model(name, model(2.0), {"value": Unpicklable()})
    assert workspace.facts("one", "") == {"value": 1.0}
    assert not workspace.has_model("two")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["one"]


def test_a_month_counts_once_it_has_users_and_items(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = Workspace(tmp_path)
    assert workspace.months() == []
    users, items = (read_snapshot(tiny_workspace.root, e, "2017-01") for e in ("users", "items"))
    workspace.write_snapshots({"users": users})
    assert workspace.months() == []
    workspace.write_snapshots({"users": users, "items": items})
    assert workspace.months() == ["2017-01"]


def test_a_window_that_lacks_snapshots_names_them_and_the_command(
    tiny_workspace: Workspace,
) -> None:
    assert tiny_workspace.pack("2017-02").ref.window == "2017-02"
    with pytest.raises(WorkspaceError, match=r"2016-11; run 'ecdctr train tpm --through 2017-01'"):
        tiny_workspace.pack("2017-01")
    with pytest.raises(WorkspaceError, match=r"2017-04, 2017-05, 2017-06"):
        tiny_workspace.pack("2017-06")


def test_windows_are_read_as_the_service_reads_them(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    """Published and rounded: months newest first, in the order of the log's rows."""
    window = tiny_workspace.windows(tiny_log, ["2017-03", "2017-03"])["2017-03"]
    assert window.ref in tiny_workspace.store.windows()
    for place, month in enumerate(("2017-03", "2017-02", "2017-01")):
        snapshot = read_snapshot(tiny_workspace.root, "items", month)
        rows = np.searchsorted(snapshot.ids, tiny_log.items.keys)
        exact = np.column_stack([snapshot.vectors[rows], snapshot.biases[rows]])
        found = window.items.vectors[:, place]
        np.testing.assert_array_equal(found, exact.astype(np.float16).astype(np.float32))
        assert window.items.present[:, place].all()


def test_the_same_snapshots_give_the_same_build(tiny_workspace: Workspace, tmp_path: Path) -> None:
    copy = tiny.copy_workspace(tiny_workspace, tmp_path / "copy")
    assert copy.pack("2017-03").ref == tiny_workspace.pack("2017-03").ref
    assert copy.pack("2017-03").ref.build != copy.pack("2017-02").ref.build


def test_an_evaluation_that_is_kept_gives_the_metrics_of_its_day(tmp_path: Path) -> None:
    workspace, asof = Workspace(tmp_path), date(2017, 4, 5)
    assert workspace.metrics(asof) == {}
    figures = {"gauc": 0.7, "auc": 0.8, "log_loss": 0.1, "pcoc": 1.1}
    path = workspace.keep_evaluation(asof, [{"model": "one", **figures, "rows": 7}])
    assert json.loads(path.read_text())[0]["rows"] == 7
    assert workspace.metrics(asof) == figures
    assert workspace.metrics(date(2017, 4, 6)) == {}


def test_a_workspace_without_data_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="run 'ecdctr import' first"):
        Workspace(tmp_path).log()
