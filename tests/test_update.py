"""The daily update: it trains what is due, says what it did, and no kill leaves it half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import killer
import numpy as np
import pytest
import tiny
import torch
from commands import Run
from conftest import ROOT

import training.export
import training.recipes
from bundle.manifest import verify
from embeddings_store import EmbeddedStore, WindowRef
from training.actr import actr_days, load_actr, train_actr
from training.checks import InputError
from training.config import GatesConfig, Schedule
from training.events import DataError
from training.examples import Builder, DayCache, builder_for, first_month, window_month
from training.update import Outcome, run_update
from training.workspace import Workspace, WorkspaceError

BEGUN = date(2017, 3, 30)
NEXT = tiny.ASOF
ONE_DAY = timedelta(days=1)
STRICT = Schedule(cpm_days=5, gates=GatesConfig(min_spread=1e9))
UNMOVED = replace(tiny.RECIPE, tpm=replace(tiny.RECIPE.tpm, min_cosine=1.1))
"""No month is near enough to the one before it."""
HOLDER = """
import fcntl, sys, time
with open(sys.argv[1], "a+") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    file.write("process 17 on there since 2017-04-05 01:02:03 UTC")
    file.flush()
    print("held", flush=True)
    time.sleep(60)
"""


@dataclass(frozen=True)
class Updated:
    workspace: Workspace
    outcome: Outcome


def update(workspace: Workspace, asof: date, *tiers: str, **options: object) -> Outcome:
    chosen = {"tiers": tiers} if tiers else {}
    recipe, schedule = options.pop("recipe", tiny.RECIPE), options.pop("schedule", killer.SCHEDULE)
    return run_update(workspace, asof, recipe, schedule, **chosen, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def graphs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.getbasetemp() / "graphs"
    original = killer.remember_graphs(folder)
    yield folder
    training.export.export_graph = original


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path, graphs: Path) -> Updated:
    """The first update of an empty workspace."""
    root = tmp_path_factory.mktemp("begun") / "workspace"
    root.mkdir()
    (root / "data").symlink_to(tiny_data)
    return Updated(Workspace(root), update(Workspace(root), BEGUN))


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory, begun: Updated) -> Updated:
    """A later one, for which all tiers are due."""
    workspace = copied(begun.workspace, tmp_path_factory.mktemp("updated"))
    return Updated(workspace, update(workspace, NEXT))


def copied(workspace: Workspace, folder: Path) -> Workspace:
    return Workspace(Path(shutil.copytree(workspace.root, folder / "copy", symlinks=True)))


@pytest.fixture(scope="module")
def refused(tmp_path_factory: pytest.TempPathFactory, begun: Updated) -> Updated:
    """A later one again, whose bundle one gate is not content with."""
    workspace = copied(begun.workspace, tmp_path_factory.mktemp("refused"))
    return Updated(workspace, update(workspace, NEXT, schedule=STRICT))


@pytest.fixture
def workspace(begun: Updated, tmp_path: Path) -> Workspace:
    """A copy of `begun`, to be changed."""
    return copied(begun.workspace, tmp_path)


@pytest.fixture
def empty(tiny_data: Path, tmp_path: Path) -> Workspace:
    """Data and nothing else."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "data").symlink_to(tiny_data)
    return Workspace(tmp_path / "empty")


def spans(outcome: Outcome) -> dict[str, tuple[str, str]]:
    return {tier: (did.first, did.last) for tier, did in outcome.trained.items()}


def test_the_first_update_trains_all_that_its_rows_need(begun: Updated) -> None:
    """Rows from 15 March on see February's window, whose first month is December."""
    assert spans(begun.outcome) == {
        "tpm": ("2016-12", "2017-02"),
        "cpm": ("2017-03-23", "2017-03-29"),
        "actr": ("2017-03-15", "2017-03-28"),
    }
    assert begun.outcome.promoted
    assert begun.outcome.lines()[-1] == f"{begun.outcome.bundle_id} is live now"


def test_what_went_live_says_what_it_was_made_from(begun: Updated) -> None:
    registry = begun.workspace.registry
    current = registry.current()
    assert current
    assert current.current == begun.outcome.bundle_id == begun.outcome.live
    manifest = verify(registry.path(current.current))
    assert manifest.lineage.cpm_id == f"cpm-{BEGUN}"
    assert (manifest.lineage.actr_from, manifest.lineage.actr_to) == ("2017-03-15", "2017-03-28")
    begun.workspace.store.check(WindowRef(manifest.window.month, manifest.window.build))


