"""Reads one build of a window from a Redis or Valkey server, or from a cluster of them."""

from __future__ import annotations

import asyncio

import numpy as np

from embeddings_store.address import Address
from embeddings_store.buckets import Meta, Question, Reply, base_key, index_key
from embeddings_store.cluster import open_servers
from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    Entity,
    Ids,
    RequestWindows,
    StoreClosed,
    StoreTimeout,
    WindowNotFound,
    WindowRef,
    Windows,
    check_answered,
)


class RedisReader:
    """One build in a server or cluster. Implements `Reader`; belongs to the event loop that opened
    it. At most `max_connections` lookups are under way at a server."""

    def __init__(self, ref: WindowRef, address: Address, prefix: str, max_connections: int) -> None:
        self._ref = ref
        self._location = address.location
        self._index = index_key(prefix, "windows")
        self._base = base_key(prefix, ref)
        self._servers = open_servers(address, max_connections)
        self._meta: Meta | None = None

    @property
    def ref(self) -> WindowRef:
        return self._ref

    @property
    def dim(self) -> int:
        return self._opened().dim

    async def open(self, *, deadline_ms: float) -> None:
        """Connect, and verify that the window is there and complete."""
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                await self._servers.open()
                text = await self._servers.hget(self._index, str(self._ref))
        except TimeoutError:
            raise StoreTimeout(f"{self._location}: no answer in {deadline_ms:g} ms") from None
        if text is None:
            raise WindowNotFound(f"{self._location}: no window {self._ref}")
        self._meta = Meta.from_json(text, self._ref)

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        question = Question.ask(self._opened(), entity, ids)
        (windows,) = await self._answered([question], deadline_ms)
        return windows

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        meta = self._opened()
        user = Question.ask(meta, "users", np.array([user_id], dtype=np.uint64))
        items = Question.ask(meta, "items", item_ids)
        return RequestWindows(*await self._answered([user, items], deadline_ms))

    async def close(self) -> None:
        """Close all connections; later lookups raise StoreClosed."""
        self._meta = None
        await self._servers.close()

    def _opened(self) -> Meta:
        if self._meta is None:
            raise StoreClosed(f"reader of window {self._ref} is closed")
        return self._meta

    async def _answered(self, questions: list[Question], deadline_ms: float) -> list[Windows]:
        """One round trip for all questions. Raises when no row at all was answered."""
        deadline_s = asyncio.get_running_loop().time() + deadline_ms / 1000
        parts = [part for question in questions for part in question.keys(self._base).items()]
        replies: list[Reply] = await self._servers.mget(parts, deadline_s) if parts else []
        answers, start = [], 0
        for question in questions:
            stop = start + len(question.buckets)
            answers.append(question.answer(replies[start:stop]))
            start = stop
        check_answered(*answers)
        return answers
