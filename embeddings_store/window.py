"""What a window is: its name, its content, its identity, and the protocols of the stores.

Legend of axes: n entities, 3 months (newest first), D embedding size, so D + 1 = vector and bias.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from embeddings_store.precision import (
    PRECISIONS,
    Block,
    Floats,
    Precision,
    row_shape,
    to_float32,
    to_stored,
)

Entity = Literal["users", "items"]
ENTITIES: tuple[Entity, ...] = get_args(Entity)

Ids: TypeAlias = NDArray[np.uint64]
Bools: TypeAlias = NDArray[np.bool_]
Bytes: TypeAlias = NDArray[np.uint8]
Rows: TypeAlias = NDArray[np.int64]
Progress: TypeAlias = Callable[[int, int], None]
"""Called with (done, total) while a window is published or removed."""

NUM_MONTHS = 3
DEFAULT_DEADLINE_MS = 10.0

_MONTH = re.compile(r"\d{4}-(0[1-9]|1[0-2])")
_BUILD = re.compile(r"[0-9a-f]{16}")
_MONTH_BITS: Bytes = np.array([1, 2, 4], dtype=np.uint8)
_PRESENT: Bools = (np.arange(8, dtype=np.uint8)[:, None] & _MONTH_BITS) != 0


# The error tree. An entity without a vector is no error: it is absent in `Windows.present`.


class StoreError(Exception):
    """Base of everything that a store raises, apart from ValueError for a wrong argument."""


class StoreUnavailable(StoreError):
    """The store gave no answer: refused, unreachable, connection lost. May pass by itself."""


class StoreTimeout(StoreUnavailable):
    """The deadline passed before the store answered."""


class StoreBusy(StoreError):
    """All connections of the reader were in use until the deadline: shed load or allow more."""


class StoreRejected(StoreError):
    """The store answered with a refusal: credentials, permission, memory full, read-only."""


class StoreClosed(StoreError):
    """The reader was used after `close`."""


class WindowNotFound(StoreError):
    """No complete window, or snapshot, of that name and build is in the store."""


class StoreCorrupt(StoreError):
    """What is stored is not what was published: wrong length, dtype, build or checksum, or lost."""


# Names.


def check_month(month: str) -> str:
    """Return `month` ("2017-06") as it is; ValueError when it is not a month."""
    if not _MONTH.fullmatch(month):
        raise ValueError(f"month {month!r} must look like '2017-06'")
    return month


def window_months(window: str) -> tuple[str, str, str]:
    """The months of a window, newest first: "2017-01" -> ("2017-01", "2016-12", "2016-11")."""
    check_month(window)
    number = int(window[:4]) * 12 + int(window[5:]) - 1
    if number < 2:
        raise ValueError(f"window {window!r} reaches back beyond year 0")
    newest, middle, oldest = (
        f"{m // 12:04d}-{m % 12 + 1:02d}" for m in (number, number - 1, number - 2)
    )
    return newest, middle, oldest


@dataclass(frozen=True, order=True)
class WindowRef:
    """Names one build of one window. Equal content gives an equal build."""

    window: str
    """Newest month: "2017-06"."""
    build: str
    """First 16 hex digits of the sha256 over content, dtype, D and months."""

    def __post_init__(self) -> None:
        check_month(self.window)
        if not _BUILD.fullmatch(self.build):
            raise ValueError(f"build {self.build!r} must be 16 lower-case hex digits")

    def __str__(self) -> str:
        return f"{self.window}-{self.build}"

    @classmethod
    def parse(cls, text: str) -> WindowRef:
        """The inverse of `str`; ValueError when `text` names no window."""
        if text[7:8] != "-":
            raise ValueError(f"window {text!r} must look like '2017-06-0123456789abcdef'")
        return cls(window=text[:7], build=text[8:])


# Content.


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One month of one entity, as a pre-training run leaves it.

    ids uint64 [n] sorted and unique; vectors float32 [n, D]; biases float32 [n].
    Anything else is a ValueError.
    """

    month: str
    ids: Ids
    vectors: Floats
    biases: Floats

    def __post_init__(self) -> None:
        check_month(self.month)
        num = len(self.ids)
        if self.ids.dtype != np.uint64 or self.ids.ndim != 1:
            raise ValueError(f"snapshot {self.month}: ids must be uint64 [n], not {self.ids.dtype}")
        if np.any(self.ids[1:] <= self.ids[:-1]):
            raise ValueError(f"snapshot {self.month}: ids must be sorted and unique")
        if self.vectors.dtype != np.float32 or self.vectors.ndim != 2 or len(self.vectors) != num:
            raise ValueError(f"snapshot {self.month}: vectors must be float32 [{num}, D]")
        if self.biases.dtype != np.float32 or self.biases.shape != (num,):
            raise ValueError(f"snapshot {self.month}: biases must be float32 [{num}]")

    @property
    def dim(self) -> int:
        """D, the size of a vector without its bias."""
        return int(self.vectors.shape[1])


