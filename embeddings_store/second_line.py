"""What a service reads from while its store is away: a copy beside it, or nothing for a while."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import replace

from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    Entity,
    Ids,
    Reader,
    RequestWindows,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    WindowRef,
    Windows,
)

_RETRY_S = 1.0
_FIRST_SHARE = 0.9
"""Of a deadline, for the first line; a copy on the disk needs tens of microseconds."""


class TwoLines:
    """Implements `Reader` for the window of the two readers that it owns.

    What the first one has no answer to is read from the second, which must be a local copy; then
    `Windows.second_line` says why.
    """

    def __init__(self, first: Reader, second: Reader) -> None:
        if first.ref != second.ref:
            raise ValueError(f"the second line is of {second.ref}, must be of {first.ref}")
        self._first, self._second = first, second

    @property
    def ref(self) -> WindowRef:
        return self._first.ref

    @property
    def dim(self) -> int:
        return self._second.dim

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        try:
            found = await self._first.lookup(entity, ids, deadline_ms=deadline_ms * _FIRST_SHARE)
        except StoreClosed:
            raise
        except StoreError as error:
            return replace(await self._second.lookup(entity, ids), second_line=error)
        return await self._completed(entity, ids, found)

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        try:
            found = await self._first.lookup_request(
                user_id, item_ids, deadline_ms=deadline_ms * _FIRST_SHARE
            )
        except StoreClosed:
            raise
        except StoreError as error:
            copy = await self._second.lookup_request(user_id, item_ids)
            user = replace(copy.user, second_line=error)
            return RequestWindows(user, replace(copy.items, second_line=error))
        user = found.user
        if user.failure:
            copy = await self._second.lookup_request(user_id, item_ids[:0])
            user = replace(copy.user, second_line=user.failure.error)
        return RequestWindows(user, await self._completed("items", item_ids, found.items))

    async def close(self) -> None:
        """Close both."""
        await self._first.close()
        await self._second.close()

    async def _completed(self, entity: Entity, ids: Ids, found: Windows) -> Windows:
        if found.failure is None:
            return found
        rows = found.failure.rows
        copy = await self._second.lookup(entity, ids[rows])
        found.vectors[rows], found.present[rows] = copy.vectors, copy.present
        num_invalid = found.num_invalid + copy.num_invalid
        return Windows(found.vectors, found.present, num_invalid, second_line=found.failure.error)


class AwaitedReader:
    """Implements `Reader` for a window whose store is away: it is opened in the background.

    Until that works, lookups raise why it did not. D is said beforehand, by who needs the window.
    """

    def __init__(
        self,
        ref: WindowRef,
        dim: int,
        open_reader: Callable[[WindowRef], Awaitable[Reader]],
        why: StoreError,
        *,
        retry_s: float = _RETRY_S,
    ) -> None:
        self._ref, self._dim = ref, dim
        self._open_reader = open_reader
        self._retry_s = retry_s
        self._why = why
        self._reader: Reader | None = None
        self._opener = asyncio.create_task(self._open())

    @property
    def ref(self) -> WindowRef:
        return self._ref

    @property
    def dim(self) -> int:
        return self._dim

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        return await self._opened().lookup(entity, ids, deadline_ms=deadline_ms)

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        return await self._opened().lookup_request(user_id, item_ids, deadline_ms=deadline_ms)

    async def close(self) -> None:
        """Stop trying, or close the reader."""
        self._opener.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._opener
        self._why = StoreClosed(f"reader of window {self._ref} is closed")
        if self._reader is not None:
            reader, self._reader = self._reader, None
            await reader.close()

    def _opened(self) -> Reader:
        if self._reader is None:
            raise type(self._why)(*self._why.args)
        return self._reader

    async def _open(self) -> None:
        while self._reader is None:
            await asyncio.sleep(self._retry_s)
            try:
                reader = await self._open_reader(self._ref)
            except StoreError as error:
                self._why = error
                continue
            if reader.dim == self._dim:
                self._reader = reader
                return
            self._why = StoreCorrupt(f"{self._ref}: vectors of {reader.dim}, not {self._dim}")
            await reader.close()
