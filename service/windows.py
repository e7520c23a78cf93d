"""Where a bundle's windows come from: the store, a copy beside it, a cache in front of both."""

from __future__ import annotations

import logging

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


class WindowSource:
    """Opens readers as the settings say; `store` is the one that they name unless given."""

    def __init__(self, settings: Settings, store: Store | None = None) -> None:
        self._settings = settings
        self._store = store or open_store(settings.store)
        self._copy = open_store(settings.store_copy) if settings.store_copy else None

    async def reader(self, ref: WindowRef, dim: int, *, may_wait: bool) -> Reader:
        """A reader of one build, whose vectors should have D = `dim`.

        A store that gives no answer is no error where there is a copy, or where the caller would
        rather score without windows than wait (`may_wait`): it is opened once it is back. All else
        raises StoreError.
        """
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
        return await in_background(self._cached, reader)

    def close(self) -> None:
        self._store.close()
        if self._copy is not None:
            self._copy.close()

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
