"""A cache in this process, in front of a remote reader, for items: few are asked for over and over.

Users pass through. The cache is a table of sets of eight slots, in arrays: an item can lie only in
the set that its id falls into, once, and displaces the slot of that set which was used least
recently. That bounds the bytes exactly and keeps every step vectorised, with no object per item.
Left out for simplicity: eviction across sets, and a retry of a lookup whose shared fetch failed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from embeddings_store.precision import Floats
from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    NUM_MONTHS,
    Bools,
    Entity,
    Failure,
    Ids,
    Reader,
    RequestWindows,
    Rows,
    StoreClosed,
    StoreError,
    StoreTimeout,
    WindowRef,
    Windows,
    all_absent,
    all_failed,
    check_answered,
    check_ids,
)

_WAYS = 8
_WAY_BITS = 3
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_WARM_CHUNK = 500  # a millisecond of the event loop
_WARM_PAUSE_S = 0.004
_WARM_DEADLINE_MS = 1000.0


@dataclass
class CacheCounts:
    """What a cache did since its counts were last taken."""

    hits: int = 0
    """Items that were in the cache, as they were asked for; `misses` likewise."""
    misses: int = 0
    evictions: int = 0
    """Items that were displaced while they were still valid."""


@dataclass(frozen=True, eq=False)
class _Flight:
    """A fetch under way, which every lookup that misses one of its ids waits for."""

    ids: Ids
    """Sorted and unique."""
    task: asyncio.Task[RequestWindows]


@dataclass(eq=False)
class _Answer:
    """The rows of one lookup while they are put together."""

    vectors: Floats
    present: Bools
    failed: Bools
    num_invalid: int = 0
    error: StoreError | None = None
    second_line: StoreError | None = None

    @classmethod
    def of(cls, windows: Windows) -> _Answer:
        return cls(windows.vectors, windows.present, np.zeros(len(windows.present), np.bool_))

    def take(self, rows: Rows, source: Rows, fetched: Windows) -> None:
        """Put rows of what was fetched in their places."""
        self.vectors[rows] = fetched.vectors[source]
        self.present[rows] = fetched.present[source]
        self.num_invalid += fetched.num_invalid
        self.second_line = self.second_line or fetched.second_line
        if fetched.failure:
            self.error, self.failed[rows] = fetched.failure.error, fetched.failure.rows[source]

    def windows(self) -> Windows:
        failure = Failure(self.error, self.failed) if self.error and self.failed.any() else None
        return Windows(self.vectors, self.present, self.num_invalid, failure, self.second_line)


class CachedReader:
    """Implements `Reader` for the same window as the reader that it owns.

    Remembers for `ttl_s` seconds what was found and what was not, never a failure. What it holds
    is answered even while the reader behind it fails.
    """

    def __init__(
        self,
        inner: Reader,
        *,
        limit_bytes: int,
        ttl_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        width = NUM_MONTHS * (inner.dim + 1)
        self._slot_bytes = 8 + 2 * 4 + NUM_MONTHS + 4 * width
        self._num_sets = limit_bytes // (self._slot_bytes * _WAYS)
        if self._num_sets < 2:
            raise ValueError(f"limit_bytes {limit_bytes}: at least {2 * self._slot_bytes * _WAYS}")
        num_slots = self._num_sets * _WAYS
        self._inner, self._ttl_s, self._clock_s = inner, ttl_s, clock_s
        self._started_s = clock_s()
        self._ids = self._no_ids()
        # Half the bytes of float64, so that more of them stay in the processor's cache; after a
        # hundred days they are still exact to a second.
        self._expires_s: Floats = np.full(num_slots, -np.inf, dtype=np.float32)
        self._used_s: Floats = np.full(num_slots, -np.inf, dtype=np.float32)
        # Not np.zeros, which leaves it to the first look-ups to get the memory from the system.
        self._present = np.full((num_slots, NUM_MONTHS), False)
        self._vectors: Floats = np.full((num_slots, width), 0.0, dtype=np.float32)
        self._flights: dict[int, _Flight] = {}
        self._is_warm = False
        self.counts = CacheCounts()

    def take_counts(self) -> CacheCounts:
        """What it did since this was last called."""
        counts, self.counts = self.counts, CacheCounts()
        return counts

    @property
    def ref(self) -> WindowRef:
        return self._inner.ref

    @property
    def dim(self) -> int:
        return self._inner.dim

    @property
    def size_bytes(self) -> int:
        """Bytes of the slots that hold a valid item; never above `limit_bytes`."""
        return int((self._expires_s > self._now_s()).sum()) * self._slot_bytes

    async def warm(self, ids: Ids) -> int:
        """Fetch items before they are asked for, unless that was done before: as many of the first
        as half of the slots hold, so that few displace each other. How many; StoreError when one
        part failed."""
        ids = check_ids(ids)[: 0 if self._is_warm else self._num_sets * _WAYS // 2]
        for start in range(0, len(ids), _WARM_CHUNK):
            await self._fetch(None, ids[start : start + _WARM_CHUNK], _WARM_DEADLINE_MS)
            await asyncio.sleep(_WARM_PAUSE_S)  # for the requests that are answered meanwhile
        self._is_warm = True
        return len(ids)

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        if entity == "users":
            return await self._inner.lookup(entity, ids, deadline_ms=deadline_ms)
        slots, hit = self._find(check_ids(ids))
        if hit is None:
            return self._held(slots)
        return (await self._completed(None, ids, slots, hit, deadline_ms)).items

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        slots, hit = self._find(check_ids(item_ids))
        if hit is not None:
            return await self._completed(user_id, item_ids, slots, hit, deadline_ms)
        held = self._held(slots)
        user_ids = np.array([user_id], dtype=np.uint64)
        try:
            user = await self._inner.lookup("users", user_ids, deadline_ms=deadline_ms)
        except StoreClosed:
            raise
        except StoreError as error:
            if not len(item_ids):
                raise
            user = all_failed(1, self.dim, error)
        return RequestWindows(user, held)

    async def close(self) -> None:
        """Close the reader behind; the cache ends with its window."""
        self._expires_s.fill(-np.inf)
        for flight in self._flights.values():
            flight.task.cancel()
        await self._inner.close()

    def _held(self, slots: Rows) -> Windows:
        shape = (len(slots), NUM_MONTHS, self.dim + 1)
        vectors = self._vectors.take(slots, axis=0).reshape(shape)
        return Windows(vectors, self._present.take(slots, axis=0))

    async def _completed(
        self, user_id: int | None, ids: Ids, slots: Rows, hit: Bools, deadline_ms: float
    ) -> RequestWindows:
        """The user, and items of which `slots` holds those that were hit."""
        answer = _Answer.of(all_absent(len(ids), self.dim))
        answer.take(np.flatnonzero(hit), np.arange(len(slots)), self._held(slots))
        missed = np.unique(ids[~hit])
        others = {self._flights[i] for i in missed.tolist() if i in self._flights}
        new = np.array([i for i in missed.tolist() if i not in self._flights], dtype=np.uint64)
        mine: set[_Flight] = set()
        if new.size or user_id is not None:
            mine.add(self._start(user_id, new, deadline_ms))
        await _land_all(others, mine, deadline_ms)
        user = all_absent(0, self.dim)
        for flight in others | mine:
            rows = np.flatnonzero(~hit & np.isin(ids, flight.ids))
            error = _error(flight, deadline_ms)
            if error is None:
                answer.take(
                    rows, np.searchsorted(flight.ids, ids[rows]), flight.task.result().items
                )
            else:
                answer.error, answer.failed[rows] = error, True
            if flight in mine and user_id is not None:
                user = all_failed(1, self.dim, error) if error else flight.task.result().user
        items = answer.windows()
        check_answered(items, user)
        return RequestWindows(user, items)

    def _start(self, user_id: int | None, ids: Ids, deadline_ms: float) -> _Flight:
        """A task of its own: a lookup that is cancelled must not take the others' answer along."""
        flight = _Flight(ids, asyncio.create_task(self._fetch(user_id, ids, deadline_ms)))
        self._flights.update(dict.fromkeys(ids.tolist(), flight))
        flight.task.add_done_callback(lambda _: self._land(flight))
        return flight

    def _land(self, flight: _Flight) -> None:
        for item in flight.ids.tolist():
            del self._flights[item]
        if not flight.task.cancelled():
            flight.task.exception()  # seen, even when every waiter has gone

    async def _fetch(self, user_id: int | None, ids: Ids, deadline_ms: float) -> RequestWindows:
        if user_id is None:
            items = await self._inner.lookup("items", ids, deadline_ms=deadline_ms)
            fetched = RequestWindows(all_absent(0, self.dim), items)
        else:
            fetched = await self._inner.lookup_request(user_id, ids, deadline_ms=deadline_ms)
        self._keep(ids, fetched.items)
        return fetched

    def _find(self, ids: Ids) -> tuple[Rows, Bools | None]:
        """Slots of the ids that are held, and which those are, bool [n]; None when all are."""
        sets = self._set_of(ids)
        flat = np.flatnonzero(self._ids.take(sets, axis=0) == ids[:, None])
        rows = flat >> _WAY_BITS
        slots = (sets.take(rows) << _WAY_BITS) + (flat & (_WAYS - 1))
        now_s = self._now_s()
        is_valid = self._expires_s.take(slots) > now_s
        if not is_valid.all():
            rows, slots = rows[is_valid], slots[is_valid]
        self._used_s[slots] = now_s
        self.counts.hits += len(slots)
        self.counts.misses += len(ids) - len(slots)
        if len(slots) == len(ids):
            return slots, None
        hit = np.zeros(len(ids), np.bool_)
        hit[rows] = True
        return slots, hit

    def _keep(self, ids: Ids, items: Windows) -> None:
        """Keep what was fetched for ids (unique), but not what failed."""
        if items.failure is not None:
            known = ~items.failure.rows
            ids, items = ids[known], Windows(items.vectors[known], items.present[known])
        target = self._targets(ids)
        kept = np.flatnonzero(target >= 0)
        ids, target = ids[kept], target[kept]
        now_s = self._now_s()
        held = self._ids.reshape(-1)
        is_valid = self._expires_s[target] > now_s
        self.counts.evictions += int((is_valid & (held[target] != ids)).sum())
        held[target] = ids
        self._vectors[target] = items.vectors[kept].reshape(-1, self._vectors.shape[1])
        self._present[target] = items.present[kept]
        self._expires_s[target] = now_s + self._ttl_s
        self._used_s[target] = now_s

    def _targets(self, ids: Ids) -> Rows:
        """A slot for each id, int64 [n]: that in which it lies already, else the least used of its
        set; -1 where more ids fall into one set at the same time than it has slots."""
        sets = self._set_of(ids)
        slots = (sets[:, None] << _WAY_BITS) + np.arange(_WAYS)  # [n, 8]
        lies = self._ids[sets] == ids[:, None]
        target = np.where(lies.any(axis=1), slots[np.arange(len(ids)), lies.argmax(axis=1)], -1)
        new = np.flatnonzero(target < 0)
        new = new[np.argsort(sets[new], kind="stable")]
        rank = np.arange(len(new)) - np.searchsorted(sets[new], sets[new])
        choice = slots[new]
        last_use_s = np.where(
            self._expires_s[choice] > self._now_s(), self._used_s[choice], -np.inf
        )
        last_use_s[np.isin(choice, slots[lies])] = np.inf  # taken by another of the ids
        order = np.argsort(last_use_s, axis=1, kind="stable")
        way = order[np.arange(len(new)), np.minimum(rank, _WAYS - 1)]
        is_free = (rank < _WAYS) & (last_use_s[np.arange(len(new)), way] < np.inf)
        target[new[is_free]] = choice[np.arange(len(new)), way][is_free]
        return target

    def _now_s(self) -> float:
        return self._clock_s() - self._started_s

    def _no_ids(self) -> Ids:
        """uint64 [sets, 8], in which no id lies in its own set."""
        candidates = np.arange(1024, dtype=np.uint64)
        sets = self._set_of(candidates)
        other = candidates[np.flatnonzero(sets != sets[0])[0]]
        ids = np.full((self._num_sets, _WAYS), candidates[0], dtype=np.uint64)
        ids[sets[0]] = other
        return ids

    def _set_of(self, ids: Ids) -> Rows:
        sets = (((ids * _SPREAD) >> _HALF) * np.uint64(self._num_sets)) >> _HALF
        return sets.view(np.int64)


async def _land_all(others: set[_Flight], mine: set[_Flight], deadline_ms: float) -> None:
    """Wait for all, cancelling none, because others wait for them too."""
    if others:
        await asyncio.wait([flight.task for flight in others], timeout=deadline_ms / 1000)
    if mine:  # has the same deadline inside
        await asyncio.wait([flight.task for flight in mine])


def _error(flight: _Flight, deadline_ms: float) -> StoreError | None:
    """Why a flight brought nothing; raises when the reader was closed meanwhile."""
    if not flight.task.done():
        return StoreTimeout(f"no answer in {deadline_ms:g} ms")
    if flight.task.cancelled():
        raise StoreClosed("the reader was closed during a lookup")
    error = flight.task.exception()
    if error is None or (isinstance(error, StoreError) and not isinstance(error, StoreClosed)):
        return error
    raise error
