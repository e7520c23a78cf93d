"""How windows lie in a Redis or Valkey server: rows in buckets, and what is stored beside them.

A bucket is a string that holds some rows, and is read whole: 32 users, because a request asks for
one user and there are very many; four items, because it asks for hundreds. Measured with
D = 16, float16 (103 bytes and an 8-byte id each), 100 k entities, 500 of them looked up by an
asyncio client, valkey 9.1 with libc's allocator (docs/store.md has what it takes now):

    a string per entity                                207 B/entity   2.0 ms    149 k rows/s loaded
    hash of 64, server's defaults (a hash table)       144 B/entity   5.1 ms    138 k
    hash of 64, hash-max-listpack-value raised         118 B/entity   5.7 ms    139 k
    string of 4 rows                                   136 B/entity   2.4 ms    944 k
    string of 8 rows                                   125 B/entity   2.6 ms  1,197 k
    string of 16 rows                                  118 B/entity   3.0 ms  1,546 k

Hashes need one command per bucket, which costs the client more than everything else, and become
compact only with a server setting that managed servers may refuse. Strings need one MGET (in a
cluster one for each of 64 hash tags) and no setting.
Every row carries its id, XOR the build: a reply that belongs to another question, or a bucket of
another build, holds rows that do not belong into the bucket, and can not pass for ours.
Empty buckets are stored too: a bucket that is not there was lost, and that is not "absent".
"""

from __future__ import annotations

import binascii
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from embeddings_store.precision import row_shape
from embeddings_store.window import (
    ENTITIES,
    NUM_MONTHS,
    Bools,
    Entity,
    Failure,
    Ids,
    PackedTable,
    PackedWindow,
    Rows,
    StoreCorrupt,
    StoreError,
    WindowRef,
    Windows,
    all_absent,
    check_ids,
    decode,
)

ROWS_PER_BUCKET: Mapping[Entity, int] = {"users": 32, "items": 4}
NUM_TAGS = 64
"""Hash tags that the buckets of a table are spread over, in ranges. In a cluster one command can
read the buckets of one tag."""
NUM_SLOTS = 16_384  # of a cluster

_FORMAT = 2
_SLICE_ROWS = 1024  # per command: 100 KB at D = 16, which hold up others for 0.1 ms
_SPREAD = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: spreads ids that are no hashes
_HALF = np.uint64(32)


@dataclass(frozen=True)
class TableMeta:
    """One entity of a stored window."""

    num_rows: int
    num_buckets: int
    sha256: str
    """Of all buckets, in order; empty until they are written."""


@dataclass(frozen=True)
class Meta:
    """What is stored beside a window, as JSON; a reader refuses a window that does not fit it."""

    ref: WindowRef
    dim: int
    dtype: str
    tables: Mapping[Entity, TableMeta]

    @classmethod
    def of(
        cls,
        window: PackedWindow,
        tables: Mapping[Entity, Buckets],
        digests: Mapping[Entity, str] | None = None,
    ) -> Meta:
        """`digests`: the checksum of each table, once it is known."""
        described = {
            entity: TableMeta(table.num_rows, table.num_buckets, (digests or {}).get(entity, ""))
            for entity, table in tables.items()
        }
        return cls(window.ref, window.dim, window.dtype, described)

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
    block = row_shape(dim, dtype, NUM_MONTHS)
    return np.dtype([("id", "<u8"), ("bits", "u1"), ("block", *block)])


def mask_of(ref: WindowRef) -> np.uint64:
    """What the ids in a build's rows are XORed with."""
    return np.uint64(int(ref.build, 16))


def slot_of(key: bytes) -> int:
    """The slot of a cluster in which a key without braces, or the text in them, lies."""
    return binascii.crc_hqx(key, 0) % NUM_SLOTS


