"""Windows in memory-mapped files: the default store, without a server.

`windows/<window>-<build>/` holds, per entity, ids.npy (uint64 [n], sorted), bits.npy (uint8 [n]),
block.npy ([n, 3, ...], see `precision.row_shape`) and index.npy (uint32 [2^k], see
`_prefix_index`). Processes share pages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from embeddings_store.precision import PRECISIONS, row_shape
from embeddings_store.snapshot import (
    Arrays,
    Meta,
    read_directory,
    remove_directory,
    verify_directory,
    write_directory,
)
from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    ENTITIES,
    NUM_MONTHS,
    Bools,
    Entity,
    Ids,
    PackedTable,
    PackedWindow,
    Progress,
    RequestWindows,
    Rows,
    StoreClosed,
    StoreCorrupt,
    StoreUnavailable,
    WindowNotFound,
    WindowRef,
    Windows,
    WindowStats,
    all_absent,
    check_ids,
    decode,
)

_FORMAT = 1
_NAME = re.compile(r"\d{4}-\d{2}-[0-9a-f]{16}")


class EmbeddedStore:
    """Windows under `root/windows`. Implements `Store`."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "windows"

    def __repr__(self) -> str:
        return f"EmbeddedStore({str(self._folder.parent)!r})"

    async def reader(self, ref: WindowRef) -> EmbeddedReader:
        """Open one build, in milliseconds whatever its size; see `open_now`."""
        return self.open_now(ref)

    def open_now(self, ref: WindowRef) -> EmbeddedReader:
        """Open one build from blocking code. Sizes and meta are verified, checksums by `check`."""
        return EmbeddedReader(ref, *self._mapped(ref))

    def _mapped(self, ref: WindowRef) -> tuple[int, dict[Entity, _Table]]:
        """D and the tables of one build."""
        target = self._path(ref)
        with _translated():
            meta, arrays = read_directory(target)
        expected = {"format": _FORMAT, "window": ref.window, "build": ref.build}
        for key, value in expected.items():
            if meta.get(key) != value:
                raise StoreCorrupt(f"{target}: {key} is {meta.get(key)!r}, should be {value!r}")
        dim = meta.get("dim")
        if not isinstance(dim, int):
            raise StoreCorrupt(f"{target}: dim is {dim!r}, should be a number")
        return dim, _tables(target, meta, arrays)

    def publish(self, window: PackedWindow, *, progress: Progress | None = None) -> WindowRef:
        """Write a window unless it is there and sound; a damaged one is replaced."""
        if not self._is_sound(window.ref):
            with _translated():
                target = self._path(window.ref)
                write_directory(target, _arrays(window), _meta(window), progress=progress)
        return window.ref

    def windows(self) -> list[WindowRef]:
        """Every complete window, sorted."""
        names = [path.name for path in self._folder.glob("*") if (path / "meta.json").is_file()]
        return sorted(WindowRef.parse(name) for name in names if _NAME.fullmatch(name))

    def unfinished(self) -> list[WindowRef]:
        """Windows whose publishing or removal was broken off, or is under way."""
        names = {path.name[1:].rpartition(".")[0] for path in self._folder.glob(".*.*")}
        return sorted(WindowRef.parse(name) for name in names if _NAME.fullmatch(name))

    def stats(self, ref: WindowRef) -> WindowStats:
        """How large a complete window is, on the disk."""
        dim, tables = self._mapped(ref)
        users, items = (len(tables[entity].ids) for entity in ENTITIES)
        size = sum(path.stat().st_size for path in self._path(ref).rglob("*.npy"))
        return WindowStats(users, items, dim, tables["users"].block.dtype.name, size)

    def check(self, ref: WindowRef) -> None:
        """Verify all checksums; StoreCorrupt names the file that is off."""
        self.open_now(ref)
        with _translated():
            verify_directory(self._path(ref))

    def remove(self, ref: WindowRef, *, progress: Progress | None = None) -> None:
        """Hide a window in one step, then delete it. Open readers keep their mapping."""
        target = self._path(ref)
        leftovers = list(self._folder.glob(f".{target.name}.*"))
        if not target.exists() and not leftovers:
            raise WindowNotFound(f"no window {ref} in {self!r}")
        with _translated():
            remove_directory(target)
        if progress is not None:
            progress(1, 1)

    def close(self) -> None:
        """Nothing is held open."""

    def _path(self, ref: WindowRef) -> Path:
        return self._folder / str(ref)

    def _is_sound(self, ref: WindowRef) -> bool:
        try:
            self.check(ref)
        except (WindowNotFound, StoreCorrupt):
            return False
        return True


