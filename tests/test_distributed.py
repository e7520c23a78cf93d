"""Two processes that train one model: the same model in both, as good as that of one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import tiny
import torch

from training.actr import FULL, load_actr
from training.cpm import cpm_name
from training.distributed import DEVICE, DistributedError, World, device, own_rows
from training.events import EventLog
from training.examples import builder_for
from training.fit import predict
from training.metrics import measure
from training.workspace import Workspace

TESTS = Path(__file__).parent


def torchrun(*arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environ = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        env=environ,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@dataclass(frozen=True)
class Pair:
    """What two processes made, and what each of them said."""

    workspace: Workspace
    said: list[dict[str, Any]]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Pair:
    root = tmp_path_factory.mktemp("pair") / "workspace"
    root.mkdir()
    (root / "data").symlink_to(tiny_data)
    torchrun(str(TESTS / "ranks.py"), str(root))
    said = [json.loads((root.parent / f"rank-{rank}.json").read_text()) for rank in range(2)]
    return Pair(Workspace(root), said)


def kept(workspace: Workspace) -> set[str]:
    """All files of models and snapshots."""
    found = (p.relative_to(workspace.root) for p in workspace.root.rglob("*") if p.is_file())
    return {str(p) for p in found if p.parts[0] in ("models", "snapshots")}


def test_both_processes_end_with_the_same_tensors_in_every_tier(pair: Pair) -> None:
    one, other = (said["models"] for said in pair.said)
    assert len(one) == len(tiny.MONTHS) + 2
    assert one == other


def test_what_is_kept_is_what_they_ended_with(pair: Pair) -> None:
    actr = load_actr(pair.workspace, tiny.ASOF, tiny.RECIPE.network)
    assert ranks.digest(actr.network) == pair.said[0]["models"][-1]


def test_there_is_one_set_of_files_as_from_one_process(
    pair: Pair, tiny_workspace: Workspace
) -> None:
    assert kept(pair.workspace) == kept(tiny_workspace)
    assert not list(pair.workspace.root.rglob(".*.*"))


def test_two_processes_learn_as_well_as_one(
    pair: Pair, tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    for name in ("tpm-2017-03", cpm_name(tiny.ASOF), FULL.name(tiny.ASOF)):
        alone, together = (w.facts(name, "")["loss"] for w in (tiny_workspace, pair.workspace))
        assert together == pytest.approx(alone, rel=0.1), name
        assert together != alone, f"{name}: other rows in other batches give another loss"
    first, last = tiny.ASOF, tiny.LAST
    losses = []
    for workspace in (tiny_workspace, pair.workspace):
        examples = builder_for(workspace, tiny_log, first, last).days("ad", first, last)
        actr = load_actr(workspace, tiny.ASOF, tiny.RECIPE.network)
        logit = predict(actr.network, examples) + actr.offset
        losses.append(measure(logit, examples.label, examples.user_row).log_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_a_step_of_a_block_takes_the_rows_of_both_processes(pair: Pair) -> None:
    alone = ranks.block_after_one_step([*ranks.ROWS[0], *ranks.ROWS[1]], World())
    assert pair.said[0]["block"] == pair.said[1]["block"] == alone.tolist()


def test_processes_that_come_apart_are_an_error_and_leave_no_model(pair: Pair) -> None:
    for said in pair.said:
        assert said["apart"].startswith("cpm: the processes ended with different ")
    assert not pair.workspace.has_model(cpm_name(tiny.ASOF, with_tpm=False))


def test_torchrun_trains_a_tier_from_the_command_line(
    tiny_workspace: Workspace, tmp_path: Path
) -> None:
    workspace = tiny.copy_workspace(tiny_workspace, tmp_path / "workspace")
    asof, name = tiny.ASOF + timedelta(days=1), cpm_name(tiny.ASOF + timedelta(days=1))
    assert not workspace.has_model(name)
    torchrun(
        "-m", "ecdctr", "--workspace", str(workspace.root), "train", "cpm", "--asof", f"{asof}"
    )
    assert workspace.facts(name, "")["to"] == str(tiny.ASOF)
    assert ".partial" not in str(list(workspace.root.rglob("*")))


def test_every_day_is_read_by_one_process(tiny_log: EventLog, monkeypatch: Any) -> None:
    first, last = date(2017, 3, 1), date(2017, 3, 9)
    shares = []
    for rank in range(2):
        monkeypatch.setattr("training.distributed.world", lambda rank=rank: World(rank, 2))
        shares.append(set(own_rows(tiny_log, "ad", first, last)["date"]))
    assert [len(share) for share in shares] == [5, 4]
    assert len(shares[0] | shares[1]) == 9


def test_fewer_days_than_processes_are_an_error() -> None:
    with pytest.raises(DistributedError, match="2 days from 2017-03-01 on are too few for 3 proc"):
        World(0, 3).days([date(2017, 3, 1), date(2017, 3, 2)])


def test_processes_have_as_many_batches_and_their_share_of_the_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(World, "sum", lambda self, value: 1000.0)
    batches = [World(rank, 2).batches(np.arange(num), 100) for rank, num in enumerate((580, 420))]
    assert [len(b) for b in batches] == [10, 10]
    assert [sum(map(len, b)) for b in batches] == [580, 420]
    with pytest.raises(DistributedError, match="process 1 has 9 rows for 10 batches"):
        World(1, 2).batches(np.arange(9), 100)


def test_one_process_has_whole_batches_and_the_rest() -> None:
    batches = World().batches(np.arange(10), 4)
    assert [list(batch) for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_a_network_is_fitted_on_the_cpu_unless_the_environment_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(DEVICE, raising=False)
    assert device() == torch.device("cpu")
    monkeypatch.setenv(DEVICE, "auto")
    assert device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["abacus", "cuda:99"])
def test_a_device_that_is_not_there_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(DEVICE, name)
    with pytest.raises(DistributedError, match=f"{DEVICE} is '{name}', which is not here") as error:
        device()
    assert "\n" not in str(error.value)
