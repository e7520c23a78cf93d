"""Snapshots on disk, and the immutable directory of arrays that they and embedded windows share.

Such a directory holds .npy files and a meta.json with the size and sha256 of each. It is written
under a temporary name, synced and renamed, so that it is either complete or not there.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embeddings_store.window import (
    Entity,
    Progress,
    Snapshot,
    StoreCorrupt,
    WindowNotFound,
    check_month,
)

# Elements of any dtype: which one an array has is checked where it is used.
Arrays = dict[str, NDArray[Any]]
Meta = dict[str, object]


def write_snapshot(root: Path, entity: Entity, snapshot: Snapshot) -> Path:
    """Write (or replace) `root/snapshots/<month>/<entity>/` and return that path."""
    target = snapshot_path(root, entity, snapshot.month)
    arrays: Arrays = {
        "ids": snapshot.ids,
        "vectors": snapshot.vectors,
        "biases": snapshot.biases,
    }
    write_directory(target, arrays, {"month": snapshot.month, "entity": entity})
    return target


def read_snapshot(root: Path, entity: Entity, month: str) -> Snapshot:
    """Read a snapshot, memory-mapped, after verifying its checksums.

    WindowNotFound when there is none; StoreCorrupt, naming the file, when it is damaged.
    """
    target = snapshot_path(root, entity, month)
    verify_directory(target)
    meta, arrays = read_directory(target)
    if (meta.get("month"), meta.get("entity")) != (month, entity):
        raise StoreCorrupt(f"{target} holds {meta.get('entity')} of {meta.get('month')}")
    try:
        return Snapshot(month, arrays["ids"], arrays["vectors"], arrays["biases"])
    except (KeyError, ValueError) as error:
        raise StoreCorrupt(f"{target}: {error}") from error


def snapshot_path(root: Path, entity: Entity, month: str) -> Path:
    """Where a snapshot lies: `root/snapshots/2017-06/users`."""
    return root / "snapshots" / check_month(month) / entity


def write_directory(
    target: Path,
    arrays: Mapping[str, NDArray[Any]],
    meta: Meta,
    *,
    progress: Progress | None = None,
) -> None:
    """Write `arrays` (name -> array; a name may hold "/") and `meta` as the directory `target`.

    `progress` counts the files that are written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.partial")
    with _locked(target.parent):
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed writer left
        files: Meta = {}
        for name, array in arrays.items():
            files[name] = _write_array(temporary, name, array)
            if progress is not None:
                progress(len(files), len(arrays))
        text = json.dumps({**meta, "files": files}, indent=1, sort_keys=True)
        _write_synced(temporary / "meta.json", text.encode())
        for folder in (path for path in temporary.rglob("*") if path.is_dir()):
            _sync(folder)
        _sync(temporary)
        _move_into_place(temporary, target)


def read_directory(target: Path) -> tuple[Meta, Arrays]:
    """Meta and memory-mapped arrays of a directory; sizes are verified, checksums are not."""
    meta = _read_meta(target)
    arrays: Arrays = {}
    for name, (size, _) in _files(target, meta).items():
        path = target / f"{name}.npy"
        _check_size(path, size)
        try:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise StoreCorrupt(f"{path} is not a readable array: {error}") from error
        # A plain view: indexing a memmap costs several microseconds more each time.
        arrays[name] = mapped.view(np.ndarray)
    return meta, arrays


def verify_directory(target: Path) -> None:
    """Read every file and compare checksums; StoreCorrupt names the first that is off."""
    for name, (size, sha256) in _files(target, _read_meta(target)).items():
        path = target / f"{name}.npy"
        _check_size(path, size)
        if _sha256(path) != sha256:
            raise StoreCorrupt(f"{path}: checksum differs from meta.json")


def remove_directory(target: Path) -> None:
    """Hide a directory in one step, then delete it."""
    hidden = target.with_name(f".{target.name}.removed")
    with _locked(target.parent):
        shutil.rmtree(hidden, ignore_errors=True)
        if target.exists():
            target.rename(hidden)
            _sync(target.parent)
        shutil.rmtree(hidden, ignore_errors=True)
        shutil.rmtree(target.with_name(f".{target.name}.partial"), ignore_errors=True)


def _write_array(folder: Path, name: str, array: NDArray[Any]) -> list[int | str]:
    path = folder / f"{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        np.save(file, array, allow_pickle=False)
        file.flush()
        os.fsync(file.fileno())
    return [path.stat().st_size, _sha256(path)]


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(temporary: Path, target: Path) -> None:
    """Between the two renames of a replacement the directory is away for a moment.

    Readers that have it open keep their mapping; exchanging two names atomically is Linux only.
    """
    replaced = target.with_name(f".{target.name}.removed")
    shutil.rmtree(replaced, ignore_errors=True)
    if target.exists():
        target.rename(replaced)
    temporary.rename(target)
    _sync(target.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _read_meta(target: Path) -> Meta:
    path = target / "meta.json"
    try:
        meta = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise WindowNotFound(f"nothing complete at {target}") from None
    except ValueError as error:
        raise StoreCorrupt(f"{path} is not JSON: {error}") from error
    if not isinstance(meta, dict):
        raise StoreCorrupt(f"{path} must hold an object")
    return meta


def _files(target: Path, meta: Meta) -> dict[str, tuple[int, str]]:
    files: Any = meta.get("files")
    try:
        return {str(name): (int(size), str(sha256)) for name, (size, sha256) in files.items()}
    except (AttributeError, TypeError, ValueError):
        raise StoreCorrupt(f"{target / 'meta.json'} does not list its files") from None


def _check_size(path: Path, size: int) -> None:
    try:
        actual = path.stat().st_size
    except FileNotFoundError:
        raise StoreCorrupt(f"{path} is missing") from None
    if actual != size:
        raise StoreCorrupt(f"{path} has {actual} bytes, should have {size}")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One writer at a time: temporary names are fixed, so that leftovers are found again."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