def test_a_later_update_trains_only_what_is_due(updated: Updated) -> None:
    assert spans(updated.outcome) == {
        "tpm": ("2017-03", "2017-03"),
        "cpm": ("2017-03-29", "2017-04-04"),
        "actr": ("2017-03-21", "2017-04-03"),
    }
    assert updated.outcome.promoted


def test_a_second_run_changes_nothing(updated: Updated, tmp_path: Path) -> None:
    workspace = copied(updated.workspace, tmp_path)
    before = killer.content(workspace.root)
    outcome = update(workspace, NEXT)
    assert outcome.lines() == ["nothing to do"]
    assert outcome.export_cpu_s == 0
    assert (outcome.live, outcome.bundle_id) == (updated.outcome.live, updated.outcome.bundle_id)
    assert killer.content(workspace.root) == before


@pytest.mark.parametrize(("age", "due"), [(4, False), (5, True), (6, True)])
def test_cpm_is_trained_anew_at_its_age(workspace: Workspace, age: int, due: bool) -> None:
    outcome = update(workspace, BEGUN + age * ONE_DAY, "cpm")
    assert ("cpm" in outcome.trained) == due


@pytest.mark.parametrize(("day", "months"), [(31, []), (32, ["2017-03"])])
def test_tpm_is_trained_once_its_month_has_ended(
    workspace: Workspace, day: int, months: list[str]
) -> None:
    before = workspace.months()
    outcome = update(workspace, date(2017, 3, 1) + (day - 1) * ONE_DAY, "tpm")
    assert workspace.months() == before + months
    assert ("tpm" in outcome.trained) == bool(months)


def test_actr_starts_from_the_newest_cpm_up_to_its_day(workspace: Workspace) -> None:
    models = workspace.root / "models"
    for day in (date(2017, 3, 28), date(2017, 4, 1)):
        shutil.copytree(models / f"cpm-{BEGUN}", models / f"cpm-{day}")
    train_actr(workspace, BEGUN + ONE_DAY, tiny.RECIPE.network, tiny.RECIPE.actr, seed=0)
    facts = workspace.facts(f"actr-{BEGUN + ONE_DAY}", "")
    assert facts["cpm"]["name"] == f"cpm-{BEGUN}"


def test_nothing_is_learned_of_the_held_out_day(
    workspace: Workspace, tiny_data: Path, tmp_path: Path
) -> None:
    """But for the correction of the calibration; of the day before it weights are, too."""
    config = replace(tiny.RECIPE.actr, holdout_days=1)
    made = {}
    for day in (None, BEGUN - ONE_DAY, BEGUN - 2 * ONE_DAY):
        if day:
            workspace.data.unlink()
            other = tiny.alter_from(tiny_data, tmp_path / f"from-{day}", day, remove=False)
            workspace.data.symlink_to(other)
        train_actr(workspace, BEGUN, tiny.RECIPE.network, config, seed=0)
        made[day] = load_actr(workspace, BEGUN, tiny.RECIPE.network)
    first, same, other = made.values()
    weights = [actr.network.logit.weight for actr in made.values()]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    before = [actr.offset - actr.correction for actr in made.values()]
    assert before[0] == pytest.approx(before[1], abs=1e-9)
    assert before[0] != pytest.approx(before[2], abs=1e-9)
    assert 0 != first.correction != same.correction != 0
    assert other.correction != 0


def test_a_model_trained_by_hand_is_trained_again_with_a_day_held_out(
    workspace: Workspace,
) -> None:
    shutil.rmtree(workspace.root / "registry")
    train_actr(workspace, BEGUN, tiny.RECIPE.network, tiny.RECIPE.actr, seed=0)
    outcome = update(workspace, BEGUN, "actr")
    assert spans(outcome) == {"actr": ("2017-03-15", "2017-03-28")}
    assert outcome.promoted


# What is not there


def test_a_log_that_is_too_young_is_one_line(empty: Workspace) -> None:
    with pytest.raises(WorkspaceError, match=r"2017-03-02 is too early: .* first .* is 2016-12"):
        update(empty, date(2017, 3, 2))
    assert not (empty.root / "models").exists()


