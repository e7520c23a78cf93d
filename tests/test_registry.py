"""The registry: complete bundles only, one of them current, and never a moment without."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from bundles import Place, add_bundle, make_place

from bundle.manifest import BundleError
from bundle.registry import Current, Registry, RegistryError

ROOT = Path(__file__).parent.parent
BAD_IDS = ["..", "../other", "a/b", "/etc", "", ".hidden", "a\0b", "a" * 101, "a\n", "nothing"]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def pointer(registry: Registry) -> Path:
    return registry.root / "current.json"


def damage(registry: Registry, bundle_id: str) -> None:
    (registry.path(bundle_id) / "actr.onnx").write_bytes(b"damaged")


def run_beside(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Runs code with a `registry` in another process."""
    begin = "import os, shutil, signal, sys, pathlib; from bundle.registry import Registry\n"
    begin += "registry = Registry(pathlib.Path(sys.argv[1]))\n"
    command = [sys.executable, "-c", begin + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT)


def names(registry: Registry) -> tuple[str, str | None]:
    current = registry.current()
    assert current
    return current.current, current.previous


def test_published_bundles_are_listed_and_read_and_none_of_them_is_current(place: Place) -> None:
    assert place.registry.ids() == []
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 1.0)]
    assert place.registry.ids() == sorted(ids)
    assert place.registry.read(ids[1]).id == ids[1]
    assert place.registry.path(ids[1]).name == ids[1]
    assert place.registry.current() is None


def test_publishing_the_same_bundle_twice_is_fine(place: Place) -> None:
    first = add_bundle(place)
    inode = place.registry.path(first).stat().st_ino
    assert add_bundle(place) == first
    assert place.registry.ids() == [first]
    assert place.registry.path(first).stat().st_ino == inode


def test_publishing_over_a_damaged_bundle_says_so(place: Place) -> None:
    damage(place.registry, add_bundle(place))
    with pytest.raises(BundleError, match=r"actr.onnx: checksum"):
        add_bundle(place)


def test_a_draft_that_changed_after_sealing_is_not_published(place: Place) -> None:
    source = place.registry.path(add_bundle(place))
    with place.registry.draft() as draft:
        shutil.copytree(source, draft, dirs_exist_ok=True)
        (draft / "golden.json").write_text("[]")
        with pytest.raises(BundleError, match=r"golden.json: checksum differs"):
            place.registry.publish(draft)
    assert place.registry.ids() == [source.name]


@pytest.mark.parametrize("asof", ["../../out", "/tmp/out", ".hidden", ""])
def test_a_bundle_whose_id_is_a_path_stays_out(place: Place, asof: str) -> None:
    before = sorted(place.registry.root.parent.rglob("*"))
    with pytest.raises(BundleError, match="can't be the id of a bundle"):
        add_bundle(place, asof=asof)
    added = set(place.registry.root.parent.rglob("*")) - set(before)
    assert added <= {place.registry.root / "bundles"}


def test_a_draft_is_gone_after_its_block_published_or_not(place: Place) -> None:
    add_bundle(place)
    with contextlib.suppress(ZeroDivisionError), place.registry.draft() as draft:
        (draft / "half").touch()
        raise ZeroDivisionError
    assert not draft.exists()
    assert {path.name for path in place.registry.root.iterdir()} == {"bundles"}


def test_what_a_crash_leaves_behind_is_invisible(place: Place) -> None:
    bundle_id = add_bundle(place)
    place.registry.promote(bundle_id)
    root = place.registry.root

    crash = """
        draft = registry.draft().__enter__()
        shutil.copytree(registry.path(sys.argv[2]), draft, dirs_exist_ok=True)
        (registry.root / ".current-1.json").write_text('{"current"')
        os.kill(os.getpid(), signal.SIGKILL)
    """
    assert run_beside(crash, root, bundle_id).wait() == -signal.SIGKILL
    left = [path for path in root.iterdir() if path.name.startswith(".draft-")]
    assert len(left) == 1
    (root / "bundles" / "unfinished").mkdir()
    assert place.registry.ids() == [bundle_id]
    assert names(place.registry) == (bundle_id, None)
    with pytest.raises(RegistryError):
        place.registry.promote(left[0].name)
    other = add_bundle(place, bias=1.0)
    assert place.registry.promote(other).previous == bundle_id