@dataclass(frozen=True, eq=False)
class _Table(PackedTable):
    index: NDArray[np.uint32]
    """Row of the first id that has this prefix or a greater one, uint32 [2^k]."""
    shift: np.uint64
    """id >> shift is the id's prefix of k bits."""

    def find(self, ids: Ids) -> tuple[Rows, Bools]:
        """Where each id stands, or would stand, int64 [n] in [0, len(self.ids)]; found bool [n].

        Ids are hashes, so their first bits nearly say where they are: one look into the index
        replaces twenty steps of a binary search, each a cache miss. What is not hit at once (two
        ids with one prefix, an absent id) is searched, so ids that are no hashes are just slower.
        Measured for 500 ids of 1 M: 30 us instead of 100 us.
        """
        rows = self.index.take(ids >> self.shift).astype(np.int64)
        found = self.ids.take(rows, mode="clip") == ids
        if not found.all():
            missed = np.flatnonzero(~found)
            rows[missed] = np.searchsorted(self.ids, ids[missed])
            found[missed] = self.ids.take(rows[missed], mode="clip") == ids[missed]
        return rows, found


class EmbeddedReader:
    """One build, memory-mapped. Implements `Reader`; `lookup_now` serves blocking code.

    A lookup is tens of microseconds of memory reads, so it runs inline and `deadline_ms` is moot.
    """

    def __init__(self, ref: WindowRef, dim: int, tables: Mapping[Entity, _Table]) -> None:
        self._ref = ref
        self._dim = dim
        self._tables = dict(tables)

    @property
    def ref(self) -> WindowRef:
        return self._ref

    @property
    def dim(self) -> int:
        return self._dim

    def lookup_now(self, entity: Entity, ids: Ids) -> Windows:
        """As `lookup`, for blocking code: ids uint64 [n] -> `Windows` in the same order."""
        check_ids(ids)
        if entity not in self._tables:
            raise StoreClosed(f"reader of {self._ref} is closed, or {entity!r} is no entity")
        table = self._tables[entity]
        if not len(table.ids):
            return all_absent(len(ids), self._dim)
        rows, found = table.find(ids)
        block = table.block.take(rows, axis=0, mode="clip")
        return decode(block, table.bits.take(rows, mode="clip"), found)

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        return self.lookup_now(entity, ids)

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        user = self.lookup_now("users", np.array([user_id], dtype=np.uint64))
        return RequestWindows(user, self.lookup_now("items", item_ids))

    async def close(self) -> None:
        """Lets go of the mapping; what was looked up is a copy and stays valid."""
        self._tables.clear()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:  # permission, full disk, input/output error
        raise StoreUnavailable(str(error)) from error


def _prefix_index(ids: Ids) -> NDArray[np.uint32]:
    """uint32 [2^k], where 2^k is two to four times n: 8 to 16 bytes per entity."""
    bits = max(1, (2 * len(ids)).bit_length())
    prefixes = np.arange(1 << bits, dtype=np.uint64) << np.uint64(64 - bits)
    return np.searchsorted(ids, prefixes).astype(np.uint32)


def _arrays(window: PackedWindow) -> Arrays:
    arrays: Arrays = {}
    for entity, table in window.tables.items():
        arrays[f"{entity}/ids"] = table.ids
        arrays[f"{entity}/bits"] = table.bits
        arrays[f"{entity}/block"] = table.block
        arrays[f"{entity}/index"] = _prefix_index(table.ids)
    return arrays


def _meta(window: PackedWindow) -> Meta:
    ref = window.ref
    names: Meta = {"format": _FORMAT, "window": ref.window, "build": ref.build}
    return {**names, "dim": window.dim, "dtype": window.dtype}


def _tables(target: Path, meta: Meta, arrays: Arrays) -> dict[Entity, _Table]:
    dim, precision = meta["dim"], meta.get("dtype")
    assert isinstance(dim, int)
    if precision not in PRECISIONS:
        raise StoreCorrupt(f"{target}: dtype is {precision!r}, should be one of {PRECISIONS}")
    block_dtype, shape = row_shape(dim, precision, NUM_MONTHS)
    tables: dict[Entity, _Table] = {}
    for entity in ENTITIES:
        try:
            ids, bits, block, index = (
                arrays[f"{entity}/{name}"] for name in ("ids", "bits", "block", "index")
            )
        except KeyError as error:
            raise StoreCorrupt(f"{target}: {error} is not listed in meta.json") from None
        num = len(ids)
        actual = [(a.dtype, a.shape) for a in (ids, bits, block)]
        expected = [
            (np.dtype("<u8"), (num,)),
            (np.dtype("u1"), (num,)),
            (block_dtype, (num, *shape)),
        ]
        prefix_bits = len(index).bit_length() - 1
        if actual != expected or index.dtype != np.uint32 or len(index) != 1 << prefix_bits:
            raise StoreCorrupt(f"{target}: {entity} is {actual}, should be {expected}")
        tables[entity] = _Table(ids, bits, block, index, np.uint64(64 - prefix_bits))
    return tables