def test_a_month_that_the_log_begins_within_does_not_count(
    empty: Workspace, tiny_data: Path
) -> None:
    assert first_month(empty.log()) == "2016-12"
    data = empty.root / "later"
    shutil.copytree(tiny_data, data)
    shutil.rmtree(data / "events" / "domain=natural" / "date=2016-12-01")
    empty.data.unlink()
    empty.data.symlink_to(data)
    assert first_month(empty.log()) == "2017-01"
    assert window_month(empty, date(2017, 3, 1)) is None
    assert window_month(empty, date(2017, 4, 1)) == "2017-03"


def test_a_month_that_is_late_leaves_the_window_before_it(workspace: Workspace) -> None:
    outcome = update(workspace, NEXT, "cpm")
    assert outcome.notes == ["window 2017-02 serves, that of 2017-03 is not there"]
    assert window_month(workspace, NEXT) == "2017-02"
    update(workspace, NEXT, "tpm")
    assert window_month(workspace, NEXT) == "2017-03"


def test_a_day_that_is_missing_stops_all_before_anything_is_trained(
    workspace: Workspace, tiny_data: Path, tmp_path: Path
) -> None:
    without(workspace, tiny_data, tmp_path, date(2017, 4, 2))
    before = killer.content(workspace.root)
    with pytest.raises(ValueError, match="2017-04-02"):
        update(workspace, NEXT)
    assert killer.content(workspace.root) == before


def test_a_missing_day_can_be_allowed_and_the_day_before_is_held_out(
    workspace: Workspace, tiny_data: Path, tmp_path: Path
) -> None:
    without(workspace, tiny_data, tmp_path, BEGUN)
    outcome = update(workspace, BEGUN + ONE_DAY, "actr", allow_missing_days=1)
    assert spans(outcome) == {"actr": ("2017-03-15", "2017-03-28")}
    assert outcome.promoted


def without(workspace: Workspace, data: Path, folder: Path, day: date) -> None:
    """Takes a day out of a workspace's log."""
    shutil.copytree(data, folder / "data")
    for path in (folder / "data").glob(f"*/**/date={day}"):
        shutil.rmtree(path)
    workspace.data.unlink()
    workspace.data.symlink_to(folder / "data")


def test_a_day_that_is_not_whole_yet_is_missing_and_the_day_before_is_held_out(
    workspace: Workspace, tiny_data: Path, tmp_path: Path
) -> None:
    """Its impressions have arrived, what was taken has not."""
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "behaviour" / f"date={BEGUN}")
    workspace.data.unlink()
    workspace.data.symlink_to(tmp_path / "data")
    with pytest.raises(InputError, match=f"{BEGUN}"):
        update(workspace, BEGUN + ONE_DAY, "actr")
    outcome = update(workspace, BEGUN + ONE_DAY, "actr", allow_missing_days=1)
    assert spans(outcome) == {"actr": ("2017-03-15", "2017-03-28")}


@pytest.mark.parametrize("tier", ["tpm", "cpm"])
def test_a_tier_does_not_mind_a_day_that_it_does_not_read(
    workspace: Workspace, tiny_data: Path, tmp_path: Path, tier: str
) -> None:
    shutil.copytree(tiny_data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "events" / "domain=ad" / "date=2017-04-02")
    workspace.data.unlink()
    workspace.data.symlink_to(tmp_path / "data")
    assert tier in update(workspace, NEXT, tier).trained
    with pytest.raises(InputError, match="2017-04-02"):
        update(workspace, NEXT, "actr")


# What is held back


def test_a_month_that_moved_too_far_is_held_back_and_the_window_before_it_serves(
    workspace: Workspace,
) -> None:
    outcome = update(workspace, NEXT, "tpm", "cpm", recipe=UNMOVED)
    assert set(outcome.trained) == {"tpm", "cpm"}
    assert workspace.months()[-1] == "2017-02"
    held, stale = outcome.notes
    assert held.startswith("2017-03 is held back: users: cosine ")
    assert stale == "window 2017-02 serves, that of 2017-03 is not there"
    again = update(workspace, NEXT, "tpm", "cpm", recipe=UNMOVED)
    assert (again.trained, again.notes) == ({}, outcome.notes)