def test_promoting_keeps_what_was_current_and_twice_is_once(place: Place) -> None:
    first, second = (add_bundle(place, bias=bias) for bias in (0.0, 1.0))
    assert place.registry.promote(first).previous is None
    changed = place.registry.promote(second)
    assert (changed.current, changed.previous) == (second, first)
    before = pointer(place.registry).stat()
    assert place.registry.promote(second) == changed == place.registry.current()
    assert pointer(place.registry).stat().st_ino == before.st_ino
    assert changed.changed_at.endswith("+00:00")


def test_rolling_back_goes_back_and_a_second_time_forward(place: Place) -> None:
    first, second = (add_bundle(place, bias=bias) for bias in (0.0, 1.0))
    for rounds in (first, second):
        place.registry.promote(rounds)
    for expected in ((first, second), (second, first), (first, second)):
        place.registry.rollback()
        assert names(place.registry) == expected


def test_there_is_nothing_to_roll_back_to_before_the_second_promotion(place: Place) -> None:
    with pytest.raises(RegistryError, match="no previous bundle"):
        place.registry.rollback()
    only = add_bundle(place)
    place.registry.promote(only)
    with pytest.raises(RegistryError, match="no previous bundle"):
        place.registry.rollback()
    assert names(place.registry) == (only, None)


def test_a_damaged_bundle_is_neither_promoted_nor_rolled_back_to(place: Place) -> None:
    first, second, third = (add_bundle(place, bias=bias) for bias in (0.0, 1.0, 2.0))
    place.registry.promote(first)
    place.registry.promote(second)
    before = pointer(place.registry).read_bytes()
    for change in (
        lambda: (damage(place.registry, third), place.registry.promote(third)),
        lambda: (damage(place.registry, first), place.registry.rollback()),
    ):
        with pytest.raises(BundleError, match=r"actr.onnx: checksum differs"):
            change()
        assert pointer(place.registry).read_bytes() == before


def test_a_bundle_under_another_name_is_not_promoted(place: Place) -> None:
    bundle_id = add_bundle(place)
    shutil.copytree(place.registry.path(bundle_id), place.registry.root / "bundles/renamed")
    with pytest.raises(BundleError, match=f"renamed: is the bundle '{bundle_id}'"):
        place.registry.promote("renamed")
    assert place.registry.current() is None


@pytest.mark.parametrize("bundle_id", BAD_IDS, ids=repr)
def test_an_id_that_is_a_path_or_unknown_is_refused_with_the_known_ones(
    place: Place, bundle_id: str
) -> None:
    known = add_bundle(place)
    (place.registry.root / "other").mkdir()
    ask: Callable[[str], Any]
    for ask in (place.registry.path, place.registry.read, place.registry.promote):
        with pytest.raises(RegistryError, match=f"no bundle .*; there are: {known}"):
            ask(bundle_id)


def test_an_empty_registry_says_how_to_fill_it(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "not" / "yet")
    assert registry.ids() == []
    assert registry.current() is None
    with pytest.raises(RegistryError, match="there are: none; run 'ecdctr export' first"):
        registry.promote("2017-07-01-0123456789")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"current": "a"}',
        b'{"current": null, "previous": null, "changed_at": ""}',
        b'{"current": 7, "previous": null, "changed_at": ""}',
        b'{"current": "a", "previous": ["b"], "changed_at": ""}',
        b'{"current": "a", "previous": null, "changed_at": "", "colour": 1}',
    ],
)
def test_an_unreadable_pointer_is_an_error_that_a_promotion_mends(
    place: Place, content: bytes
) -> None:
    bundle_id = add_bundle(place)
    pointer(place.registry).write_bytes(content)
    for ask in (place.registry.current, place.registry.rollback):
        with pytest.raises(RegistryError, match=r"current.json: unreadable: .*promote a bundle"):
            ask()
    place.registry.promote(bundle_id)
    assert names(place.registry) == (bundle_id, None)


