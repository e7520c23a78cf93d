"""What a bundle is: its files and checksums, where it comes from, what it was measured at.

A bundle is a directory that is never changed once it has its manifest. Its id is derived from its
content, so the same training gives the same id.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
FEATURES = "features.toml"
VOCABULARY = "vocabulary.json"
MODEL = "actr.onnx"
ITEM_MODEL = "items.onnx"
PARTS = "items/part.npy"
ITEMS = "items"
GOLDEN = "golden.json"
REFERENCE = "reference.json"
REQUIRED = (FEATURES, VOCABULARY, MODEL, ITEM_MODEL, PARTS, GOLDEN, REFERENCE)


class BundleError(ValueError):
    """A bundle is not usable; the message names the file and what is wrong with it."""


@dataclass(frozen=True)
class Window:
    """The TPM window that the bundle was trained for. No other one may be used with it."""

    month: str
    """The newest of its three months, "2017-10"."""
    build: str
    """Content hash of the published window."""
    dim: int
    """Size of a vector; a row of the window has dim + 1 values, the last one is the bias."""


@dataclass(frozen=True)
class Lineage:
    """Which data each tier saw; dates are inclusive, "2017-10-31"."""

    tpm_months: tuple[str, ...]
    cpm_id: str
    cpm_from: str
    cpm_to: str
    actr_from: str
    actr_to: str


@dataclass(frozen=True)
class Tensor:
    """One input of a graph; a dimension is a number or a name (of what varies)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Verdict:
    """What one gate says of a bundle before it may be promoted."""

    gate: str
    passed: bool
    value: float | None
    """What was measured; None where there was nothing to measure."""
    limit: str
    """What would be right: "at most 1e-05"."""
    detail: str = ""

    def __str__(self) -> str:
        value = "" if self.value is None else f" {self.value:.6g}"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.gate}{value}, must be {self.limit}{detail}"


@dataclass(frozen=True)
class Manifest:
    """`manifest.json`. `id` and `files` are filled in by `seal`."""

    dataset: str
    created: str
    """UTC, ISO 8601."""
    asof: str
    """The day whose requests the item table's counts are for: they end the day before."""
    seed: int
    window: Window
    lineage: Lineage
    inputs: tuple[Tensor, ...]
    """Of the graph that scores."""
    item_inputs: tuple[Tensor, ...]
    """Of the graph that computes what belongs to an item alone."""
    metrics: dict[str, float]
    """Held-out figures by name, as measured before the bundle was written; may be empty."""
    gates: tuple[Verdict, ...] = ()
    """What the gates said; empty where none was asked."""
    forced: bool = False
    """Somebody decided that it may be promoted whatever the gates said."""
    files: dict[str, str] = field(default_factory=dict)
    """sha256 by path, relative to the bundle."""
    id: str = ""
    schema_version: int = SCHEMA_VERSION


def refusals(manifest: Manifest) -> list[str]:
    """Why a bundle must not be promoted, a gate each; empty where it may be."""
    return [] if manifest.forced else [str(one) for one in manifest.gates if not one.passed]


def seal(draft: Path, manifest: Manifest) -> Manifest:
    """Makes the files in `draft` a bundle: computes checksums and id and writes the manifest."""
    for name in REQUIRED:
        if not (draft / name).is_file():
            raise BundleError(f"{draft}: {name} is missing")
    sealed = replace(manifest, files=_checksums(draft, _paths(draft)))
    sealed = replace(sealed, id=_id(sealed))
    with (draft / MANIFEST).open("w") as file:
        json.dump(asdict(sealed), file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    return sealed


def read_manifest(folder: Path) -> Manifest:
    """Reads `manifest.json` without looking at the other files.

    Raises:
        BundleError: absent, not JSON, of another schema version, or with fields missing.
    """
    path = folder / MANIFEST
    try:
        document = json.loads(path.read_text())
        return _parse(document, path)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise BundleError(f"{path}: unreadable: {error}") from error
    except (TypeError, KeyError, AttributeError) as error:
        raise BundleError(f"{path}: not a manifest: {error}") from error


def verify(folder: Path) -> Manifest:
    """Reads the manifest and checks every file against it.

    Raises:
        BundleError: a file is absent, changed, not listed, or a link that leads elsewhere; or the
            manifest's id is not that of its files, lineage and window.
    """
    manifest = read_manifest(folder)
    if manifest.id != _id(manifest):
        raise BundleError(f"{folder.name}/{MANIFEST}: id {manifest.id!r} is not of this content")
    present = set(_paths(folder))
    for path in sorted(present | set(manifest.files)):
        if path not in present:
            raise BundleError(f"{folder.name}/{path}: missing")
        if path not in manifest.files:
            raise BundleError(f"{folder.name}/{path}: not in the manifest")
    for path, checksum in _checksums(folder, sorted(present)).items():
        if checksum != manifest.files[path]:
            raise BundleError(f"{folder.name}/{path}: checksum differs from the manifest's")
    for path in REQUIRED:
        if path not in present:
            raise BundleError(f"{folder.name}/{path}: missing")
    return manifest


def _id(manifest: Manifest) -> str:
    content: list[Any] = [manifest.files, asdict(manifest.lineage), asdict(manifest.window)]
    # What was refused and then forced, or never judged at all, is another bundle: each has its own
    # manifest.
    content += [[verdict.gate, verdict.passed] for verdict in manifest.gates]
    content += ["forced"] * manifest.forced
    text = json.dumps(content, sort_keys=True)
    return f"{manifest.asof}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def _parse(document: dict[str, Any], path: Path) -> Manifest:
    if document.get("schema_version") != SCHEMA_VERSION:
        found = document.get("schema_version")
        raise BundleError(f"{path}: schema version {found!r}, this program reads {SCHEMA_VERSION}")
    lineage = dict(document["lineage"])
    lineage["tpm_months"] = tuple(lineage["tpm_months"])
    inputs, item_inputs = (
        tuple(Tensor(t["name"], t["dtype"], tuple(t["shape"])) for t in document[key])
        for key in ("inputs", "item_inputs")
    )
    return Manifest(
        **{
            **document,
            "window": Window(**document["window"]),
            "lineage": Lineage(**lineage),
            "inputs": inputs,
            "item_inputs": item_inputs,
            "gates": tuple(Verdict(**one) for one in document.get("gates", ())),
            "files": dict(document["files"].items()),
        }
    )


def _paths(folder: Path) -> list[str]:
    """All files of a bundle but the manifest, relative; links are refused."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise BundleError(f"{path}: a bundle must not contain links")
        if path.is_file() and path != folder / MANIFEST:
            found.append(path.relative_to(folder).as_posix())
    return found


def _checksums(folder: Path, paths: Sequence[str]) -> dict[str, str]:
    """By path. Two files at a time: one of them is most of a bundle, and a start waits for all."""
    with ThreadPoolExecutor(2, "checksums") as pool:
        return dict(zip(paths, pool.map(_sha256, (folder / path for path in paths)), strict=True))


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise BundleError(f"{path}: unreadable: {error}") from error
