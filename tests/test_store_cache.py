"""The item cache, in front of a real embedded reader that counts and can be made slow or broken."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from runclock import run_s
from servers import running_server

from embeddings_store import (
    ENTITIES,
    Entity,
    Failure,
    PackedWindow,
    Reader,
    RequestWindows,
    Snapshot,
    StoreBusy,
    StoreClosed,
    StoreTimeout,
    StoreUnavailable,
    WindowRef,
    Windows,
    open_store,
    pack_window,
    window_months,
)
from embeddings_store.cache import CachedReader

DIM = 4
IDS = np.arange(1, 2001, dtype=np.uint64)
SLOT_BYTES = 8 + 2 * 4 + 3 + 4 * 3 * (DIM + 1)


def uint64(*ids: int) -> np.ndarray:
    return np.array(ids, dtype=np.uint64)


def window() -> PackedWindow:
    """Row of id i holds i everywhere."""
    values = np.repeat(IDS.astype(np.float32)[:, None], DIM, axis=1)
    snapshots = {
        m: {e: Snapshot(m, IDS, values, values[:, 0].copy()) for e in ENTITIES}
        for m in window_months("2017-06")
    }
    return pack_window("2017-06", snapshots, "float32")


class RecordingReader:
    """A reader that notes what it is asked for, and waits or fails when told to."""

    def __init__(self, inner: Reader) -> None:
        self.inner = inner
        self.asked: list[tuple[str, list[int]]] = []
        self.delay_s = 0.0
        self.failure: Exception | None = None
        self.lost: set[int] = set()

    @property
    def ref(self) -> WindowRef:
        return self.inner.ref

    @property
    def dim(self) -> int:
        return self.inner.dim

    async def lookup(self, entity: Entity, ids: np.ndarray, *, deadline_ms: float = 10) -> Windows:
        await self._note(entity, ids)
        return await self.inner.lookup(entity, ids, deadline_ms=deadline_ms)

    async def lookup_request(
        self, user_id: int, item_ids: np.ndarray, *, deadline_ms: float = 10
    ) -> RequestWindows:
        await self._note(f"user {user_id} and items", item_ids)
        found = await self.inner.lookup_request(user_id, item_ids, deadline_ms=deadline_ms)
        rows = np.isin(item_ids, np.array(sorted(self.lost), dtype=np.uint64))
        if not rows.any():
            return found
        found.items.vectors[rows], found.items.present[rows] = 0, False
        failure = Failure(StoreUnavailable("a part is away"), rows)
        return replace(found, items=replace(found.items, failure=failure))

    async def close(self) -> None:
        await self.inner.close()

    async def _note(self, what: str, ids: np.ndarray) -> None:
        self.asked.append((what, ids.tolist()))
        await asyncio.sleep(self.delay_s)
        if self.failure is not None:
            raise self.failure


class Clock:
    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


Use = Callable[[CachedReader, RecordingReader, Clock], Awaitable[None]]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., None]:
    """Calls the test's coroutine function with a cache, the reader behind it and its clock."""

    def go(use: Use, limit_bytes: int = 1 << 20, ttl_s: float = 60.0) -> None:
        async def main() -> None:
            store = open_store(str(tmp_path))
            behind, clock = RecordingReader(await store.reader(store.publish(window()))), Clock()
            cached = CachedReader(behind, limit_bytes=limit_bytes, ttl_s=ttl_s, clock_s=clock)
            try:
                await use(cached, behind, clock)
            finally:
                await cached.close()

        asyncio.run(main())

    return go


def values(windows: Windows) -> list[float]:
    assert (windows.vectors == windows.vectors[:, :1, :1]).all()
    return windows.vectors[:, 0, 0].tolist()


