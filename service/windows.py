"""Where a bundle's windows come from: the store, a copy beside it, a cache in front of both."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass

from embeddings_store import (
    EmbeddedStore,
    Reader,
    Store,
    StoreError,
    StoreUnavailable,
    WindowRef,
    open_store,
)
from embeddings_store.cache import CachedReader
from embeddings_store.second_line import AwaitedReader, TwoLines
from service.background import in_background
from service.settings import Settings

log = logging.getLogger(__name__)


@dataclass
class _Shared:
    """A reader, and how many bundles it is lent to."""

    reader: Reader
    num: int = 1


class WindowSource:
    """Lends readers as the settings say; `store` is the one that they name unless given.

    Bundles of one window have one reader, and with it one cache: a bundle that replaces another of
    the same window finds it filled, and needs no store to be there.
    """

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self._settings = settings
        self._shared: dict[WindowRef, _Shared] = {}
        self._opening = asyncio.Lock()
        self._store = store or open_store(settings.store)
        self._copy = open_store(settings.store_copy) if settings.store_copy else None

    async def reader(self, ref: WindowRef, dim: int, *, may_wait: bool) -> Reader:
        """A reader of one build, whose vectors should have D = `dim`, until `let_go`.

        A store that gives no answer is no error where there is a copy, or where the caller would
        rather score without windows than wait (`may_wait`): it is opened once it is back. All else
        raises StoreError.
        """
        async with self._opening:
            shared = self._shared.get(ref)
            if shared is not None:
                shared.num += 1
                return shared.reader
            return await self._open(ref, dim, may_wait)

    async def let_go(self, reader: Reader) -> bool:
        """Closes a reader that was lent, unless another bundle has it too; whether it did."""
        shared = self._shared.get(reader.ref)
        if shared is not None and shared.reader is reader:
            shared.num -= 1
            if shared.num:
                return False
            del self._shared[reader.ref]
        await reader.close()
        return True

    def close(self) -> None:
        self._store.close()
        if self._copy is not None:
            self._copy.close()

    async def _open(self, ref: WindowRef, dim: int, may_wait: bool) -> Reader:
        copy = await self._open_copy(ref)
        try:
            first: Reader = await self._store.reader(ref)
        except StoreUnavailable as error:
            if copy is None and not may_wait:
                raise
            log.warning("window %s: %s; it is opened once its store is back", ref, error)
            first = AwaitedReader(ref, dim, self._store.reader, error)
        except BaseException:
            if copy is not None:
                await copy.close()
            raise
        reader = first if copy is None else TwoLines(first, copy)
        # Its memory is touched when it is made, which takes a while: not on the event loop.
        try:
            reader = await in_background(self._cached, reader)
        except BaseException:
            await reader.close()
            raise
        if copy is not None or self._copy is None:  # else the next bundle is to find the copy
            self._shared[ref] = _Shared(reader)
        return reader

    def _cached(self, reader: Reader) -> Reader:
        limit_bytes = self._settings.item_cache_mb * 1_000_000
        if isinstance(self._store, EmbeddedStore) or not limit_bytes:
            return reader  # the pages of the files are a cache already
        return CachedReader(reader, limit_bytes=limit_bytes, ttl_s=self._settings.item_cache_ttl_s)

    async def _open_copy(self, ref: WindowRef) -> Reader | None:
        if self._copy is None:
            return None
        try:
            return await self._copy.reader(ref)
        except StoreError as error:
            # The first line is enough to go live with, and an operator should know all the same.
            log.error("window %s has no second line: %s", ref, error)
            return None
