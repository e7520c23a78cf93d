"""Drift: what turned together is told from what came apart, and the latter is held back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from scipy.stats import ortho_group

from embeddings_store import ENTITIES, Entity, Snapshot, read_snapshot
from training.config import TpmConfig
from training.drift import Drift, measure_drift, rotation
from training.tpm import Tpm, months_until, train_through
from training.workspace import Workspace, WorkspaceError

LOOSE = replace(tiny.RECIPE.tpm, min_cosine=-1.0, max_residual=float("inf"))
"""Holds nothing back."""
STRICT = replace(tiny.RECIPE.tpm, min_cosine=0.999999)
FIRST, SECOND, THIRD = tiny.MONTHS[:3]
Pair = Mapping[Entity, Snapshot]


@pytest.fixture
def workspace(tiny_data: Path, tmp_path: Path) -> Workspace:
    (tmp_path / "data").symlink_to(tiny_data)
    return Workspace(tmp_path)


def made_up(month: str, ids: range, seed: int = 0, dim: int = 8) -> Snapshot:
    """An id has the same vector in every snapshot of a seed."""
    vectors = np.random.default_rng(seed).normal(size=(1000, dim)).astype(np.float32)
    own = np.array(ids, np.uint64)
    return Snapshot(month, own, vectors[list(ids)], np.zeros(len(own), np.float32))


def turned(snapshot: Snapshot, matrix: np.ndarray) -> Snapshot:
    return replace(snapshot, vectors=(snapshot.vectors @ matrix).astype(np.float32))


def some_rotation(dim: int = 8) -> np.ndarray:
    matrix: np.ndarray = ortho_group.rvs(dim, random_state=1)
    return matrix


def read(workspace: Workspace, month: str) -> dict[Entity, Snapshot]:
    return {entity: read_snapshot(workspace.root, entity, month) for entity in ENTITIES}


def dots(pair: Pair) -> np.ndarray:
    products: np.ndarray = pair["users"].vectors @ pair["items"].vectors.T
    return products


def test_what_has_not_moved_has_no_drift_and_only_common_ids_count() -> None:
    drift = measure_drift("users", made_up(FIRST, range(500)), made_up(SECOND, range(100, 800)))
    assert (drift.entity, drift.common) == ("users", 400)
    assert drift.cosine == pytest.approx(1.0, abs=1e-6)
    assert drift.residual == pytest.approx(0.0, abs=1e-6)


def test_what_turned_as_one_has_a_low_cosine_and_no_residual() -> None:
    before, after = made_up(FIRST, range(500)), made_up(SECOND, range(500))
    drift = measure_drift("items", before, turned(after, some_rotation()))
    assert abs(drift.cosine) < 0.5
    assert drift.residual == pytest.approx(0.0, abs=1e-5)


def test_what_came_apart_has_a_residual_that_is_the_noise_s_share() -> None:
    before = made_up(FIRST, range(1000), dim=2)
    noise = 0.5 * made_up(SECOND, range(1000), seed=1, dim=2).vectors
    after = replace(before, vectors=before.vectors + noise)
    drift = measure_drift("items", before, after)
    assert drift.residual == pytest.approx(0.5, rel=0.05)
    assert 0.8 < drift.cosine < 0.95
    unrelated = measure_drift("items", made_up(FIRST, range(1000)), made_up(SECOND, range(1000), 1))
    assert abs(unrelated.cosine) < 0.05
    assert unrelated.residual > 1.2


def test_scale_is_drift_too() -> None:
    before = made_up(FIRST, range(100))
    drift = measure_drift("items", before, replace(before, vectors=2 * before.vectors))
    assert drift.cosine == pytest.approx(1.0, abs=1e-6)
    assert drift.residual == pytest.approx(1.0, abs=1e-6)


def test_snapshots_with_nothing_in_common_are_held_back() -> None:
    drift = measure_drift("users", made_up(FIRST, range(5)), made_up(SECOND, range(5, 9)))
    assert drift.common == 0
    assert len(drift.reasons(TpmConfig())) == 2


def test_the_reasons_name_what_was_measured_and_what_is_right() -> None:
    config = TpmConfig(min_cosine=0.7, max_residual=0.85)
    assert Drift("items", 3000, 0.7, 0.85).reasons(config) == []
    assert Drift("items", 3000, 0.51, 0.9).reasons(config) == [
        "items: cosine 0.510, at least 0.7 is right (3,000 in common)",
        "items: residual 0.900, at most 0.85 is right (3,000 in common)",
    ]


def test_the_rotation_brings_users_and_items_back_together() -> None:
    matrix = some_rotation()
    before: dict[Entity, Snapshot] = {
        "users": made_up(FIRST, range(40), seed=2),
        "items": made_up(FIRST, range(900)),
    }
    after = {entity: turned(snapshot, matrix) for entity, snapshot in before.items()}
    found = rotation(before, after)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, matrix.T, atol=1e-5)


def test_few_users_weigh_as_much_as_many_items() -> None:
    one, other = some_rotation(), ortho_group.rvs(8, random_state=2)
    before: dict[Entity, Snapshot] = {
        "users": made_up(FIRST, range(40), seed=2),
        "items": made_up(FIRST, range(900)),
    }
    after = {"users": turned(before["users"], one), "items": turned(before["items"], other)}
    found = rotation(before, after)  # type: ignore[arg-type]
    cosines = [
        measure_drift(entity, before[entity], turned(after[entity], found)).cosine  # type: ignore[index]
        for entity in ENTITIES
    ]
    assert cosines[0] == pytest.approx(cosines[1], abs=0.1)


def test_turning_a_model_keeps_every_dot_product_and_turns_what_it_leaves(
    workspace: Workspace,
) -> None:
    log = workspace.log()
    torch.manual_seed(0)
    model = Tpm(log, tiny.RECIPE.tpm)
    model.seen[:] = True
    before = model.snapshot(log, FIRST)
    matrix = some_rotation(4)
    model.turn(torch.from_numpy(matrix.astype(np.float32)))
    after = model.snapshot(log, FIRST)
    np.testing.assert_allclose(dots(after), dots(before), atol=1e-6)
    for entity in ENTITIES:
        expected = before[entity].vectors @ matrix
        np.testing.assert_allclose(after[entity].vectors, expected, atol=1e-6)
        np.testing.assert_array_equal(after[entity].biases, before[entity].biases)
    assert not np.allclose(after["items"].vectors, before["items"].vectors, atol=1e-3)


def trained(workspace: Workspace, alignment: str) -> dict[Entity, Snapshot]:
    """The second month, after a first one that starts from another seed."""
    config = replace(LOOSE, alignment=alignment)
    train_through(workspace, FIRST, 1, config, seed=5)
    assert train_through(workspace, SECOND, 1, config, seed=0) == [SECOND]
    return read(workspace, SECOND)


def apart(workspace: Workspace, name: str) -> Workspace:
    (workspace.root / name).mkdir()
    (workspace.root / name / "data").symlink_to(workspace.data)
    return Workspace(workspace.root / name)


def test_a_month_from_nothing_is_turned_onto_the_one_before(workspace: Workspace) -> None:
    one, other = apart(workspace, "none"), apart(workspace, "procrustes")
    free, aligned = trained(one, "none"), trained(other, "procrustes")
    np.testing.assert_allclose(dots(aligned), dots(free), atol=1e-5)
    before = read(other, FIRST)

    def cosine(pair: Pair) -> float:
        drifts = [measure_drift(entity, before[entity], pair[entity]) for entity in ENTITIES]
        return float(np.mean([drift.cosine for drift in drifts]))

    assert cosine(aligned) > cosine(free) + 0.05
    assert one.facts(f"tpm-{SECOND}", "")["drift"] != other.facts(f"tpm-{SECOND}", "")["drift"]


@pytest.mark.parametrize("alignment", ["none", "procrustes"])
def test_a_month_from_nothing_learns_from_its_own_months(
    workspace: Workspace, alignment: str
) -> None:
    trained(workspace, alignment)
    config = replace(LOOSE, alignment=alignment, history_months=2)
    train_through(workspace, THIRD, 1, config, seed=0)
    first = [workspace.facts(f"tpm-{month}", "")["first"] for month in (SECOND, THIRD)]
    assert first == [SECOND, SECOND]


def test_the_model_of_a_turned_month_is_turned_too(workspace: Workspace) -> None:
    aligned = trained(workspace, "procrustes")
    model = Tpm(workspace.log(), LOOSE)
    workspace.load_model(f"tpm-{SECOND}", model, "")
    for entity, snapshot in model.snapshot(workspace.log(), SECOND).items():
        np.testing.assert_array_equal(snapshot.vectors, aligned[entity].vectors)


def test_what_moved_too_far_is_held_back_and_nothing_is_trained_on_top(
    workspace: Workspace,
) -> None:
    assert train_through(workspace, THIRD, 3, STRICT, seed=0) == [FIRST]
    assert workspace.months() == [FIRST]
    assert list(workspace.held()) == [SECOND]
    assert all("cosine" in reason for reason in workspace.held()[SECOND])
    assert not workspace.has_model(f"tpm-{THIRD}")
    with pytest.raises(WorkspaceError, match=rf"{SECOND}, which is held back: users: cosine"):
        workspace.pack(THIRD)


def test_what_is_held_back_is_not_trained_again(workspace: Workspace) -> None:
    train_through(workspace, SECOND, 2, STRICT, seed=0)
    files = sorted(path for path in workspace.root.glob("[mh]*/**/*") if path.is_file())
    before = [(path, path.stat().st_mtime_ns) for path in files]
    # Not even by another configuration, nor a later month by itself.
    for month, num in ((SECOND, 2), (THIRD, 3), (THIRD, 1)):
        assert train_through(workspace, month, num, LOOSE, seed=0) == []
    files = sorted(path for path in workspace.root.glob("[mh]*/**/*") if path.is_file())
    assert [(path, path.stat().st_mtime_ns) for path in files] == before


def test_who_removes_what_is_held_back_has_it_trained_again(workspace: Workspace) -> None:
    train_through(workspace, SECOND, 2, STRICT, seed=0)
    (workspace.root / "held" / SECOND).rename(workspace.root / "gone")
    assert train_through(workspace, SECOND, 2, LOOSE, seed=0) == [SECOND]
    assert workspace.held() == {}


def test_a_released_month_is_what_it_would_have_been(workspace: Workspace) -> None:
    other = apart(workspace, "other")
    train_through(other, THIRD, 3, LOOSE, seed=0)
    train_through(workspace, THIRD, 3, STRICT, seed=0)
    workspace.release(SECOND)
    assert workspace.held() == {}
    assert workspace.months() == [FIRST, SECOND]
    assert train_through(workspace, THIRD, 3, LOOSE, seed=0) == [THIRD]
    assert workspace.pack(months_until(THIRD, 1)[0]).ref == other.pack(THIRD).ref


def test_what_is_not_held_back_can_not_be_released(workspace: Workspace) -> None:
    with pytest.raises(WorkspaceError, match="2017-01 is not held back, must be one of: none"):
        workspace.release("2017-01")


def test_what_a_killed_run_left_is_not_held(workspace: Workspace) -> None:
    train_through(workspace, SECOND, 2, STRICT, seed=0)
    held = workspace.root / "held"
    (held / SECOND).rename(held / f".{SECOND}.7")
    assert workspace.held() == {}


def test_a_snapshot_that_is_broken_off_half_way_is_not_held_and_not_there(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_through(workspace, FIRST, 1, STRICT, seed=0)
    with monkeypatch.context() as patch:
        patch.setattr("training.workspace.json.dumps", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            workspace.hold(SECOND, read(workspace, FIRST), ["moved"])
    assert workspace.held() == {}
    assert [path.name for path in (workspace.root / "held").iterdir()] == []
    train_through(workspace, SECOND, 1, STRICT, seed=0)
    # A run that was killed before its items left users alone.
    (workspace.root / "snapshots" / SECOND / "users").mkdir(parents=True)
    workspace.release(SECOND)
    assert workspace.months() == [FIRST, SECOND]
    assert read(workspace, SECOND).keys() == set(ENTITIES)