def test_a_month_that_is_held_back_can_be_released(workspace: Workspace) -> None:
    update(workspace, NEXT, "tpm", recipe=UNMOVED)
    for _ in range(2):
        outcome = update(workspace, NEXT, "tpm", recipe=UNMOVED, release="2017-03")
        assert (outcome.trained, outcome.notes) == ({}, [])
        assert workspace.months()[-1] == "2017-03"
    with pytest.raises(WorkspaceError, match="2017-04 is not held back"):
        update(workspace, NEXT, "tpm", release="2017-04")
    with pytest.raises(WorkspaceError, match="2017-03 can only be released where tpm"):
        update(workspace, NEXT, "cpm", release="2017-03")


# The lag


def windows_of(builder: Builder, *days: date) -> list[str | None]:
    refs = (builder.window(day).ref for day in days)
    return [ref.window if ref else None for ref in refs]


def test_rows_and_bundles_see_a_month_only_after_the_lag(updated: Updated, tmp_path: Path) -> None:
    """March ended on the 31st: with a lag of 3 days, rows of 4 April are the first to see it."""
    workspace = copied(updated.workspace, tmp_path)
    days = [date(2017, 4, day) for day in (1, 2, 3, 4, 5)]
    builder = builder_for(workspace, workspace.log(), days[0], days[-1])
    assert windows_of(builder, *days) == ["2017-03"] * 5
    shutil.rmtree(workspace.root / "models")
    workspace.keep_lag(3)
    builder = builder_for(Workspace(workspace.root), workspace.log(), days[0], days[-1])
    assert windows_of(builder, *days) == ["2017-02"] * 3 + ["2017-03"] * 2
    assert [window_month(workspace, day) for day in days] == windows_of(builder, *days)


def test_rows_of_days_within_the_lag_do_not_depend_on_the_month(
    updated: Updated, tmp_path: Path
) -> None:
    """The planted leak: another March must not move a row of 3 April, and does that of the 4th."""
    workspace, day = copied(updated.workspace, tmp_path), date(2017, 4, 3)
    shutil.rmtree(workspace.root / "models")
    workspace.keep_lag(3)

    def rows(day: date) -> np.ndarray:
        log = workspace.log()
        examples = builder_for(workspace, log, day, day).days("ad", day, day)
        return examples.batch(np.arange(len(examples)))["item_window"].numpy()

    before = [rows(day), rows(day + ONE_DAY)]
    snapshots = workspace.root / "snapshots"
    shutil.rmtree(snapshots / "2017-03")
    shutil.copytree(snapshots / "2017-02", snapshots / "2017-03")
    for meta in snapshots.glob("2017-03/*/meta.json"):
        meta.write_text(meta.read_text().replace("2017-02", "2017-03"))
    np.testing.assert_array_equal(rows(day), before[0])
    assert not np.array_equal(rows(day + ONE_DAY), before[1])


def test_tpm_waits_for_the_lag(empty: Workspace) -> None:
    schedule = Schedule(tpm_lag_days=2)
    update(empty, date(2017, 4, 2), "tpm", schedule=schedule)
    assert empty.months()[-1] == "2017-02"
    update(empty, date(2017, 4, 3), "tpm", schedule=schedule)
    assert empty.months()[-1] == "2017-03"


def test_the_lag_of_a_workspace_with_models_stays(begun: Updated, tmp_path: Path) -> None:
    workspace = copied(begun.workspace, tmp_path)
    with pytest.raises(WorkspaceError, match=r"lag of 2 days .* was trained with 0"):
        update(workspace, NEXT, schedule=Schedule(tpm_lag_days=2))
    assert workspace.lag_days == 0


# Who is live


def test_what_was_rolled_back_stays_so(updated: Updated, tmp_path: Path) -> None:
    workspace = copied(updated.workspace, tmp_path)
    workspace.registry.rollback()
    outcome = update(workspace, NEXT)
    assert outcome.notes == [f"{updated.outcome.bundle_id} was rolled back, and stays so"]
    current = workspace.registry.current()
    assert current
    assert current.current == outcome.live != updated.outcome.bundle_id


def test_an_earlier_day_does_not_replace_a_later_one(updated: Updated, tmp_path: Path) -> None:
    workspace = copied(updated.workspace, tmp_path)
    (workspace.root / "registry" / "current.json").unlink()
    workspace.registry.promote(str(updated.outcome.bundle_id))
    outcome = update(workspace, BEGUN)
    assert outcome.live == updated.outcome.bundle_id
    assert outcome.notes == [f"{outcome.live} of a later day is live, and stays so"]