@dataclass(frozen=True, eq=False)
class PackedTable:
    """ids uint64 [n] sorted and unique; bits uint8 [n] (bit 0 = newest month present);
    block [n, 3, ...] as `precision.row_shape` says, zero where a month is absent."""

    ids: Ids
    bits: Bytes
    block: Block


@dataclass(frozen=True, eq=False)
class PackedWindow:
    """A window ready to publish, made by `pack_window`."""

    ref: WindowRef
    dim: int
    dtype: Precision
    tables: Mapping[Entity, PackedTable]


@dataclass(frozen=True, eq=False)
class Failure:
    """A part of a lookup that failed, while the rest was answered."""

    error: StoreError
    """Of the first row that failed."""
    rows: Bools
    """Which rows, bool [n], at least one; they are zero and absent, though they may exist."""

    def __post_init__(self) -> None:
        _forget_frames(self.error)


@dataclass(frozen=True, eq=False)
class Windows:
    """The answer to n ids, in their order: vectors float32 [n, 3, D + 1], present bool [n, 3].

    A row that is not in the store is zero and absent. So is a row that holds a NaN or an infinity;
    `num_invalid` counts those, because they mean that something writes bad vectors. So is a row
    that a part of the store gave no answer for; `failure` tells which those are.
    """

    vectors: Floats
    present: Bools
    num_invalid: int = 0
    failure: Failure | None = None
    second_line: StoreError | None = None
    """Why the first line failed, where rows are those of a second line."""

    def __post_init__(self) -> None:
        if self.second_line is not None:
            _forget_frames(self.second_line)


@dataclass(frozen=True, eq=False)
class RequestWindows:
    """The answer to one scoring request: `user` has n = 1, `items` one row per candidate."""

    user: Windows
    items: Windows


def pack_window(
    window: str,
    snapshots: Mapping[str, Mapping[Entity, Snapshot]],
    dtype: Precision = "float16",
) -> PackedWindow:
    """Join the three snapshots of each entity on id.

    `snapshots` maps month -> entity -> snapshot and must hold all three months of the window (a
    month without data is an empty snapshot, said explicitly). An id that a month lacks has that
    presence bit 0 and zeros. ValueError names the id and month of a value that is not finite
    or does not fit `dtype`.
    """
    months = window_months(window)
    if lacking := [month for month in months if month not in snapshots]:
        raise ValueError(f"window {window} needs the snapshots of {', '.join(lacking)}")
    if dtype not in PRECISIONS:
        raise ValueError(f"dtype {dtype!r} must be one of {', '.join(PRECISIONS)}")
    dims = {snapshots[month][entity].dim for month in months for entity in ENTITIES}
    if len(dims) != 1:
        raise ValueError(f"window {window}: snapshots have different sizes D: {sorted(dims)}")
    dim = dims.pop()
    tables = {
        entity: _pack_table(entity, [snapshots[month][entity] for month in months], dim, dtype)
        for entity in ENTITIES
    }
    ref = WindowRef(window, _build(months, dim, dtype, tables))
    return PackedWindow(ref, dim, dtype, tables)


def _pack_table(
    entity: Entity, newest_first: list[Snapshot], dim: int, dtype: Precision
) -> PackedTable:
    ids = np.unique(np.concatenate([snapshot.ids for snapshot in newest_first]))
    bits: Bytes = np.zeros(len(ids), dtype=np.uint8)
    stored_dtype, shape = row_shape(dim, dtype, NUM_MONTHS)
    block = np.zeros((len(ids), *shape), dtype=stored_dtype)
    for slot, snapshot in enumerate(newest_first):
        rows = np.searchsorted(ids, snapshot.ids)
        bits[rows] |= _MONTH_BITS[slot]
        block[rows, slot] = _stored(entity, snapshot, dtype)
    return PackedTable(ids, bits, block)


def _stored(entity: Entity, snapshot: Snapshot, dtype: Precision) -> Block:
    values = np.concatenate([snapshot.vectors, snapshot.biases[:, None]], axis=1)
    stored = to_stored(values, dtype)
    fits = np.isfinite(values) & np.isfinite(to_float32(stored))
    bad = np.flatnonzero(~fits.all(axis=1))
    if not bad.size:
        return stored
    row = int(bad[0])
    value = values[row, int(np.flatnonzero(~fits[row])[0])]
    raise ValueError(
        f"{entity} snapshot {snapshot.month}, id {snapshot.ids[row]}: {value} is not finite"
        f" as {dtype} ({bad.size} such ids)"
    )


