"""A bundle as a set of files: sealed under the id of its content, and any change is noticed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundles import add_bundle, make_place

from bundle.artifact import open_artifact
from bundle.manifest import REQUIRED, BundleError, Window, read_manifest, seal, verify

Damage = Callable[[Path], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A sealed bundle of its own that a test may damage."""
    place = make_place(tmp_path)
    return place.registry.path(add_bundle(place))


def edit_manifest(folder: Path, **changes: Any) -> None:
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def reseal(folder: Path) -> None:
    """Makes checksums and id right again."""
    seal(folder, read_manifest(folder))


def test_sealing_twice_gives_the_same_manifest(bundle: Path) -> None:
    first = read_manifest(bundle)
    assert seal(bundle, first) == seal(bundle, replace(first, files={}, id="")) == first
    assert first.id.startswith("2017-07-01-")
    assert set(REQUIRED) <= set(first.files)
    assert "items/keys.npy" in first.files
    assert "manifest.json" not in first.files


def test_the_id_depends_on_files_lineage_and_window_and_not_on_the_hour(bundle: Path) -> None:
    first = read_manifest(bundle)
    window = Window("2017-06", "another-build", first.window.dim)
    changed = [
        first,
        replace(first, window=window),
        replace(first, lineage=replace(first.lineage, cpm_id="cpm-2")),
        replace(first, asof="2017-07-02"),
    ]
    ids = [seal(bundle, manifest).id for manifest in changed]
    assert seal(bundle, replace(first, created="2027-07-01T00:00:00+00:00")).id == first.id
    (bundle / "vocabulary.json").write_text("{}")
    assert len({*ids, seal(bundle, first).id}) == 5


def test_a_manifest_comes_back_from_disk_as_it_was_sealed(bundle: Path) -> None:
    sealed = seal(bundle, read_manifest(bundle))
    assert read_manifest(bundle) == sealed == verify(bundle)
    assert sealed.item_inputs[-1].shape == ("N", 3)
    assert sealed.lineage.tpm_months == ("2017-06", "2017-05", "2017-04")


@pytest.mark.parametrize("name", REQUIRED)
def test_a_draft_without_a_required_file_is_not_sealed(bundle: Path, name: str) -> None:
    manifest = read_manifest(bundle)
    (bundle / name).unlink()
    with pytest.raises(BundleError, match=f"{name} is missing"):
        seal(bundle, manifest)


def link(path: str, target: str) -> Damage:
    """Replaces a file by a link to a copy of it."""

    def damage(folder: Path) -> None:
        original = folder / path
        copy = folder.parent.parent / "copy"
        original.rename(copy)
        original.symlink_to(target or copy)

    return damage


DAMAGES: list[tuple[str, str, Damage]] = [
    ("actr.onnx", "checksum differs", lambda b: (b / "actr.onnx").write_bytes(b"x")),
    ("items/keys.npy", "checksum differs", lambda b: os.truncate(b / "items/keys.npy", 10)),
    ("actr.onnx.data", "missing", lambda b: (b / "actr.onnx.data").unlink()),
    ("items/absent.npy", "missing", lambda b: shutil.rmtree(b / "items")),
    ("golden.json.bak", "not in the manifest", lambda b: (b / "golden.json.bak").touch()),
    ("more/file", "not in the manifest", lambda b: _deep(b / "more/file")),
    ("features.toml", "must not contain links", link("features.toml", "")),
    ("features.toml", "must not contain links", link("features.toml", "nowhere")),
    ("items", "must not contain links", link("items", "")),
    ("link", "must not contain links", lambda b: (b / "link").symlink_to(b / "actr.onnx")),
    ("manifest.json", "must not contain links", link("manifest.json", "")),
]


def _deep(path: Path) -> None:
    path.parent.mkdir()
    path.touch()


@pytest.mark.parametrize(
    ("path", "says", "damage"), DAMAGES, ids=[f"{p} {s}" for p, s, _ in DAMAGES]
)
def test_a_file_that_is_changed_absent_extra_or_a_link_is_named(
    bundle: Path, path: str, says: str, damage: Damage
) -> None:
    verify(bundle)
    damage(bundle)
    with pytest.raises(BundleError) as caught:
        verify(bundle)
    assert f"{bundle.name}/{path}: " in str(caught.value)
    assert says in str(caught.value)
    with pytest.raises(BundleError):
        open_artifact(bundle)