@cache
def tags() -> tuple[str, ...]:
    """For each of `NUM_TAGS` equal ranges of slots a number that falls into it: where masters have
    equal shares of the slots, they get equal shares of the buckets."""
    found: dict[int, str] = {}
    for number in itertools.count():
        if len(found) == NUM_TAGS:
            return tuple(found[place] for place in range(NUM_TAGS))
        text = str(number)
        found.setdefault(slot_of(text.encode()) * NUM_TAGS // NUM_SLOTS, text)
    raise AssertionError("unreachable")


def bucket_of(ids: Ids, num_buckets: int) -> Ids:
    """uint64 [n] -> uint64 [n] in [0, num_buckets)."""
    return (((ids * _SPREAD) >> _HALF) * np.uint64(num_buckets)) >> _HALF


_Bucket = TypeVar("_Bucket", int, Rows)


def tag_of(bucket: _Bucket, num_buckets: int) -> _Bucket:
    """Place of a bucket's tag in `tags()`; rises with the bucket."""
    return bucket * NUM_TAGS // num_buckets


def index_key(prefix: str, name: str) -> str:
    """Key of a hash of windows; all of a store lie in one slot, so that one step changes them."""
    return f"{{{prefix}}}:{name}"


def base_key(prefix: str, ref: WindowRef) -> str:
    """How the keys of a window's buckets begin."""
    return f"{prefix}:{ref.window}:{ref.build}"


def bucket_keys(base: str, entity: Entity, tag: int, buckets: Sequence[int]) -> list[bytes]:
    """Keys of buckets that all have the tag."""
    start = f"{base}:{{{tags()[tag]}}}:{entity[0]}:"
    return [f"{start}{bucket}".encode() for bucket in buckets]


class Buckets:
    """The rows of a table in bucket order, made into bytes a slice at a time."""

    def __init__(self, entity: Entity, table: PackedTable, window: PackedWindow) -> None:
        self._mask = mask_of(window.ref)
        self.num_rows = len(table.ids)
        self.num_buckets = max(1, -(-self.num_rows // ROWS_PER_BUCKET[entity]))
        self._table = table
        self._dtype = row_dtype(window.dim, window.dtype)
        buckets = bucket_of(table.ids, self.num_buckets)
        self._order = np.argsort(buckets, kind="stable")
        self._ends = np.searchsorted(buckets[self._order], np.arange(self.num_buckets + 1))

    def slice(self, start: int, stop: int) -> list[bytes]:
        """Buckets start .. stop - 1."""
        ends = self._ends[start : stop + 1]
        picked = self._order[ends[0] : ends[-1]]
        rows = np.empty(len(picked), dtype=self._dtype)
        rows["id"] = self._table.ids[picked] ^ self._mask
        rows["bits"] = self._table.bits[picked]
        rows["block"] = self._table.block[picked]
        raw = rows.tobytes()
        offsets = ((ends - ends[0]) * self._dtype.itemsize).tolist()
        return [raw[a:b] for a, b in itertools.pairwise(offsets)]


def slices(entity: Entity, num_buckets: int) -> Iterator[tuple[int, int, int]]:
    """(tag, start, stop) of the commands that read or write a whole table; all buckets of one have
    the tag."""
    step = _SLICE_ROWS // ROWS_PER_BUCKET[entity]
    for tag in range(NUM_TAGS):
        # The first bucket whose tag is at least `tag`: the inverse of `tag_of`.
        first, end = (-(-place * num_buckets // NUM_TAGS) for place in (tag, tag + 1))
        for start in range(first, end, step):
            yield tag, start, min(start + step, end)


Reply = bytes | None | StoreError
"""A bucket, that it is not there, or why its server gave no answer."""


@dataclass(frozen=True, eq=False)
class Question:
    """Which buckets hold `ids`; made before the round trip, answered after it."""

    meta: Meta
    entity: Entity
    ids: Ids
    buckets: Rows
    """Unique, sorted."""

    @classmethod
    def ask(cls, meta: Meta, entity: Entity, ids: Ids) -> Question:
        buckets = bucket_of(check_ids(ids), meta.tables[entity].num_buckets)
        return cls(meta, entity, ids, np.unique(buckets).astype(np.int64))

    def keys(self, base: str) -> dict[int, list[bytes]]:
        """Keys by tag. All of them in order are the buckets in order."""
        if not len(self.buckets):
            return {}
        tag = tag_of(self.buckets, self.meta.tables[self.entity].num_buckets)
        starts = np.flatnonzero(np.diff(tag, prepend=-1)).tolist()
        buckets = self.buckets.tolist()
        return {
            int(tag[a]): bucket_keys(base, self.entity, int(tag[a]), buckets[a:b])
            for a, b in itertools.pairwise([*starts, len(buckets)])
        }

    def answer(self, replies: Sequence[Reply]) -> Windows:
        """Rows of buckets that are not whole buckets of this build are named in `failure`."""
        rows, errors = self._rows(replies)
        windows = self._pick(rows)
        if not errors:
            return windows
        return replace(windows, failure=Failure(next(iter(errors.values())), self._in(errors)))

    def _pick(self, rows: NDArray[np.void]) -> Windows:
        if not len(rows):
            return all_absent(len(self.ids), self.meta.dim)
        stored: Ids = rows["id"] ^ mask_of(self.meta.ref)
        order = np.argsort(stored)
        at = np.searchsorted(stored, self.ids, sorter=order)
        picked: Rows = order.take(at, mode="clip")
        found = stored[picked] == self.ids
        return decode(rows["block"].take(picked, axis=0), rows["bits"].take(picked), found)

    def _in(self, buckets: Mapping[int, StoreError]) -> Bools:
        """Which ids lie in these of the buckets asked for, bool [n]."""
        bad = self.buckets[list(buckets)]
        mine = bucket_of(self.ids, self.meta.tables[self.entity].num_buckets)
        return np.isin(mine.astype(np.int64), bad)

    def _rows(self, replies: Sequence[Reply]) -> tuple[NDArray[np.void], dict[int, StoreError]]:
        """The rows of all sound buckets, and what is wrong with the others, by their place."""
        dtype = row_dtype(self.meta.dim, self.meta.dtype)
        sizes = [len(reply) if isinstance(reply, bytes) else -1 for reply in replies]
        counts, rests = np.divmod(np.array(sizes, dtype=np.int64), dtype.itemsize)
        sound = rests == 0
        rows = np.frombuffer(b"".join(itertools.compress(replies, sound)), dtype=dtype)  # type: ignore[arg-type]
        places = np.repeat(np.flatnonzero(sound), counts[sound])
        ids: Ids = rows["id"] ^ mask_of(self.meta.ref)
        belong = bucket_of(ids, self.meta.tables[self.entity].num_buckets)
        strange = belong != self.buckets[places].astype(np.uint64)
        if strange.any():
            sound[places[strange]] = False
            rows = rows[sound[places]]
        return rows, {at: self._fault(replies[at]) for at in np.flatnonzero(~sound).tolist()}

    def _fault(self, reply: Reply) -> StoreError:
        what = f"{self.entity} of window {self.meta.ref}"
        if isinstance(reply, StoreError):
            return reply
        if reply is None:
            return StoreCorrupt(f"{what}: a bucket is lost (evicted, or the window was removed)")
        size = row_dtype(self.meta.dim, self.meta.dtype).itemsize
        if len(reply) % size:
            return StoreCorrupt(f"{what}: a bucket is not a whole number of {size} bytes")
        return StoreCorrupt(f"{what}: a bucket holds rows of another bucket or build")