def _build(
    months: tuple[str, ...], dim: int, dtype: str, tables: Mapping[Entity, PackedTable]
) -> str:
    sizes = {entity: len(table.ids) for entity, table in tables.items()}
    head = {"months": months, "dim": dim, "dtype": dtype, "sizes": sizes}
    digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
    for entity in ENTITIES:
        for array in (tables[entity].ids, tables[entity].bits, tables[entity].block):
            digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()[:16]


# What the stores share.


def check_ids(ids: Ids) -> Ids:
    """ValueError unless `ids` is uint64 [n]: ids that went through a float collide."""
    if ids.dtype != np.uint64 or ids.ndim != 1:
        raise ValueError(f"ids must be uint64 [n], not {ids.dtype} {list(ids.shape)}")
    return ids


def decode(block: Block, bits: Bytes, found: Bools) -> Windows:
    """Stored rows -> `Windows`; block [n, 3, ...], bits uint8 [n], found bool [n].

    Rows that are not `found` may hold anything.
    """
    vectors = to_float32(block)
    present = _PRESENT.take(bits & 7, axis=0)
    keep, num_invalid = found, 0
    if not _all_finite(vectors):
        keep = found & np.isfinite(vectors).all(axis=(1, 2))
        num_invalid = int(found.sum() - keep.sum())
    if not keep.all():
        vectors[~keep] = 0.0
        present[~keep] = False
    return Windows(vectors, present, num_invalid)


def _all_finite(vectors: Floats) -> bool:
    """True only when all are finite: a sum of squares is far cheaper than a look at each."""
    flat = vectors.reshape(-1)
    return bool(np.isfinite(flat.dot(flat)))


def _forget_frames(error: StoreError) -> None:
    """An error that is kept holds on to the frames that it came through, and these to what they
    made of it: a circle, which only a garbage collection would free."""
    error.__traceback__ = None


def all_absent(num: int, dim: int) -> Windows:
    """`Windows` of `num` rows of which none is in the store."""
    shape = (num, NUM_MONTHS, dim + 1)
    return Windows(np.zeros(shape, np.float32), np.zeros(shape[:2], np.bool_))


def all_failed(num: int, dim: int, error: StoreError) -> Windows:
    """`Windows` of `num` rows of which none was answered."""
    return replace(all_absent(num, dim), failure=Failure(error, np.ones(num, np.bool_)))


def check_answered(*parts: Windows) -> None:
    """Raises the first error of the parts of a lookup when no row at all was answered."""
    failures = [part.failure for part in parts if len(part.present)]
    if failures and all(failure and failure.rows.all() for failure in failures):
        raise next(failure.error for failure in failures if failure)


class Reader(Protocol):
    """Reads one build of one window. Async, because a service waits on it with a deadline."""

    @property
    def ref(self) -> WindowRef: ...

    @property
    def dim(self) -> int:
        """D, the size of a vector without its bias."""
        ...

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        """ids uint64 [n] -> `Windows` in the same order, duplicates kept; StoreError on failure."""
        ...

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        """One user and n items, item_ids uint64 [n], in one round trip; StoreError on failure."""
        ...

    async def close(self) -> None: ...


@dataclass(frozen=True)
class WindowStats:
    """What a stored window is and takes."""

    users: int
    """Rows; `items` likewise."""
    items: int
    dim: int
    dtype: str
    stored_bytes: int
    """In the server's memory (estimated from a sample of keys), or on the disk."""


class Writer(Protocol):
    """Publishes and removes windows. Blocking, because jobs and the command line call it."""

    def publish(self, window: PackedWindow, *, progress: Progress | None = None) -> WindowRef:
        """Store a window; readers see it only when it is complete. Safe to run again."""
        ...

    def windows(self) -> list[WindowRef]:
        """Every complete window, sorted."""
        ...

    def unfinished(self) -> list[WindowRef]:
        """Windows whose publishing or removal is under way or was broken off, sorted; `publish`
        and `remove` complete it."""
        ...

    def stats(self, ref: WindowRef) -> WindowStats:
        """How large a complete window is."""
        ...

    def check(self, ref: WindowRef) -> None:
        """Read the whole window; StoreCorrupt unless it is what was published."""
        ...

    def remove(self, ref: WindowRef, *, progress: Progress | None = None) -> None:
        """Hide a window, then delete it; also one whose publishing was broken off."""
        ...

    def close(self) -> None: ...


class Store(Writer, Protocol):
    """A place where windows are: what `open_store` returns."""

    async def reader(self, ref: WindowRef) -> Reader:
        """Open one build; WindowNotFound, StoreCorrupt or StoreUnavailable when that fails."""
        ...