def test_order_and_duplicates_are_kept_for_hits_and_misses_mixed(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        assert values(await cached.lookup("items", uint64(3, 1, 3, 2))) == [3, 1, 3, 2]
        assert values(await cached.lookup("items", uint64(9, 3, 9, 1))) == [9, 3, 9, 1]
        assert behind.asked == [("items", [1, 2, 3]), ("items", [9])]
        assert (cached.counts.hits, cached.counts.misses) == (2, 6)
        assert cached.ref == behind.ref
        assert cached.dim == DIM

    run(use)


def test_a_request_asks_only_for_its_user_and_the_items_it_lacks(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        for user in (7, 8):
            got = await cached.lookup_request(user, uint64(1, 2, 7))
            assert values(got.user) == [user]
            assert values(got.items) == [1, 2, 7]
        assert behind.asked == [("user 7 and items", [1, 2, 7]), ("users", [8])]

    run(use)


def test_users_are_never_cached(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        for _ in range(2):
            assert values(await cached.lookup("users", uint64(4))) == [4]
        assert len(behind.asked) == 2
        assert cached.size_bytes == 0

    run(use)


def test_absences_are_remembered(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        for _ in range(2):
            got = await cached.lookup("items", uint64(5, 10**12))
            assert values(got) == [5, 0]
            assert got.present[:, 0].tolist() == [True, False]
        assert len(behind.asked) == 1
        assert cached.counts.hits == 2

    run(use)


def test_an_item_is_asked_for_again_when_its_time_is_over(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, clock: Clock) -> None:
        await cached.lookup("items", uint64(1))
        clock.now_s += 59
        await cached.lookup("items", uint64(1))
        assert len(behind.asked) == 1
        clock.now_s += 2  # being used does not prolong it
        assert cached.size_bytes == 0
        assert values(await cached.lookup("items", uint64(1))) == [1]
        assert len(behind.asked) == 2
        assert cached.counts.evictions == 0

    run(use)


def test_concurrent_misses_of_the_same_ids_are_fetched_once(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        behind.delay_s = 0.02
        asked = [uint64(1, 2, 3), uint64(3, 2), uint64(3, 4), uint64(1)]
        lookups = (cached.lookup("items", ids, deadline_ms=1000) for ids in asked)
        answers = await asyncio.gather(
            *lookups, cached.lookup_request(8, uint64(2, 4), deadline_ms=1000)
        )
        assert [values(a) for a in answers[:4]] == [ids.tolist() for ids in asked]
        assert values(answers[4].items) == [2, 4]
        assert values(answers[4].user) == [8]
        assert [ids for _, ids in behind.asked] == [[1, 2, 3], [4], []]

    run(use)


def test_a_cancelled_lookup_does_not_take_the_answer_of_others_along(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        behind.delay_s = 0.03
        first = asyncio.create_task(cached.lookup("items", uint64(1), deadline_ms=1000))
        await asyncio.sleep(0)
        second = asyncio.create_task(cached.lookup("items", uint64(1), deadline_ms=1000))
        await asyncio.sleep(0.005)
        first.cancel()
        assert values(await second) == [1]
        with pytest.raises(asyncio.CancelledError):
            await first
        assert len(behind.asked) == 1

    run(use)


def test_a_failure_reaches_every_waiter_and_is_not_remembered(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        behind.failure, behind.delay_s = StoreBusy("full"), 0.01
        lookups = [cached.lookup("items", uint64(1), deadline_ms=1000) for _ in range(3)]
        results = await asyncio.gather(*lookups, return_exceptions=True)
        assert [type(result) for result in results] == [StoreBusy] * 3
        behind.failure = None
        assert values(await cached.lookup("items", uint64(1), deadline_ms=1000)) == [1]
        assert len(behind.asked) == 2

    run(use)


def test_a_lookup_that_joins_a_slow_fetch_still_keeps_its_own_deadline(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        behind.delay_s = 0.2
        slow = asyncio.create_task(cached.lookup("items", uint64(1), deadline_ms=1000))
        await asyncio.sleep(0)
        start_s = run_s()
        with pytest.raises(StoreTimeout):
            await cached.lookup("items", uint64(1), deadline_ms=20)
        assert run_s() - start_s < 0.1
        assert values(await slow) == [1]

    run(use)


def test_its_bytes_stay_bounded_and_its_answers_right_when_items_are_displaced(run: Any) -> None:
    limit_bytes = 100 * SLOT_BYTES

    async def use(cached: CachedReader, _: RecordingReader, clock: Clock) -> None:
        rng = np.random.default_rng(1)
        for _ in range(60):
            clock.now_s += 0.1
            ids = rng.choice(IDS[:400], 50)
            assert values(await cached.lookup("items", ids)) == ids.tolist()
            assert cached.size_bytes <= limit_bytes
        assert cached.size_bytes > limit_bytes // 2
        assert cached.counts.evictions > 0
        assert cached.counts.hits > 0
        assert cached.counts.hits + cached.counts.misses == 60 * 50

    run(use, limit_bytes)


def test_what_is_used_stays_and_what_is_not_is_displaced(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, clock: Clock) -> None:
        for item in range(1, 60):  # two sets of eight; nothing expires meanwhile
            clock.now_s += 0.4
            await cached.lookup("items", uint64(item))
            clock.now_s += 0.4
            await cached.lookup("items", uint64(1))
        assert [ids for _, ids in behind.asked] == [[item] for item in range(1, 60)]
        assert cached.size_bytes == 16 * SLOT_BYTES
        assert cached.counts.evictions == 59 - 16

    run(use, 16 * SLOT_BYTES)


def test_more_new_items_than_fit_are_all_answered(run: Any) -> None:
    async def use(cached: CachedReader, _: RecordingReader, __: Clock) -> None:
        assert values(await cached.lookup("items", IDS)) == IDS.tolist()
        assert cached.size_bytes == 16 * SLOT_BYTES

    run(use, 16 * SLOT_BYTES)


def test_a_limit_below_two_sets_is_refused(run: Any) -> None:
    with pytest.raises(ValueError, match="limit_bytes"):
        run(lambda *_: None, 16 * SLOT_BYTES - 1)


def test_an_item_with_the_id_of_an_empty_slot_is_not_found_there(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        few = np.arange(20, dtype=np.uint64)
        for _ in range(2):
            assert (await cached.lookup("items", few)).present.any(axis=1).tolist() == (
                few > 0
            ).tolist()
        assert len(behind.asked) == 1

    run(use)


def test_an_item_that_expired_takes_its_own_place_again(run: Any) -> None:
    async def use(cached: CachedReader, _: RecordingReader, clock: Clock) -> None:
        for round_ in range(5):
            clock.now_s += 100
            assert values(await cached.lookup("items", IDS[:200])) == IDS[:200].tolist()
            assert cached.size_bytes == 200 * SLOT_BYTES, round_
        assert cached.counts.evictions == 0

    run(use, ttl_s=60)


def test_a_warmed_cache_is_asked_for_nothing(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        assert await cached.warm(IDS) == len(IDS)
        behind.asked.clear()
        assert values(await cached.lookup("items", IDS[:500])) == IDS[:500].tolist()
        assert behind.asked == []
        assert (cached.counts.hits, cached.counts.misses) == (500, 0)

    run(use)


def test_warming_stops_at_half_of_the_slots(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        assert await cached.warm(IDS) == 400
        assert sum(len(ids) for _, ids in behind.asked) == 400
        assert cached.counts.evictions == 0

    run(use, 800 * SLOT_BYTES)


def test_rows_that_failed_are_named_and_asked_for_again(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        behind.lost = {3, 5}
        found = (await cached.lookup_request(1, uint64(2, 3, 4, 5, 3))).items
        assert found.failure is not None
        assert found.failure.rows.tolist() == [False, True, False, True, True]
        assert found.present.any(axis=1).tolist() == [True, False, True, False, False]
        behind.lost = set()
        behind.asked.clear()
        assert values(await cached.lookup("items", uint64(2, 3, 4, 5))) == [2, 3, 4, 5]
        assert behind.asked == [("items", [3, 5])]

    run(use)


def test_what_is_held_is_answered_while_the_reader_behind_fails(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        await cached.lookup("items", uint64(1, 2))
        behind.failure = StoreUnavailable("away")
        found = await cached.lookup_request(7, uint64(2, 3, 1))
        assert found.user.failure is not None
        assert found.user.failure.error is behind.failure
        assert not found.user.present.any()
        assert found.items.failure is not None
        assert found.items.failure.rows.tolist() == [False, True, False]
        assert found.items.vectors[[0, 2], 0, 0].tolist() == [2, 1]
        with pytest.raises(StoreUnavailable):
            await cached.lookup_request(7, uint64(8, 9))

    run(use)


def test_a_closed_cache_answers_nothing_not_even_what_it_held(run: Any) -> None:
    async def use(cached: CachedReader, behind: RecordingReader, _: Clock) -> None:
        await cached.lookup("items", uint64(1))
        behind.delay_s = 0.05
        waiting = asyncio.create_task(cached.lookup("items", uint64(2), deadline_ms=1000))
        await asyncio.sleep(0.01)
        await cached.close()
        with pytest.raises(StoreClosed):
            await waiting
        with pytest.raises(StoreClosed):
            await cached.lookup("items", uint64(1))

    run(use)


def test_cached_items_outlive_a_server_that_is_away() -> None:
    async def main() -> None:
        with running_server() as server:
            store = open_store(server.url)
            reader = await store.reader(store.publish(window()))
            cached = CachedReader(reader, limit_bytes=1 << 20, ttl_s=60)
            await cached.lookup_request(1, IDS[:100], deadline_ms=1000)
            server.freeze()
            assert values(await cached.lookup("items", IDS[:100])) == IDS[:100].tolist()
            found = await cached.lookup_request(1, IDS[:100])
            assert values(found.items) == IDS[:100].tolist()
            assert found.user.failure is not None
            assert isinstance(found.user.failure.error, StoreUnavailable)
            await cached.close()
            store.close()

    asyncio.run(main())