def test_the_window_goes_into_another_store_too(updated: Updated, tmp_path: Path) -> None:
    workspace, store = copied(updated.workspace, tmp_path), EmbeddedStore(tmp_path / "other")
    update(workspace, NEXT, store=store)
    window = workspace.registry.read(str(updated.outcome.bundle_id)).window
    store.check(WindowRef(window.month, window.build))


def test_the_window_of_a_refused_bundle_goes_nowhere(refused: Updated, tmp_path: Path) -> None:
    store = EmbeddedStore(tmp_path / "other")
    assert update(refused.workspace, NEXT, schedule=STRICT, store=store).refused
    assert store.windows() == []


def test_snapshots_that_changed_since_are_not_published(updated: Updated, tmp_path: Path) -> None:
    workspace, store = copied(updated.workspace, tmp_path), EmbeddedStore(tmp_path / "other")
    snapshots = workspace.root / "snapshots"
    shutil.rmtree(snapshots / "2017-03" / "users")
    shutil.copytree(snapshots / "2017-02" / "users", snapshots / "2017-03" / "users")
    meta = snapshots / "2017-03" / "users" / "meta.json"
    meta.write_text(meta.read_text().replace("2017-02", "2017-03"))
    with pytest.raises(WorkspaceError, match="snapshots have changed"):
        update(workspace, NEXT, store=store)
    assert store.windows() == []


def test_a_refused_bundle_is_kept_with_its_reasons_and_the_live_one_goes_on(
    refused: Updated, begun: Updated
) -> None:
    outcome = refused.outcome
    assert (outcome.promoted, outcome.live) == (False, begun.outcome.bundle_id)
    assert [reason.split()[0] for reason in outcome.refused] == ["spread"]
    assert outcome.lines()[-2:] == [
        f"{outcome.bundle_id} is refused, {outcome.live} stays live",
        *outcome.refused,
    ]
    manifest = refused.workspace.registry.read(str(outcome.bundle_id))
    assert {gate.gate for gate in manifest.gates if not gate.passed} == {"spread"}
    again = update(refused.workspace, NEXT, schedule=STRICT)
    assert (again.trained, again.refused) == ({}, outcome.refused)


def test_a_refused_bundle_goes_live_by_force_and_says_so(refused: Updated, tmp_path: Path) -> None:
    workspace = copied(refused.workspace, tmp_path)
    outcome = update(workspace, NEXT, schedule=STRICT, force=True)
    assert outcome.promoted
    assert outcome.bundle_id != refused.outcome.bundle_id
    assert workspace.registry.read(str(outcome.bundle_id)).forced
    assert update(workspace, NEXT, schedule=STRICT).lines() == ["nothing to do"]


def test_force_changes_nothing_about_a_good_bundle(updated: Updated, tmp_path: Path) -> None:
    workspace = copied(updated.workspace, tmp_path)
    assert update(workspace, NEXT, force=True).lines() == ["nothing to do"]
    assert not workspace.registry.read(str(updated.outcome.bundle_id)).forced


# The command line


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(training.recipes, "complete_journey", lambda: tiny.RECIPE)
    return Run(capsys)


def test_a_second_run_on_the_command_line_says_that_there_is_nothing_to_do(
    run: Run, updated: Updated
) -> None:
    found = run("--workspace", updated.workspace.root, "update", "--asof", NEXT)
    assert (found.code, found.out) == (0, "nothing to do\n")


def test_a_refusal_on_the_command_line_is_exit_code_3_with_its_reasons(
    run: Run, refused: Updated
) -> None:
    found = run("--workspace", refused.workspace.root, "update", "--asof", NEXT)
    said = f"{refused.outcome.bundle_id} is refused, {refused.outcome.live} stays live\n"
    assert found.code == 3
    assert found.out == said + "\n".join(refused.outcome.refused) + "\n"


def test_one_tier_on_the_command_line_is_that_tier(run: Run, workspace: Workspace) -> None:
    arguments = ("--workspace", workspace.root, "update", "--asof", "2017-04-10", "--only", "cpm")
    assert "trained cpm on 2017-04-03 to 2017-04-09" in run(*arguments).out
    assert workspace.models()[:3] == [f"actr-{BEGUN}", f"cpm-{BEGUN}", "cpm-2017-04-10"]


