"""Historical embeddings of users and items: windows of three monthly snapshots.

Published by a batch job, looked up by the service. `open_store` is the way in; `window` holds the
types.
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from embeddings_store.embedded import EmbeddedReader, EmbeddedStore
from embeddings_store.snapshot import read_snapshot, write_snapshot
from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    ENTITIES,
    Entity,
    Failure,
    PackedWindow,
    Reader,
    RequestWindows,
    Snapshot,
    Store,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreRejected,
    StoreTimeout,
    StoreUnavailable,
    WindowNotFound,
    WindowRef,
    Windows,
    WindowStats,
    Writer,
    all_absent,
    all_failed,
    pack_window,
    window_months,
)

__all__ = [
    "DEFAULT_DEADLINE_MS",
    "ENTITIES",
    "EmbeddedReader",
    "EmbeddedStore",
    "Entity",
    "Failure",
    "PackedWindow",
    "Reader",
    "RequestWindows",
    "Snapshot",
    "Store",
    "StoreBusy",
    "StoreClosed",
    "StoreCorrupt",
    "StoreError",
    "StoreRejected",
    "StoreTimeout",
    "StoreUnavailable",
    "WindowNotFound",
    "WindowRef",
    "WindowStats",
    "Windows",
    "Writer",
    "all_absent",
    "all_failed",
    "open_store",
    "pack_window",
    "read_snapshot",
    "window_months",
    "write_snapshot",
]


def open_store(
    url: str,
    *,
    prefix: str = "ecdctr",
    max_connections: int = 16,
    max_mbps: float | None = None,
) -> Store:
    """Open the store that `url` names; nothing is connected yet.

    A path or file:///path is an embedded store; redis://, rediss:// and unix:// a Redis or Valkey
    server; redis+cluster:// and rediss+cluster://host:port,host:port a cluster. Only for servers
    count `prefix` (start of every key), `max_connections` (per reader and server) and `max_mbps`
    (megabytes a second that publishing writes at most).
    ValueError for any other URL, without repeating it: it may hold a password.
    """
    scheme, colon, rest = url.partition("://")
    if not colon:
        return EmbeddedStore(Path(url))
    if scheme == "file":
        if not rest.startswith("/"):
            raise ValueError("a file URL must be absolute: file:///path")
        return EmbeddedStore(Path(unquote(urlsplit(url).path)))
    # Imported here, so that an embedded store needs no redis client.
    from embeddings_store.redis import RedisStore

    return RedisStore(url, prefix=prefix, max_connections=max_connections, max_mbps=max_mbps)
