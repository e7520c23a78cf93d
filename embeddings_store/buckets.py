"""How windows lie in a Redis or Valkey server: rows in buckets, and what is stored beside them.

A bucket holds about four rows, and is read whole. Measured with D = 16, float16 (103 bytes and an
8-byte id each), 100 k entities, 500 of them looked up by the asyncio client, valkey 9.1 with libc's
allocator:

    a string per entity                                207 B/entity   2.0 ms    149 k rows/s loaded
    hash of 64, server's defaults (a hash table)       144 B/entity   5.1 ms    138 k
    hash of 64, hash-max-listpack-value raised         118 B/entity   5.7 ms    139 k
    string of 4 rows (this)                            136 B/entity   2.4 ms    944 k
    string of 8 rows                                   125 B/entity   2.6 ms  1,197 k
    string of 16 rows                                  118 B/entity   3.0 ms  1,546 k

Hashes need one command per bucket, which costs the client more than everything else, and become
compact only with a server setting that managed servers may refuse. Strings need one MGET and no
setting. Larger buckets save less memory than the bytes that they add to every read.
Every row carries its id, so that a reply which belongs to another question can not pass for ours.
Empty buckets are stored too: a bucket that is not there was lost, and that is not "absent".
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from embeddings_store.window import (
    ENTITIES,
    NUM_MONTHS,
    STORED_DTYPES,
    Entity,
    Ids,
    PackedTable,
    Rows,
    StoreCorrupt,
    WindowRef,
    Windows,
    all_absent,
    check_ids,
    decode,
)

ROWS_PER_BUCKET = 4

_FORMAT = 1
_SLICE = 1024  # buckets per command: half a megabyte at D = 16
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads ids that are no hashes
_HALF = np.uint64(32)


@dataclass(frozen=True)
class TableMeta:
    """One entity of a stored window."""

    num_rows: int
    num_buckets: int
    sha256: str
    """Of all buckets, in order."""


@dataclass(frozen=True)
class Meta:
    """What is stored beside a window, as JSON; a reader refuses a window that does not fit it."""

    ref: WindowRef
    dim: int
    dtype: str
    tables: Mapping[Entity, TableMeta]

    def to_json(self) -> bytes:
        names = {"format": _FORMAT, "window": self.ref.window, "build": self.ref.build}
        tables = {entity: vars(table) for entity, table in self.tables.items()}
        return json.dumps({**names, "dim": self.dim, "dtype": self.dtype, **tables}).encode()

    @classmethod
    def from_json(cls, text: bytes, ref: WindowRef) -> Meta:
        """StoreCorrupt when `text` does not describe the build `ref`."""
        try:
            raw = json.loads(text)
            named = (raw["format"], raw["window"], raw["build"])
            tables: dict[Entity, TableMeta] = {e: TableMeta(**raw[e]) for e in ENTITIES}
            meta = cls(ref, int(raw["dim"]), str(raw["dtype"]), tables)
            row_dtype(meta.dim, meta.dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise StoreCorrupt(f"meta of window {ref} is damaged: {error!r}") from error
        if named != (_FORMAT, ref.window, ref.build):
            raise StoreCorrupt(f"meta of window {ref} is that of {named}")
        return meta


def row_dtype(dim: int, dtype: str) -> np.dtype[np.void]:
    """A row as stored: 9 + 3 * (D + 1) * 2 bytes for float16."""
    block = (STORED_DTYPES[dtype], (NUM_MONTHS, dim + 1))
    return np.dtype([("id", "<u8"), ("bits", "u1"), ("block", *block)])


def bucket_of(ids: Ids, num_buckets: int) -> Ids:
    """uint64 [n] -> uint64 [n] in [0, num_buckets)."""
    return (((ids * _SPREAD) >> _HALF) * np.uint64(num_buckets)) >> _HALF


def bucket_keys(base: str, entity: Entity, buckets: Sequence[int]) -> list[bytes]:
    start = f"{base}:{entity[0]}:"
    return [f"{start}{bucket}".encode() for bucket in buckets]


class Buckets:
    """The rows of a table in bucket order, made into bytes a slice at a time."""

    def __init__(self, table: PackedTable, dim: int, dtype: str) -> None:
        self.num_buckets = max(1, -(-len(table.ids) // ROWS_PER_BUCKET))
        self._table = table
        self._dtype = row_dtype(dim, dtype)
        buckets = bucket_of(table.ids, self.num_buckets)
        self._order = np.argsort(buckets, kind="stable")
        self._ends = np.searchsorted(buckets[self._order], np.arange(self.num_buckets + 1))

    def slice(self, start: int, stop: int) -> list[bytes]:
        """Buckets start .. stop - 1."""
        ends = self._ends[start : stop + 1]
        picked = self._order[ends[0] : ends[-1]]
        rows = np.empty(len(picked), dtype=self._dtype)
        rows["id"] = self._table.ids[picked]
        rows["bits"] = self._table.bits[picked]
        rows["block"] = self._table.block[picked]
        raw = rows.tobytes()
        offsets = ((ends - ends[0]) * self._dtype.itemsize).tolist()
        return [raw[a:b] for a, b in itertools.pairwise(offsets)]

    def meta(self) -> TableMeta:
        digest = hashlib.sha256()
        for start, stop in slices(self.num_buckets):
            for content in self.slice(start, stop):
                digest.update(content)
        return TableMeta(len(self._table.ids), self.num_buckets, digest.hexdigest())


def slices(num_buckets: int) -> Iterator[tuple[int, int]]:
    for start in range(0, num_buckets, _SLICE):
        yield start, min(start + _SLICE, num_buckets)


@dataclass(frozen=True, eq=False)
class Question:
    """Which buckets hold `ids`; made before the round trip, answered after it."""

    meta: Meta
    entity: Entity
    ids: Ids
    buckets: Ids
    """Unique."""

    @classmethod
    def ask(cls, meta: Meta, entity: Entity, ids: Ids) -> Question:
        buckets = bucket_of(check_ids(ids), meta.tables[entity].num_buckets)
        return cls(meta, entity, ids, np.unique(buckets))

    def keys(self, base: str) -> list[bytes]:
        return bucket_keys(base, self.entity, self.buckets.tolist())

    def answer(self, replies: Sequence[bytes | None]) -> Windows:
        """StoreCorrupt when the replies are not whole buckets of this build."""
        rows = self._rows(replies)
        if not len(rows):
            return all_absent(len(self.ids), self.meta.dim)
        stored: Ids = rows["id"].copy()
        order = np.argsort(stored)
        at = np.searchsorted(stored, self.ids, sorter=order)
        picked: Rows = order.take(at, mode="clip")
        found = stored[picked] == self.ids
        return decode(rows["block"].take(picked, axis=0), rows["bits"].take(picked), found)

    def _rows(self, replies: Sequence[bytes | None]) -> NDArray[np.void]:
        what = f"{self.entity} of window {self.meta.ref}"
        whole = [reply for reply in replies if reply is not None]
        if len(whole) != len(self.buckets):
            raise StoreCorrupt(f"{what}: buckets are lost (evicted, or the window was removed)")
        dtype = row_dtype(self.meta.dim, self.meta.dtype)
        counts, rests = np.divmod([len(reply) for reply in whole] or [0], dtype.itemsize)
        if rests.any():
            raise StoreCorrupt(f"{what}: a bucket is not a whole number of {dtype.itemsize} bytes")
        rows = np.frombuffer(b"".join(whole), dtype=dtype)
        belong = bucket_of(rows["id"], self.meta.tables[self.entity].num_buckets)
        if len(rows) and (belong != np.repeat(self.buckets, counts)).any():
            raise StoreCorrupt(f"{what}: a bucket holds rows of another bucket")
        return rows