@pytest.mark.parametrize("verb", ["update", "train cpm"])
def test_a_lock_on_the_command_line_is_one_line(
    run: Run, workspace: Workspace, holder: subprocess.Popen[str], verb: str
) -> None:
    said = run.refused("--workspace", workspace.root, *verb.split(), "--asof", NEXT)
    assert said == (
        "ecdctr: cpm is being made by process 17 on there since 2017-04-05 01:02:03 UTC;"
        " run this again when that has ended"
    )


def test_a_workspace_without_data_gets_no_locks(run: Run, tmp_path: Path) -> None:
    said = run.refused("--workspace", tmp_path / "none", "update", "--asof", NEXT)
    assert said.endswith("holds no data set; run 'ecdctr import' first")
    assert not (tmp_path / "none").exists()


# Several at once, and kills


@pytest.fixture
def holder(workspace: Workspace) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock of CPM."""
    (workspace.root / "locks").mkdir(exist_ok=True)
    (workspace.root / "locks" / "cpm").write_text("")
    command = [sys.executable, "-c", HOLDER, str(workspace.root / "locks" / "cpm")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_two_at_one_tier_is_one_line_that_says_who(
    workspace: Workspace, holder: subprocess.Popen[str]
) -> None:
    with pytest.raises(WorkspaceError) as refused:
        update(workspace, NEXT, "cpm")
    assert "cpm is being made by process 17 on there since" in str(refused.value)
    assert "tpm" in update(workspace, NEXT, "tpm").trained


def test_a_lock_dies_with_its_process_and_can_be_waited_for(
    workspace: Workspace, holder: subprocess.Popen[str]
) -> None:
    with subprocess.Popen(["sh", "-c", f"sleep 0.5; kill -9 {holder.pid}"]):
        assert "cpm" in update(workspace, NEXT, "cpm", wait_s=30.0).trained


def test_what_a_killed_run_left_is_removed_by_the_next_of_the_same_tier(
    updated: Updated, tmp_path: Path
) -> None:
    root = copied(updated.workspace, tmp_path).root
    left = {
        "actr": ["models/.actr-2017-04-05.9", "models/.actr-2017-04-05.9.replaced"],
        "cpm": ["models/.cpm-2017-04-05.9"],
        "tpm": ["models/.tpm-2017-03.9", "held/.2017-03.9"],
    }
    left["actr"] += ["registry/.draft-9-0123abcd"]
    for names in left.values():
        for name in names:
            (root / name).mkdir(parents=True)
    (root / "registry" / ".current-9.json").touch()
    for tier in ("tpm", "cpm", "actr"):
        assert all((root / name).exists() for name in left[tier])
        update(Workspace(root), NEXT, tier)
        assert not any((root / name).exists() for name in left[tier])
    assert not (root / "registry" / ".current-9.json").exists()


def run_killer(graphs: Path, *arguments: object) -> dict[str, Any]:
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
        "GRAPHS": str(graphs),
    }
    command = [sys.executable, str(ROOT / "tests" / "killer.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environ, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_three_tiers_at_the_same_time_leave_a_whole_workspace(
    begun: Updated, graphs: Path, tmp_path: Path
) -> None:
    """On the first of a month all jobs may start together; A-CTR takes what is there by then."""
    root = tmp_path / "workspace"
    assert run_killer(graphs, "together", begun.workspace.root, root, NEXT) == {
        "tpm": 0,
        "cpm": 0,
        "actr": 0,
    }
    workspace = Workspace(root)
    current = workspace.registry.current()
    assert current
    manifest = verify(workspace.registry.path(current.current))
    assert manifest.asof == f"{NEXT}"
    assert manifest.window.month in ("2017-02", "2017-03")
    assert manifest.lineage.cpm_id in (f"cpm-{BEGUN}", f"cpm-{NEXT}")
    workspace.store.check(WindowRef(manifest.window.month, manifest.window.build))
    assert workspace.months()[-1] == "2017-03"
    assert update(workspace, NEXT).lines() == ["nothing to do"]


def test_an_update_that_was_killed_anywhere_is_finished_by_the_next_run(
    begun: Updated, updated: Updated, graphs: Path, tmp_path: Path
) -> None:
    """Killed before each rename, when all that it would make visible is there as a draft."""
    found = run_killer(graphs, "kill", begun.workspace.root, tmp_path, NEXT, "os.rename")
    check_kills(found, at_least=8)
    expected = killer.content(updated.workspace.root)
    assert killer.content(tmp_path / "reference") == expected


@pytest.mark.timeout(3600)
@pytest.mark.skipif("ECDCTR_KILL_ALL" not in os.environ, reason="ECDCTR_KILL_ALL=1 runs it")
@pytest.mark.parametrize("first", [True, False], ids=["from-nothing", "from-the-day-before"])
def test_any_operation_of_an_update_can_be_its_last(
    begun: Updated, empty: Workspace, graphs: Path, tmp_path: Path, first: bool
) -> None:
    """Minutes: each of the two updates is killed at each of its operations in turn."""
    before, day = (empty, BEGUN) if first else (begun.workspace, NEXT)
    (tmp_path / "scratch").mkdir()
    found = run_killer(graphs, "kill", before.root, tmp_path / "scratch", day, "")
    check_kills(found, at_least=len(found["operations"]))


def check_kills(found: dict[str, Any], at_least: int) -> None:
    killed = found["killed"]
    assert len(killed) >= at_least
    assert all(one["to_do"] for one in killed.values())
    assert {n: one["different"] for n, one in killed.items() if one["different"]} == {}


# What updates share


@pytest.fixture
def cache(begun: Updated) -> DayCache:
    return DayCache(begun.workspace.log(), NEXT, size=3)


def test_days_from_the_cache_are_those_built_anew(updated: Updated, cache: DayCache) -> None:
    workspace = Workspace(updated.workspace.root)
    first, last = date(2017, 3, 30), date(2017, 4, 2)
    expected = builder_for(workspace, workspace.log(), first, last).days("ad", first, last)
    workspace.cache = cache
    for _ in range(2):
        builder = builder_for(workspace, workspace.log(), first, last)
        found = builder.days("ad", first, last)
        rows = np.arange(len(expected))
        for name, tensor in expected.batch(rows).items():
            assert torch.equal(found.batch(rows)[name], tensor), name
        for name in ("label", "weight", "user_row", "request_id", "day"):
            np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))


def test_a_cached_day_is_built_once_and_the_oldest_are_let_go(
    updated: Updated, cache: DayCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[date] = []
    original = Builder._day

    def counted(self: Builder, day: date, rows: object) -> object:
        built.append(day)
        return original(self, day, rows)  # type: ignore[arg-type]

    monkeypatch.setattr(Builder, "_day", counted)
    workspace = Workspace(updated.workspace.root)
    workspace.cache = cache
    days = [date(2017, 3, 28) + i * ONE_DAY for i in range(4)]
    for day in days:
        builder_for(workspace, cache.log, days[0], day).days("ad", max(days[0], day - ONE_DAY), day)
    assert built == days
    builder_for(workspace, cache.log, days[0], days[0]).days("ad", days[0], days[0])
    assert built == [*days, days[0]]


def test_a_window_that_came_later_is_another_day(workspace: Workspace, tmp_path: Path) -> None:
    """A day that was built before its month's snapshot was there is not taken for one with it."""
    workspace.cache = DayCache(workspace.log(), NEXT)
    day = date(2017, 4, 2)
    before = builder_for(workspace, workspace.log(), day, day).days("ad", day, day)
    update(workspace, NEXT, "tpm")
    after = builder_for(workspace, workspace.log(), day, day).days("ad", day, day)
    assert not np.array_equal(before.item_windows.vectors, after.item_windows.vectors)


def test_a_day_behind_the_end_of_the_cache_is_refused(updated: Updated, cache: DayCache) -> None:
    workspace = Workspace(updated.workspace.root)
    workspace.cache = cache
    with pytest.raises(ValueError, match=f"{NEXT} is not before {NEXT}"):
        builder_for(workspace, cache.log, NEXT, NEXT)


def test_actr_days_end_before_what_is_held_out() -> None:
    config = replace(tiny.RECIPE.actr, days=3)
    assert actr_days(NEXT, config) == (date(2017, 4, 2), date(2017, 4, 4))
    config = replace(config, holdout_days=2)
    assert actr_days(NEXT, config) == (date(2017, 3, 31), date(2017, 4, 2))


def test_a_log_without_natural_days_is_an_error(empty: Workspace, tiny_data: Path) -> None:
    data = empty.root / "later"
    shutil.copytree(tiny_data, data)
    shutil.rmtree(data / "events" / "domain=natural")
    empty.data.unlink()
    empty.data.symlink_to(data)
    with pytest.raises(DataError, match="domain=natural"):
        update(empty, NEXT)
