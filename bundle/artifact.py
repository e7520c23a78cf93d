"""A bundle opened for use: what the service and the offline scorer both start from."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bundle.encode import Encoder
from bundle.golden import Golden, read_golden
from bundle.items import ItemTable
from bundle.manifest import (
    FEATURES,
    GOLDEN,
    ITEM_MODEL,
    ITEMS,
    MODEL,
    PARTS,
    VOCABULARY,
    BundleError,
    Manifest,
    read_manifest,
    verify,
)
from bundle.parts import Floats, read_parts
from bundle.spec import read_spec


@dataclass(frozen=True)
class Artifact:
    """What one bundle holds. Item table, parts of items and models stay on disk, memory-mapped."""

    folder: Path
    manifest: Manifest
    encoder: Encoder
    parts: Floats
    golden: list[Golden]

    @property
    def model(self) -> Path:
        return self.folder / MODEL

    @property
    def item_model(self) -> Path:
        return self.folder / ITEM_MODEL


def open_artifact(folder: Path, *, check: bool = True) -> Artifact:
    """Opens the bundle in `folder`, verifying every checksum unless `check` is False.

    Raises:
        BundleError: anything about it is not as its manifest and its spec say.
    """
    manifest = verify(folder) if check else read_manifest(folder)
    with _reading(folder, FEATURES):
        spec = read_spec(folder / FEATURES)
    with _reading(folder, ITEMS):
        items = ItemTable.read(folder / ITEMS)
    with _reading(folder, GOLDEN):
        golden = read_golden(folder / GOLDEN)
    with _reading(folder, VOCABULARY):
        encoder = Encoder(spec, json.loads((folder / VOCABULARY).read_text()), items)
    _check_widths(items, len(spec.of("item", "categorical")), len(spec.of("item", "numeric")))
    with _reading(folder, PARTS):
        parts = read_parts(folder / PARTS, len(items.keys))
    return Artifact(folder, manifest, encoder, parts, golden)


@contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise BundleError(f"{folder.name}/{name}: {type(error).__name__}: {error}") from error


def _check_widths(items: ItemTable, num_categorical: int, num_numeric: int) -> None:
    found = (items.categorical.shape[1], items.numeric.shape[1])
    if found != (num_categorical, 2 * num_numeric):
        raise BundleError(
            f"items/: {found[0]} categorical and {found[1]} numeric columns,"
            f" the spec needs {num_categorical} and {2 * num_numeric}"
        )
