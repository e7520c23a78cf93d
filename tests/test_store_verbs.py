"""`ecdctr store`: what is in a store, which bundles need it, and what may go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from commands import WITHOUT, Run, run_process
from conftest import Exported
from servers import running_server
from test_imports import TRAINING_ONLY
from test_store import many_ids, window_of

from bundle.manifest import MANIFEST
from embeddings_store import (
    Store,
    StoreCorrupt,
    WindowRef,
    open_store,
    read_snapshot,
    write_snapshot,
)
from training.workspace import Workspace

OLD = window_of(many_ids(500), window="2016-06")


@pytest.fixture
def workspace(tiny_exported: Exported, tmp_path: Path) -> Workspace:
    """With a promoted bundle, and its window in the store."""
    return tiny.copy_workspace(tiny_exported.workspace, tmp_path / "workspace")


@pytest.fixture(params=["embedded", "redis"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "embedded":
        yield str(tmp_path / "windows")
        return
    with running_server() as server:
        yield server.url


@pytest.fixture
def store(url: str, workspace: Workspace) -> Iterator[Store]:
    """With the window that is needed, and an old one that nobody needs."""
    opened = open_store(url)
    opened.publish(workspace.pack(needed(workspace).window))
    opened.publish(OLD)
    yield opened
    opened.close()


def needed(workspace: Workspace) -> WindowRef:
    current = workspace.registry.current()
    assert current is not None
    window = workspace.registry.read(current.current).window
    return WindowRef(window.month, window.build)


def verb(workspace: Workspace, url: str, name: str, *more: str) -> list[str]:
    return ["--workspace", str(workspace.root), "store", name, "--store", url, *more]


def test_windows_are_listed_with_the_bundles_that_need_them(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    current = workspace.registry.current()
    assert current
    assert run(*verb(workspace, url, "windows")).out.splitlines() == [
        f"{OLD.ref}  no bundle needs it",
        f"{needed(workspace)}  {current.current}",
    ]


def test_stats_say_what_a_window_holds_and_takes(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    said = run(*verb(workspace, url, "stats")).out.splitlines()[0]
    assert said.startswith(f"{OLD.ref}  500 users, 500 items, D = 4, float32: ")
    size = int(said.split(": ")[1].split(" ")[0].replace(",", ""))
    payload = 1000 * (8 + 1 + 3 * 5 * 4)
    assert payload < size < 2.5 * payload
    assert said.endswith(f", {size / 1000:.1f} an entity")


def test_gc_removes_what_no_bundle_needs_and_nothing_else(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    assert run(*verb(workspace, url, "gc", "--dry-run")).out == f"{OLD.ref}  would be removed\n"
    assert store.windows() == [OLD.ref, needed(workspace)]
    assert run(*verb(workspace, url, "gc")).out == f"{OLD.ref}  removed\n"
    assert store.windows() == [needed(workspace)]
    assert run(*verb(workspace, url, "gc")).out == ""
    store.check(needed(workspace))


def test_gc_keeps_the_window_of_the_bundle_before_and_of_one_that_may_come(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    """Of three others with windows of their own: the previous, a later one, and an earlier one."""
    registry, current = workspace.registry, workspace.registry.current()
    assert current
    kept = [needed(workspace)]
    for name, month, asof in (
        ("previous", "2016-07", "2017-01-01"),
        ("later", "2016-08", "2017-12-01"),
        ("earlier", "2016-09", "2017-01-01"),
    ):
        ref = store.publish(window_of(many_ids(20), window=month))
        copy_with(registry.path(current.current), name, ref, asof)
        if name != "earlier":
            kept.append(ref)
    state = json.loads((registry.root / "current.json").read_text())
    (registry.root / "current.json").write_text(json.dumps({**state, "previous": "previous"}))
    run(*verb(workspace, url, "gc"))
    assert store.windows() == sorted(kept)


def copy_with(bundle: Path, name: str, window: WindowRef, asof: str) -> None:
    """A bundle beside another one, as far as gc looks at it."""
    manifest = json.loads((bundle / MANIFEST).read_text())
    manifest |= {"id": name, "asof": asof}
    manifest["window"] |= {"month": window.window, "build": window.build}
    (bundle.parent / name).mkdir()
    (bundle.parent / name / MANIFEST).write_text(json.dumps(manifest))


def test_without_a_promoted_bundle_nothing_is_removed(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    (workspace.registry.root / "current.json").unlink()
    said = run.refused(*verb(workspace, url, "gc"))
    assert said.endswith("no bundle has been promoted; is it the right registry?")
    assert len(store.windows()) == 2


def test_check_finds_what_is_damaged_and_what_is_missing(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    found = run(*verb(workspace, url, "check"))
    assert f"{OLD.ref}  whole\n{needed(workspace)}  whole" in found.out
    store.remove(needed(workspace))
    missing = run(*verb(workspace, url, "check"))
    current = workspace.registry.current()
    assert current
    assert missing.code == 1
    assert missing.err == (f"ecdctr: not in the store: {needed(workspace)} of {current.current}\n")


def test_check_compares_a_window_with_the_snapshots_that_are_there(
    run: Run, workspace: Workspace, store: Store, url: str
) -> None:
    ref = needed(workspace)
    found = run(*verb(workspace, url, "check"))
    assert (found.code, found.out) == (
        0,
        f"{OLD.ref}  whole\n{ref}  whole, equal to its snapshots\n",
    )
    month = ref.window
    items = read_snapshot(workspace.root, "items", month)
    write_snapshot(workspace.root, "items", replace(items, vectors=items.vectors + np.float32(1)))
    found = run(*verb(workspace, url, "check"))
    assert found.code == 1
    assert found.err.startswith(f"ecdctr: not what the snapshots give: {ref} (its snapshots give ")


def test_check_of_a_damaged_window_names_it(run: Run, workspace: Workspace, tmp_path: Path) -> None:
    url = str(tmp_path / "windows")
    store = open_store(url)
    store.publish(OLD)
    path = next(tmp_path.rglob(f"{OLD.ref}/users/block.npy"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreCorrupt):
        store.check(OLD.ref)
    assert "checksum" in run.refused(*verb(workspace, url, "check"))


def test_what_was_left_half_removed_is_listed_and_removed_when_asked(
    run: Run, workspace: Workspace, tmp_path: Path
) -> None:
    url = str(tmp_path / "windows")
    store = open_store(url)
    store.publish(OLD)
    folder = next(tmp_path.rglob(f"{OLD.ref}"))
    folder.rename(folder.with_name(f".{OLD.ref}.removed"))
    assert store.unfinished() == [OLD.ref]
    assert f"{OLD.ref}  unfinished" in run(*verb(workspace, url, "windows")).out
    assert run(*verb(workspace, url, "gc")).out == ""
    assert run(*verb(workspace, url, "gc", "--unfinished")).out == f"{OLD.ref}  removed\n"
    assert store.unfinished() == []


def test_a_machine_that_only_serves_can_look_after_the_store(workspace: Workspace) -> None:
    command = ["-c", WITHOUT.format(names=TRAINING_ONLY | {"scipy"})]
    found = run_process(command, *verb(workspace, str(workspace.root / "store"), "windows"))
    assert (found.code, found.err) == (0, "")
    assert str(needed(workspace)) in found.out
