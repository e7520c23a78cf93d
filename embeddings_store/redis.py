"""Windows in a Redis or Valkey server, or in a cluster of them: publishing, and what there is.

Keys of a store, where {} stand for themselves and decide in which slot of a cluster a key lies:

    {prefix}:windows                        hash    "2017-06-<build>" -> meta; here = visible
    {prefix}:unfinished                     hash    the same, while it is published or removed
    prefix:2017-06:<build>:{tag}:u:<b>      string  bucket b of users, and with i of items

See `embeddings_store.buckets` for what is in a bucket.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import cast

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.retry import Retry

from embeddings_store.address import Address
from embeddings_store.buckets import (
    Buckets,
    Meta,
    base_key,
    bucket_keys,
    index_key,
    slices,
    tag_of,
)
from embeddings_store.node import FOREIGN, translate
from embeddings_store.remote import RedisReader
from embeddings_store.window import (
    ENTITIES,
    Entity,
    PackedWindow,
    Progress,
    StoreCorrupt,
    WindowNotFound,
    WindowRef,
    WindowStats,
)

OPEN_DEADLINE_MS = 2000.0

_SAMPLE = 256  # buckets read back before a window becomes visible
_BLOCKING_TIMEOUT_S = 10.0


class RedisStore:
    """Windows in a server or cluster. Implements `Store`; its own calls block, its readers are
    async. `max_mbps` bounds how many megabytes a second publishing writes."""

    def __init__(
        self,
        url: str,
        *,
        prefix: str = "ecdctr",
        max_connections: int = 16,
        max_mbps: float | None = None,
    ) -> None:
        if "{" in prefix or "}" in prefix:
            raise ValueError(f"prefix {prefix!r} must have no braces: they decide on a key's slot")
        self._address = Address.parse(url)
        self._prefix = prefix
        self._max_connections = max_connections
        self._max_mbps = max_mbps

    def __repr__(self) -> str:
        return f"RedisStore({self._address.location!r}, prefix={self._prefix!r})"

    async def reader(self, ref: WindowRef) -> RedisReader:
        """Open one build, with all its connections made, so that no lookup has to wait for one."""
        reader = RedisReader(ref, self._address, self._prefix, self._max_connections)
        try:
            await reader.open(deadline_ms=OPEN_DEADLINE_MS)
        except BaseException:
            await reader.close()
            raise
        return reader

    def publish(self, window: PackedWindow, *, progress: Progress | None = None) -> WindowRef:
        """Write all buckets, read a sample back, then make the window visible in one step.

        A window that is there already is left alone if its sample is right, else written again.
        """
        tables = {entity: Buckets(entity, table, window) for entity, table in window.tables.items()}
        with self._translated():
            if self._stored("windows", window.ref) is None or not self._sample(window.ref, tables):
                started = Meta.of(window, tables)
                self._client.hset(self._index("unfinished"), str(window.ref), started.to_json())
                digests = self._write(window.ref, tables, progress)
                if not self._sample(window.ref, tables):
                    location = self._address.location
                    raise StoreCorrupt(f"{location}: window {window.ref} reads back wrong")
                self._move(Meta.of(window, tables, digests), "unfinished", "windows")
            elif self._stored("unfinished", window.ref) is not None:  # a repair was broken off
                self._client.hdel(self._index("unfinished"), str(window.ref))
        return window.ref

    def windows(self) -> list[WindowRef]:
        """Every complete window, sorted."""
        return self._listed("windows")

    def unfinished(self) -> list[WindowRef]:
        """Windows whose publishing or removal is under way or was broken off; `remove` takes them.

        A build that is published again because it was damaged is in both lists meanwhile.
        """
        return self._listed("unfinished")

    def stats(self, ref: WindowRef) -> WindowStats:
        """How large a complete window is; its bytes as the server's MEMORY USAGE has them for some
        of its keys, and as many for the others."""
        with self._translated():
            meta = self._complete(ref)
            size = sum(self._stored_bytes(meta, entity) for entity in meta.tables)
        users, items = (meta.tables[entity].num_rows for entity in ENTITIES)
        return WindowStats(users, items, meta.dim, meta.dtype, size)

    def check(self, ref: WindowRef) -> None:
        """Read all buckets and compare their checksums; StoreCorrupt when one is off."""
        with self._translated():
            meta = self._complete(ref)
            for entity, table in meta.tables.items():
                digest = hashlib.sha256()
                for tag, start, stop in slices(entity, table.num_buckets):
                    keys = bucket_keys(self._base(ref), entity, tag, range(start, stop))
                    for content in self._mget(keys):
                        digest.update(content or b"")
                if digest.hexdigest() != table.sha256:
                    raise StoreCorrupt(f"{entity} of window {ref}: checksum differs from meta")

    def remove(self, ref: WindowRef, *, progress: Progress | None = None) -> None:
        """Hide a window, then delete its keys, slice by slice; run again it completes."""
        with self._translated():
            text = self._stored("windows", ref) or self._stored("unfinished", ref)
            if text is None:
                raise WindowNotFound(f"no window {ref} in {self!r}")
            meta = Meta.from_json(text, ref)
            self._move(meta, "windows", "unfinished")
            num_buckets = {entity: table.num_buckets for entity, table in meta.tables.items()}
            for keys, _ in self._all_keys(ref, num_buckets, progress):
                self._client.unlink(*keys)
            self._client.hdel(self._index("unfinished"), str(ref))

    def close(self) -> None:
        """Close the blocking connections. Readers are closed on their own."""
        if (client := vars(self).pop("_client", None)) is not None:
            client.close()

    @cached_property
    def _client(self) -> redis.Redis | RedisCluster:
        options = {
            **self._address.blocking,
            "socket_timeout": _BLOCKING_TIMEOUT_S,
            "socket_connect_timeout": _BLOCKING_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 1),
        }
        if not self._address.is_cluster:
            return redis.Redis.from_pool(redis.ConnectionPool(**options))
        seeds = [ClusterNode(*seed) for seed in self._address.seeds]  # type: ignore[no-untyped-call]
        for name in ("host", "port"):
            options.pop(name, None)
        if options.pop("connection_class", None) is not None:
            options["ssl"] = True
        return RedisCluster(startup_nodes=seeds, **options)

    def _write(
        self, ref: WindowRef, tables: Mapping[Entity, Buckets], progress: Progress | None
    ) -> dict[Entity, str]:
        """The checksum of each table."""
        digests = {entity: hashlib.sha256() for entity in tables}
        num_buckets = {entity: table.num_buckets for entity, table in tables.items()}
        started_s, num_bytes = time.monotonic(), 0
        for keys, (entity, start, stop) in self._all_keys(ref, num_buckets, progress):
            contents = tables[entity].slice(start, stop)
            self._client.mset(dict(zip(keys, contents, strict=True)))
            for content in contents:
                digests[entity].update(content)
            num_bytes += sum(map(len, contents)) + sum(map(len, keys))
            if self._max_mbps:
                due_s = started_s + num_bytes / (self._max_mbps * 1e6)
                time.sleep(max(0.0, due_s - time.monotonic()))
        return {entity: digest.hexdigest() for entity, digest in digests.items()}

    def _all_keys(
        self, ref: WindowRef, num_buckets: Mapping[Entity, int], progress: Progress | None
    ) -> Iterator[tuple[list[bytes], tuple[Entity, int, int]]]:
        """Keys of all buckets, as many at a time as one command takes, with their (entity, start,
        stop); `progress` is called after each in buckets."""
        done, total = 0, sum(num_buckets.values())
        for entity, num in num_buckets.items():
            for tag, start, stop in slices(entity, num):
                keys = bucket_keys(self._base(ref), entity, tag, range(start, stop))
                yield keys, (entity, start, stop)
                done += stop - start
                if progress is not None:
                    progress(done, total)

    def _sample(self, ref: WindowRef, tables: Mapping[Entity, Buckets]) -> bool:
        """True when evenly spread buckets hold what they should."""
        for entity, table in tables.items():
            for bucket, key in self._spread(ref, entity, table.num_buckets):
                if self._mget([key]) != table.slice(bucket, bucket + 1):
                    return False
        return True

    def _spread(
        self, ref: WindowRef, entity: Entity, num_buckets: int
    ) -> Iterator[tuple[int, bytes]]:
        """Some buckets, evenly spread, the first and the last among them, and their keys."""
        step = max(1, num_buckets // _SAMPLE)
        for bucket in (*range(0, num_buckets, step), num_buckets - 1):
            tag = tag_of(bucket, num_buckets)
            yield bucket, bucket_keys(self._base(ref), entity, tag, [bucket])[0]

    def _move(self, meta: Meta, source: str, target: str) -> None:
        """One transaction: a window is in one of the two hashes at any time."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(self._index(target), str(meta.ref), meta.to_json())
        pipeline.hdel(self._index(source), str(meta.ref))
        pipeline.execute()

    def _complete(self, ref: WindowRef) -> Meta:
        text = self._stored("windows", ref)
        if text is None:
            raise WindowNotFound(f"no window {ref} in {self!r}")
        return Meta.from_json(text, ref)

    def _stored_bytes(self, meta: Meta, entity: Entity) -> int:
        num_buckets = meta.tables[entity].num_buckets
        keys = [key for _, key in self._spread(meta.ref, entity, num_buckets)]
        sizes = [self._client.memory_usage(key, samples=0) or 0 for key in keys]
        return round(sum(sizes) / len(sizes) * num_buckets)

    def _stored(self, which: str, ref: WindowRef) -> bytes | None:
        return cast("bytes | None", self._client.hget(self._index(which), str(ref)))

    def _listed(self, which: str) -> list[WindowRef]:
        with self._translated():
            names = cast("list[bytes]", self._client.hkeys(self._index(which)))
        return sorted(WindowRef.parse(name.decode()) for name in names)

    def _mget(self, keys: list[bytes]) -> list[bytes | None]:
        return cast("list[bytes | None]", self._client.mget(keys))

    def _index(self, name: str) -> str:
        return index_key(self._prefix, name)

    def _base(self, ref: WindowRef) -> str:
        return base_key(self._prefix, ref)

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except FOREIGN as error:
            raise translate(error, self._address.location) from error
