"""TPM: monthly snapshots, each continued from the last, and what they may know."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import tiny
import torch

from bundle.ids import hash_ids
from embeddings_store import Entity, Snapshot, read_snapshot
from training.config import TpmConfig
from training.events import DataError, EventLog
from training.tpm import Tpm, months_until, train_through, train_tpm
from training.workspace import Workspace, WorkspaceError

CONFIG = tiny.RECIPE.tpm
STILL = replace(CONFIG, learning_rate=0.0)
"""Learns nothing, so a snapshot is what it was continued from."""
ENTITIES: tuple[Entity, ...] = ("users", "items")


@pytest.fixture
def workspace(tiny_data: Path, tmp_path: Path) -> Workspace:
    (tmp_path / "data").symlink_to(tiny_data)
    return Workspace(tmp_path)


def snapshot(workspace: Workspace, month: str, entity: Entity = "items") -> Snapshot:
    return read_snapshot(workspace.root, entity, month)


def same(one: Snapshot, other: Snapshot) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name))
        for name in ("ids", "vectors", "biases")
    )


def facts(workspace: Workspace, month: str) -> dict[str, object]:
    return workspace.facts(f"tpm-{month}", "")


def knows(found: Snapshot, user: str) -> bool:
    return int(hash_ids([user])[0]) in found.ids.tolist()


def test_a_snapshot_continues_from_the_one_before(workspace: Workspace) -> None:
    train_through(workspace, "2017-01", 1, CONFIG, seed=0)
    train_through(workspace, "2017-02", 1, STILL, seed=0)
    assert same(snapshot(workspace, "2017-01"), snapshot(workspace, "2017-02"))
    train_through(workspace, "2017-03", 1, CONFIG, seed=0)
    assert not same(snapshot(workspace, "2017-02"), snapshot(workspace, "2017-03"))


def test_a_continued_snapshot_reads_its_own_month_only(workspace: Workspace) -> None:
    train_through(workspace, "2017-02", 2, CONFIG, seed=0)
    first, second = facts(workspace, "2017-01"), facts(workspace, "2017-02")
    assert (first["first"], first["last"]) == ("2017-01", "2017-01")
    assert (second["first"], second["last"]) == ("2017-02", "2017-02")


def test_the_first_snapshot_reads_as_many_months_as_the_config_says(workspace: Workspace) -> None:
    train_through(workspace, "2017-02", 1, replace(CONFIG, history_months=3), seed=0)
    assert facts(workspace, "2017-02")["first"] == "2016-12"
    assert workspace.months() == ["2017-02"]


def test_months_together_are_months_one_by_one(workspace: Workspace, tmp_path: Path) -> None:
    assert train_through(workspace, "2017-02", 2, CONFIG, seed=0) == ["2017-01", "2017-02"]
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart" / "data").symlink_to(workspace.data)
    apart = Workspace(tmp_path / "apart")
    for month in ("2017-01", "2017-02"):
        assert train_through(apart, month, 1, CONFIG, seed=0) == [month]
    for entity in ENTITIES:
        one, other = (snapshot(w, "2017-02", entity) for w in (workspace, apart))
        assert same(one, other), entity


def test_running_again_trains_nothing_and_changes_nothing(workspace: Workspace) -> None:
    train_through(workspace, "2017-01", 2, CONFIG, seed=0)
    files = sorted(path for path in (workspace.root / "snapshots").rglob("*") if path.is_file())
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
    assert train_through(workspace, "2017-01", 2, CONFIG, seed=7) == []
    assert [(path.read_bytes(), path.stat().st_mtime_ns) for path in files] == before


def test_only_months_that_are_not_there_are_trained(workspace: Workspace) -> None:
    train_through(workspace, "2017-01", 1, CONFIG, seed=0)
    kept = snapshot(workspace, "2017-01")
    assert train_through(workspace, "2017-02", 2, CONFIG, seed=0) == ["2017-02"]
    assert same(snapshot(workspace, "2017-01"), kept)


def test_a_month_after_a_gap_starts_from_nothing_and_no_window_spans_the_gap(
    workspace: Workspace,
) -> None:
    train_through(workspace, "2016-12", 1, CONFIG, seed=0)
    train_through(workspace, "2017-02", 1, STILL, seed=0)
    assert not same(snapshot(workspace, "2016-12"), snapshot(workspace, "2017-02"))
    with pytest.raises(WorkspaceError, match=r"2017-01; run 'ecdctr train tpm --through 2017-02"):
        workspace.pack("2017-02")


def test_months_that_the_log_does_not_have_are_named_and_leave_nothing(
    workspace: Workspace,
) -> None:
    with pytest.raises(DataError, match="date=2016-11-01: no partition"):
        train_through(workspace, "2016-12", 1, replace(CONFIG, history_months=2), seed=0)
    with pytest.raises(DataError, match="date=2017-04-11: no partition"):
        train_through(workspace, "2017-04", 1, CONFIG, seed=0)
    assert workspace.months() == []
    assert not workspace.has_model("tpm-2017-04")


def test_a_snapshot_whose_model_is_gone_is_not_continued_in_silence(workspace: Workspace) -> None:
    train_through(workspace, "2017-01", 1, CONFIG, seed=0)
    shutil.rmtree(workspace.root / "models")
    with pytest.raises(WorkspaceError, match=r"tpm-2017-01; run 'ecdctr train tpm"):
        train_through(workspace, "2017-02", 1, CONFIG, seed=0)


def test_users_are_in_a_snapshot_once_they_have_been_seen(tiny_workspace: Workspace) -> None:
    users = {month: snapshot(tiny_workspace, month, "users") for month in tiny.MONTHS}
    late = [knows(users[month], tiny.SPECIAL["late"]) for month in tiny.MONTHS]
    assert late == [False, False, True, True]
    # Who has left is still known; who took nothing in the natural domain never is.
    assert all(knows(found, tiny.SPECIAL["gone"]) for found in users.values())
    for name in ("quiet", "shy"):
        assert not any(knows(found, tiny.SPECIAL[name]) for found in users.values())


def test_who_is_in_no_snapshot_has_an_absent_window(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    window = tiny_workspace.windows(tiny_log, ["2017-02"])["2017-02"]
    row = {name: int(tiny_log.users.rows(np.array([u]))[0]) for name, u in tiny.SPECIAL.items()}
    present = window.users.present
    assert present[row["late"]].tolist() == [True, False, False]
    assert present[row["gone"]].tolist() == [True, True, True]
    assert not present[row["shy"]].any()
    assert not window.users.vectors[row["shy"]].any()


def test_every_item_is_in_every_snapshot_for_its_attributes_speak_for_it(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    for month in tiny.MONTHS:
        found = snapshot(tiny_workspace, month)
        assert found.ids.tolist() == sorted(tiny_log.items.keys.tolist())
        assert found.dim == CONFIG.dim


def test_a_vector_is_a_sum_so_its_bias_and_dot_product_are_the_logit(tiny_log: EventLog) -> None:
    torch.manual_seed(0)
    model = Tpm(tiny_log, CONFIG)
    model.seen[:] = True
    found = model.snapshot(tiny_log, "2017-01")
    users, items = torch.tensor([3, 5]), torch.tensor([[1, 2], [7, 30]])
    with torch.no_grad():
        logit, _, _ = model(users, items)
    for i in range(2):
        u = found["users"].ids.tolist().index(int(tiny_log.users.keys[users[i]]))
        for j in range(2):
            k = found["items"].ids.tolist().index(int(tiny_log.items.keys[items[i, j]]))
            dot = float(found["users"].vectors[u] @ found["items"].vectors[k])
            biases = float(found["users"].biases[u] + found["items"].biases[k])
            expected = dot + biases + model.bias.item()
            assert float(logit[i, j]) == pytest.approx(expected, abs=1e-5)


def test_the_loss_falls(tiny_log: EventLog) -> None:
    def loss(config: TpmConfig) -> float:
        torch.manual_seed(0)
        days = tiny.FIRST, tiny.LAST
        return train_tpm(Tpm(tiny_log, config), tiny_log, *days, seed=0)

    assert loss(CONFIG) < 0.95 * loss(STILL)


def test_the_same_seed_gives_the_same_snapshot_and_another_seed_another(
    workspace: Workspace, tmp_path: Path
) -> None:
    found = []
    for i, seed in enumerate((0, 0, 1)):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / "data").symlink_to(workspace.data)
        train_through(Workspace(tmp_path / f"{i}"), "2017-01", 1, CONFIG, seed)
        found.append(snapshot(Workspace(tmp_path / f"{i}"), "2017-01"))
    assert same(found[0], found[1])
    assert not same(found[0], found[2])


def test_a_catalogue_negative_that_is_the_positive_itself_weighs_nothing(tmp_path: Path) -> None:
    """With one item in the catalogue, every negative is the positive's own item: if they had a
    weight, a positive with forty of them would become unlikely."""
    log = EventLog(tiny.write_data(tmp_path / "data", num_items=1))
    config = replace(CONFIG, store_negatives=0, catalogue_negatives=40, in_batch=0.0)
    torch.manual_seed(0)
    model = Tpm(log, config)
    pairs = torch.arange(9), torch.zeros(9, 1, dtype=torch.int64)
    with torch.no_grad():
        before = model(*pairs)[0].mean()
    train_tpm(model, log, tiny.FIRST, tiny.LAST, seed=0)
    with torch.no_grad():
        assert model(*pairs)[0].mean() > before


def test_catalogue_negatives_teach_that_an_item_which_nobody_sells_is_dead(
    tiny_data: Path, tmp_path: Path
) -> None:
    """It is nobody's negative else."""
    shutil.copytree(tiny_data, tmp_path / "data")
    for path in (tmp_path / "data" / "events" / "domain=natural").glob("*/*.parquet"):
        frame = pl.read_parquet(path, hive_partitioning=False)
        frame.filter(pl.col("item_id") != "i20").write_parquet(path)
    log = EventLog(tmp_path / "data")
    dead = int(log.items.rows(np.array(["i20"]))[0])

    def place(catalogue_negatives: int) -> int:
        torch.manual_seed(0)
        config = replace(CONFIG, learning_rate=0.05, in_batch=0.0)
        model = Tpm(log, replace(config, catalogue_negatives=catalogue_negatives))
        train_tpm(model, log, tiny.FIRST, tiny.LAST, seed=0)
        with torch.no_grad():
            bias = model.items(torch.arange(len(log.items.ids)))[:, CONFIG.dim]
        return int(bias.argsort().argsort()[dead])

    assert place(2) < 4 < place(0)


@pytest.mark.parametrize(
    ("month", "num", "months"),
    [
        ("2017-10", 2, ["2017-09", "2017-10"]),
        ("2017-01", 3, ["2016-11", "2016-12", "2017-01"]),
        ("2017-05", 1, ["2017-05"]),
        ("2017-05", 0, []),
    ],
)
def test_months_until_a_month_are_counted_back_over_the_year(
    month: str, num: int, months: list[str]
) -> None:
    assert months_until(month, num) == months