def test_one_flipped_bit_in_any_file_is_noticed(bundle: Path) -> None:
    for path in sorted(set(bundle.rglob("*.*")) - {bundle / "manifest.json"}):
        content = path.read_bytes()
        flipped = bytearray(content)
        flipped[len(content) // 2] ^= 1
        path.write_bytes(flipped)
        with pytest.raises(BundleError, match=re.escape(path.name)):
            verify(bundle)
        path.write_bytes(content)


@pytest.mark.parametrize(
    "changes",
    [
        {"window": {"month": "2017-06", "build": "another", "dim": 4}},
        {"asof": "2017-07-02"},
        {"id": "2017-07-01-0123456789"},
        {"id": "../elsewhere"},
        {"id": 7},
    ],
    ids=str,
)
def test_a_manifest_that_was_edited_no_longer_fits_its_id(
    bundle: Path, changes: dict[str, Any]
) -> None:
    edit_manifest(bundle, **changes)
    with pytest.raises(BundleError, match=f"{bundle.name}/manifest.json: id .* is not of this"):
        verify(bundle)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", "{}", '"id"', "\ufeff{}", '{"schema_version": 1}'], ids=repr
)
def test_what_is_no_manifest_is_refused_and_the_file_is_named(bundle: Path, text: str) -> None:
    (bundle / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match=r"manifest.json: (unreadable|not a manifest|schema ver)"):
        read_manifest(bundle)


@pytest.mark.parametrize(
    "changes",
    [
        {"colour": "red"},
        {"window": None},
        {"window": {"month": "2017-06"}},
        {"lineage": {}},
        {"inputs": [{"name": "user_cat"}]},
        {"inputs": 3},
        {"files": None},
        {"files": ["actr.onnx"]},
    ],
    ids=str,
)
def test_a_manifest_with_wrong_fields_is_refused(bundle: Path, changes: dict[str, Any]) -> None:
    edit_manifest(bundle, **changes)
    with pytest.raises(BundleError, match=r"manifest.json: not a manifest"):
        verify(bundle)


def test_another_schema_version_is_refused_with_both_numbers(bundle: Path) -> None:
    edit_manifest(bundle, schema_version=3)
    with pytest.raises(BundleError, match="schema version 3, this program reads 2"):
        read_manifest(bundle)


def test_a_folder_that_is_absent_or_empty_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(BundleError, match=r"manifest.json: unreadable"):
            verify(folder)


def test_a_bundle_opens_with_its_parts(bundle: Path) -> None:
    artifact = open_artifact(bundle)
    assert artifact.manifest == read_manifest(bundle)
    assert artifact.model.is_file()
    assert artifact.encoder.spec.history.max_length == 5
    assert len(artifact.encoder.items.keys) == 50
    assert len(artifact.golden) == 2


def test_checksums_are_skipped_only_when_asked(bundle: Path) -> None:
    (bundle / "reference.json").write_text('{"changed": 1}')
    with pytest.raises(BundleError, match=r"reference.json"):
        open_artifact(bundle)
    assert open_artifact(bundle, check=False).manifest == read_manifest(bundle)


SPOILS: list[tuple[str, Damage]] = [
    ("features.toml: ", lambda b: (b / "features.toml").write_text("[[feature]]\nname = 'a'")),
    ("vocabulary.json: ", lambda b: (b / "vocabulary.json").write_text("{")),
    ("vocabulary.json: ", lambda b: (b / "vocabulary.json").write_text("[]")),
    (
        "'age' names a value twice",
        lambda b: (b / "vocabulary.json").write_text('{"age": ["a", "a"]}'),
    ),
    ("golden.json: ", lambda b: (b / "golden.json").write_text("[{}]")),
    ("golden.json: ", lambda b: (b / "golden.json").write_text('[{"request": []}]')),
    ("golden.json: ", lambda b: (b / "golden.json").write_text("[[]]")),
    ("unreadable item table", lambda b: (b / "items/keys.npy").write_bytes(b"")),
    ("spec needs 1 and 2", lambda b: np.save(b / "items/numeric.npy", np.zeros((51, 4), "f4"))),
    ("in 1 dimensions", lambda b: np.save(b / "items/categorical.npy", np.zeros(51, "i4"))),
]


@pytest.mark.parametrize(("says", "spoil"), SPOILS, ids=[says for says, _ in SPOILS])
def test_parts_that_are_sealed_but_unusable_are_one_kind_of_error(
    bundle: Path, says: str, spoil: Damage
) -> None:
    spoil(bundle)
    reseal(bundle)
    with pytest.raises(BundleError, match=re.escape(says)):
        open_artifact(bundle)
