"""A cache in this process, in front of a remote reader, for items: few are asked for over and over.

Users pass through. The cache is a table of sets of eight slots, in arrays: an item can lie only in
the set that its id falls into, and displaces the slot of that set which was used least recently.
That bounds the bytes exactly and keeps every step vectorised, with no object per item. Left out
for simplicity: eviction across sets, and a retry of a lookup whose shared fetch failed.
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
    Entity,
    Ids,
    Reader,
    RequestWindows,
    Rows,
    StoreClosed,
    StoreTimeout,
    WindowRef,
    Windows,
    all_absent,
    check_ids,
)

_WAYS = 8
_SPREAD = np.uint64(0x9E3779B97F4A7C15)
_HALF = np.uint64(32)
_NO_ITEMS: Ids = np.zeros(0, dtype=np.uint64)


@dataclass(frozen=True, eq=False)
class _Flight:
    """A fetch under way, which every lookup that misses one of its ids waits for."""

    ids: Ids
    """Sorted and unique."""
    task: asyncio.Task[RequestWindows]


class CachedReader:
    """Implements `Reader` for the same window as the reader that it owns.

    Remembers for `ttl_s` seconds what was found and what was not, never a failure. Counters:
    `hits` and `misses` in rows, `evictions` in items that were displaced while still valid.
    """

    def __init__(
        self,
        inner: Reader,
        *,
        limit_bytes: int,
        ttl_s: float,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        shape = (NUM_MONTHS, inner.dim + 1)
        self._slot_bytes = 3 * 8 + NUM_MONTHS + 4 * shape[0] * shape[1]
        self._num_sets = limit_bytes // (self._slot_bytes * _WAYS)
        if self._num_sets < 1:
            raise ValueError(f"limit_bytes {limit_bytes}: at least {self._slot_bytes * _WAYS}")
        num_slots = self._num_sets * _WAYS
        self._inner, self._ttl_s, self._clock_s = inner, ttl_s, clock_s
        self._ids: Ids = np.zeros(num_slots, dtype=np.uint64)
        self._expires_s = np.full(num_slots, -np.inf)
        self._used_s = np.full(num_slots, -np.inf)
        self._present = np.zeros((num_slots, NUM_MONTHS), dtype=np.bool_)
        self._vectors: Floats = np.zeros((num_slots, *shape), dtype=np.float32)
        self._flights: dict[int, _Flight] = {}
        self.hits = self.misses = self.evictions = 0

    @property
    def ref(self) -> WindowRef:
        return self._inner.ref

    @property
    def dim(self) -> int:
        return self._inner.dim

    @property
    def size_bytes(self) -> int:
        """Bytes of the slots that hold a valid item; never above `limit_bytes`."""
        return int((self._expires_s > self._clock_s()).sum()) * self._slot_bytes

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        if entity == "users":
            return await self._inner.lookup(entity, ids, deadline_ms=deadline_ms)
        return (await self._lookup(None, ids, deadline_ms)).items

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        return await self._lookup(user_id, item_ids, deadline_ms)

    async def close(self) -> None:
        """Close the reader behind; the cache ends with its window."""
        self._expires_s.fill(-np.inf)
        for flight in self._flights.values():
            flight.task.cancel()
        await self._inner.close()

    async def _lookup(self, user_id: int | None, ids: Ids, deadline_ms: float) -> RequestWindows:
        slots = self._find(check_ids(ids))
        hit = slots >= 0
        self.hits += int(hit.sum())
        self.misses += int((~hit).sum())
        vectors, present = self._vectors[slots], self._present[slots]  # of missed rows: replaced
        missed = np.unique(ids[~hit])
        others = {self._flights[i] for i in missed.tolist() if i in self._flights}
        new = np.array([i for i in missed.tolist() if i not in self._flights], dtype=np.uint64)
        user, num_invalid = all_absent(0, self.dim), 0
        mine: set[_Flight] = set()
        if new.size or user_id is not None:
            mine.add(self._start(user_id, new, deadline_ms))
        await _land_all(others, mine, deadline_ms)
        for flight in others | mine:
            fetched = flight.task.result()
            if flight in mine:
                user, num_invalid = fetched.user, fetched.items.num_invalid
            rows = np.flatnonzero(~hit & np.isin(ids, flight.ids))
            source = np.searchsorted(flight.ids, ids[rows])
            vectors[rows] = fetched.items.vectors[source]
            present[rows] = fetched.items.present[source]
        return RequestWindows(user, Windows(vectors, present, num_invalid))

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

    def _find(self, ids: Ids) -> Rows:
        """Slot of each id, or -1; int64 [n]."""
        now_s = self._clock_s()
        slots = self._slots_of(ids)  # [n, 8]
        match = (self._ids[slots] == ids[:, None]) & (self._expires_s[slots] > now_s)
        found = slots[np.arange(len(ids)), match.argmax(axis=1)]
        self._used_s[slots[match]] = now_s
        return np.where(match.any(axis=1), found, -1)

    def _keep(self, ids: Ids, items: Windows) -> None:
        """Of ids (unique) that fall into one set at the same time, eight are kept."""
        now_s = self._clock_s()
        slots = self._slots_of(ids)
        order = np.argsort(slots[:, 0], kind="stable")
        slots = slots[order]
        rank = np.arange(len(ids)) - np.searchsorted(slots[:, 0], slots[:, 0])
        kept = np.flatnonzero(rank < _WAYS)
        last_use_s = np.where(self._expires_s[slots] > now_s, self._used_s[slots], -np.inf)
        target = slots[kept, np.argsort(last_use_s, axis=1)[kept, rank[kept]]]
        source = order[kept]
        self.evictions += int((self._expires_s[target] > now_s).sum())
        self._ids[target] = ids[source]
        self._vectors[target] = items.vectors[source]
        self._present[target] = items.present[source]
        self._expires_s[target] = now_s + self._ttl_s
        self._used_s[target] = now_s

    def _slots_of(self, ids: Ids) -> Rows:
        sets = (((ids * _SPREAD) >> _HALF) * np.uint64(self._num_sets)) >> _HALF
        return sets.astype(np.int64)[:, None] * _WAYS + np.arange(_WAYS)


async def _land_all(others: set[_Flight], mine: set[_Flight], deadline_ms: float) -> None:
    """Wait for all; shielded, because others wait for them too."""
    try:
        async with asyncio.timeout(deadline_ms / 1000):
            for flight in others:
                await asyncio.shield(flight.task)
        for flight in mine:  # has the same deadline inside, and knows better why it failed
            await asyncio.shield(flight.task)
    except TimeoutError:
        raise StoreTimeout(f"no answer in {deadline_ms:g} ms") from None
    except asyncio.CancelledError:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        raise StoreClosed("the reader was closed during a lookup") from None