def test_a_pointer_that_is_a_folder_is_an_error_too(place: Place) -> None:
    pointer(place.registry).mkdir()
    with pytest.raises(RegistryError, match=r"current.json: unreadable"):
        place.registry.current()


def test_concurrent_promotions_always_leave_a_readable_pointer(place: Place) -> None:
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 1.0, 2.0)]
    place.registry.promote(ids[0])
    stop, seen, failed = threading.Event(), set(), []

    def watch() -> None:
        while not stop.is_set():
            try:
                seen.add(names(Registry(place.registry.root)))
            except Exception as error:
                failed.append(error)

    def promote_all(start: int) -> list[Current]:
        registry = Registry(place.registry.root)
        return [registry.promote(ids[(start + i) % 3]) for i in range(6)]

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            results = [c for changes in pool.map(promote_all, range(4)) for c in changes]
    finally:
        stop.set()
        watcher.join()
    assert failed == []
    assert all(current != previous for current, previous in seen)
    assert {current for current, _ in seen} <= set(ids)
    assert all(change.current != change.previous for change in results)
    assert not list(place.registry.root.glob(".current-*"))


def test_promotions_by_other_processes_leave_a_chain_without_a_gap(place: Place) -> None:
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 1.0)]
    for bundle_id in ids:
        place.registry.promote(bundle_id)
    code = "for _ in range(5): registry.rollback()"
    processes = [run_beside(code, place.registry.root) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    # Fifteen steps to and fro from the second one: a lost update would show.
    assert names(place.registry) == (ids[0], ids[1])


def test_what_broke_off_is_swept_a_day_later_and_nothing_else(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_id, registry = add_bundle(place), place.registry
    left = [".draft-17-beef", ".removed-2017-01-01-abc"]
    for name in left:
        (registry.root / name / "items").mkdir(parents=True)
        # As old as the bundle was: a folder that is renamed keeps its time.
        os.utime(registry.root / name, (0, 0))
    assert registry.remnants() == []
    monkeypatch.setattr("bundle.registry.REMNANT_S", -5.0)
    assert registry.remnants() == left
    for name in (*left, ".draft-gone"):
        registry.sweep(name)
    assert registry.remnants() == []
    assert registry.ids() == [bundle_id]


def test_what_could_not_be_removed_is_told_and_is_no_bundle_all_the_same(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle_id, registry = add_bundle(place), place.registry
    monkeypatch.setattr("bundle.registry.shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(RegistryError, match=f"removed-{bundle_id}: not all of it could be removed"):
        registry.remove(bundle_id)
    assert registry.ids() == []
    monkeypatch.setattr("bundle.registry.REMNANT_S", -5.0)
    (remnant,) = registry.remnants()
    with pytest.raises(RegistryError, match="not all of it could be removed"):
        registry.sweep(remnant)
    monkeypatch.undo()
    registry.sweep(remnant)
    assert not (registry.root / remnant).exists()


def test_only_old_bundles_that_nothing_needs_can_be_pruned(place: Place) -> None:
    registry = place.registry
    ids = [add_bundle(place, bias=day / 10, asof=f"2017-07-{day:02}") for day in range(1, 7)]
    with pytest.raises(RegistryError, match="no bundle has been promoted"):
        registry.prunable(1)
    for promoted in (ids[1], ids[3]):
        registry.promote(promoted)
    registry.start("canary", ids[0], 0.1)
    # The second is the one before, the first the canary, and from the fourth on all may go live.
    assert registry.prunable(keep=4) == []
    assert registry.prunable(keep=3) == [ids[2]]
    assert registry.prunable(keep=1) == [ids[2]]
    registry.stop("canary")
    assert registry.prunable(keep=1) == [ids[0], ids[2]]
    for bundle_id in registry.prunable(keep=1):
        registry.remove(bundle_id)
    assert registry.ids() == sorted([ids[1], *ids[3:]])
    assert registry.prunable(keep=1) == []
