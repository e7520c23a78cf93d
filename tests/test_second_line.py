"""Two lines of readers: what the first one does not answer comes from the second."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_store import many_ids, uint64, window_of

from embeddings_store import (
    Entity,
    Failure,
    Reader,
    RequestWindows,
    StoreBusy,
    StoreClosed,
    StoreError,
    StoreUnavailable,
    WindowNotFound,
    WindowRef,
    Windows,
    open_store,
)
from embeddings_store.second_line import AwaitedReader, TwoLines

IDS = uint64(1, 2, 3, 4)


class Faulty:
    """A reader that fails wholly, or for some ids, with an error."""

    def __init__(self, inner: Reader) -> None:
        self.inner = inner
        self.error: StoreError | None = None
        self.lost: tuple[int, ...] | None = None

    @property
    def ref(self) -> WindowRef:
        return self.inner.ref

    @property
    def dim(self) -> int:
        return self.inner.dim

    async def lookup(self, entity: Entity, ids: np.ndarray, *, deadline_ms: float = 10) -> Windows:
        if self.error is None:
            return await self.inner.lookup(entity, ids)
        if self.lost is None:
            raise self.error
        return self._without(await self.inner.lookup(entity, ids), np.isin(ids, self.lost))

    async def lookup_request(
        self, user_id: int, item_ids: np.ndarray, *, deadline_ms: float = 10
    ) -> RequestWindows:
        user = await self.lookup("users", uint64(user_id))
        return RequestWindows(user, await self.lookup("items", item_ids))

    async def close(self) -> None:
        await self.inner.close()

    def _without(self, found: Windows, rows: np.ndarray) -> Windows:
        if not rows.any():
            return found
        found.vectors[rows], found.present[rows] = 0, False
        assert self.error is not None
        return replace(found, failure=Failure(self.error, rows))


def run(tmp_path: Path, use: Any) -> None:
    async def main() -> None:
        store = open_store(str(tmp_path))
        ref = store.publish(window_of(IDS))
        first = Faulty(await store.reader(ref))
        lines = TwoLines(first, await store.reader(ref))
        await use(first, lines)
        await lines.close()

    asyncio.run(main())


def firsts(windows: Windows) -> list[float]:
    return [round(float(value), 4) for value in windows.vectors[:, 0, 0]]


def test_while_the_first_line_answers_the_second_is_not_mentioned(tmp_path: Path) -> None:
    async def use(_: Faulty, lines: TwoLines) -> None:
        found = await lines.lookup_request(3, uint64(1, 9))
        assert (firsts(found.user), firsts(found.items)) == ([3.6], [1.6, 0])
        assert found.user.second_line is found.items.second_line is None

    run(tmp_path, use)


@pytest.mark.parametrize("error", [StoreUnavailable("away"), StoreBusy("full")])
def test_a_failure_of_the_first_line_is_answered_by_the_second(
    tmp_path: Path, error: StoreError
) -> None:
    async def use(first: Faulty, lines: TwoLines) -> None:
        first.error = error
        found = await lines.lookup_request(3, uint64(1, 9))
        assert (firsts(found.user), firsts(found.items)) == ([3.6], [1.6, 0])
        assert found.user.second_line is found.items.second_line is error
        alone = await lines.lookup("users", uint64(2))
        assert (firsts(alone), alone.second_line) == ([2.6], error)

    run(tmp_path, use)


def test_only_the_rows_that_failed_come_from_the_second_line(tmp_path: Path) -> None:
    async def use(first: Faulty, lines: TwoLines) -> None:
        first.error, first.lost = StoreUnavailable("a part is away"), (2, 4)
        found = await lines.lookup_request(4, uint64(4, 1, 9, 2, 4))
        assert (firsts(found.user), firsts(found.items)) == ([4.6], [4.6, 1.6, 0, 2.6, 4.6])
        assert found.items.failure is found.user.failure is None
        assert found.items.second_line is found.user.second_line is first.error
        found = await lines.lookup_request(1, uint64(1, 3))
        assert found.items.second_line is found.user.second_line is None

    run(tmp_path, use)


def test_a_closed_first_line_is_not_covered_up(tmp_path: Path) -> None:
    async def use(first: Faulty, lines: TwoLines) -> None:
        first.error = StoreClosed("closed")
        with pytest.raises(StoreClosed):
            await lines.lookup("items", IDS)
        with pytest.raises(StoreClosed):
            await lines.lookup_request(1, IDS)

    run(tmp_path, use)


def test_lines_of_two_windows_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(str(tmp_path))
        one = await store.reader(store.publish(window_of(IDS)))
        other = await store.reader(store.publish(window_of(many_ids(9))))
        with pytest.raises(ValueError, match="second line"):
            TwoLines(one, other)

    asyncio.run(main())


def test_an_awaited_reader_says_why_it_is_not_open_and_opens_by_itself(tmp_path: Path) -> None:
    async def main() -> None:
        store, window = open_store(str(tmp_path)), window_of(IDS)
        why = StoreUnavailable("not yet")
        reader = AwaitedReader(window.ref, window.dim, store.reader, why, retry_s=0.01)
        assert (reader.ref, reader.dim) == (window.ref, window.dim)
        with pytest.raises(StoreUnavailable, match="not yet"):
            await reader.lookup("items", IDS)
        await asyncio.sleep(0.05)
        with pytest.raises(WindowNotFound):
            await reader.lookup_request(1, IDS)
        store.publish(window)
        async with asyncio.timeout(5):
            while True:
                try:
                    found = await reader.lookup_request(1, IDS)
                    break
                except WindowNotFound:
                    await asyncio.sleep(0.01)
        assert firsts(found.items) == [1.6, 2.6, 3.6, 4.6]
        await reader.close()
        with pytest.raises(StoreClosed):
            await reader.lookup("items", IDS)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())


def test_an_awaited_window_of_another_size_is_never_used(tmp_path: Path) -> None:
    async def main() -> None:
        store = open_store(str(tmp_path))
        ref = store.publish(window_of(IDS))
        reader = AwaitedReader(ref, 99, store.reader, StoreUnavailable("not yet"), retry_s=0.01)
        await asyncio.sleep(0.1)
        with pytest.raises(StoreError, match="not 99"):
            await reader.lookup("items", IDS)
        await reader.close()

    asyncio.run(main())
