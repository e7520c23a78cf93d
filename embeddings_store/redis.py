"""Windows in a Redis or Valkey server (stand-alone; a cluster refuses reads across slots).

Keys, all starting with `{prefix}:`

    windows                        hash  "2017-06-<build>" -> meta JSON; being in here = visible
    unfinished                     hash  the same, while a window is being published or removed
    2017-06:<build>:{u,i}:<b>      string, bucket b: rows of id uint64, bits uint8, block [3, D + 1]

See `embeddings_store.buckets` for what is in a bucket.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from typing import Any, cast

import numpy as np
import redis
from redis import asyncio as aioredis
from redis.asyncio.connection import parse_url as parse_url_async
from redis.asyncio.retry import Retry as AsyncRetry
from redis.backoff import NoBackoff
from redis.connection import parse_url
from redis.retry import Retry

from embeddings_store.buckets import Buckets, Meta, Question, bucket_keys, slices
from embeddings_store.window import (
    DEFAULT_DEADLINE_MS,
    ENTITIES,
    Entity,
    Ids,
    PackedWindow,
    Progress,
    RequestWindows,
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
)

OPEN_DEADLINE_MS = 2000.0

_SAMPLE = 256  # buckets read back before a window becomes visible
_BLOCKING_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 2.0

# Foreign errors become ours here and nowhere else. The first that fits counts.
TRANSLATIONS: tuple[tuple[type[Exception], type[StoreError]], ...] = (
    (redis.exceptions.MaxConnectionsError, StoreBusy),
    (redis.exceptions.AuthenticationError, StoreRejected),
    (redis.exceptions.AuthorizationError, StoreRejected),
    (redis.exceptions.ResponseError, StoreRejected),
    (redis.exceptions.TimeoutError, StoreTimeout),
    (redis.exceptions.ConnectionError, StoreUnavailable),
    (redis.exceptions.RedisError, StoreError),
    (OSError, StoreUnavailable),
)
_FOREIGN = (redis.exceptions.RedisError, OSError)


def translate(error: Exception, location: str) -> StoreError:
    """Our error for one of redis-py's."""
    ours = next(ours for foreign, ours in TRANSLATIONS if isinstance(error, foreign))
    return ours(f"{location}: {error}")


class RedisStore:
    """Windows in a server. Implements `Store`; its own calls block, its readers are async."""

    def __init__(self, url: str, *, prefix: str = "ecdctr", max_connections: int = 16) -> None:
        self._options = _options(url)
        self._async_options = _options(url, asynchronous=True)
        self._prefix = prefix
        self._max_connections = max_connections
        self._location = _location(self._options)
        options = {
            **self._options,
            "socket_timeout": _BLOCKING_TIMEOUT_S,
            "socket_connect_timeout": _CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 1),
        }
        self._client = redis.Redis(connection_pool=redis.ConnectionPool(**options))

    def __repr__(self) -> str:
        return f"RedisStore({self._location!r}, prefix={self._prefix!r})"

    async def reader(self, ref: WindowRef) -> RedisReader:
        """Open one build, with all its connections made, so that no lookup has to wait for one."""
        reader = RedisReader(
            ref, self._async_options, self._location, self._prefix, self._max_connections
        )
        try:
            await reader.open()
        except BaseException:
            await reader.close()
            raise
        return reader

    def publish(self, window: PackedWindow, *, progress: Progress | None = None) -> WindowRef:
        """Write all buckets, read a sample back, then make the window visible with one HSET.

        A window that is there already is left alone if its sample is right, else written again.
        """
        buckets = {
            entity: Buckets(table, window.dim, window.dtype)
            for entity, table in window.tables.items()
        }
        tables = {entity: table.meta() for entity, table in buckets.items()}
        meta = Meta(window.ref, window.dim, window.dtype, tables)
        with self._translated():
            if self._stored("windows", window.ref) is None or not self._sample(meta, buckets):
                self._client.hset(self._key("unfinished"), str(meta.ref), meta.to_json())
                self._write(meta, buckets, progress)
                if not self._sample(meta, buckets):
                    raise StoreCorrupt(f"{self._location}: window {meta.ref} reads back wrong")
                self._move(meta, "unfinished", "windows")
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
                for start, stop in slices(table.num_buckets):
                    keys = bucket_keys(self._base(ref), entity, range(start, stop))
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
            done, total = 0, sum(table.num_rows for table in meta.tables.values())
            for entity, table in meta.tables.items():
                for start, stop in slices(table.num_buckets):
                    self._client.unlink(*bucket_keys(self._base(ref), entity, range(start, stop)))
                    if progress is not None:
                        progress(done + table.num_rows * stop // table.num_buckets, total)
                done += table.num_rows
            self._client.hdel(self._key("unfinished"), str(ref))

    def close(self) -> None:
        """Close the blocking connections. Readers are closed on their own."""
        self._client.close()

    def _write(
        self, meta: Meta, buckets: Mapping[Entity, Buckets], progress: Progress | None
    ) -> None:
        done, total = 0, sum(table.num_rows for table in meta.tables.values())
        for entity, table in meta.tables.items():
            for start, stop in slices(table.num_buckets):
                keys = bucket_keys(self._base(meta.ref), entity, range(start, stop))
                contents = buckets[entity].slice(start, stop)
                self._client.mset(dict(zip(keys, contents, strict=True)))
                if progress is not None:
                    progress(done + table.num_rows * stop // table.num_buckets, total)
            done += table.num_rows

    def _sample(self, meta: Meta, buckets: Mapping[Entity, Buckets]) -> bool:
        """True when evenly spread buckets hold what they should."""
        for entity, table in buckets.items():
            picked = _spread(table.num_buckets)
            expected = [table.slice(bucket, bucket + 1)[0] for bucket in picked]
            if self._mget(bucket_keys(self._base(meta.ref), entity, picked)) != expected:
                return False
        return True

    def _move(self, meta: Meta, source: str, target: str) -> None:
        """One transaction: a window is in one of the two hashes at any time."""
        pipeline = self._client.pipeline(transaction=True)
        pipeline.hset(self._key(target), str(meta.ref), meta.to_json())
        pipeline.hdel(self._key(source), str(meta.ref))
        pipeline.execute()

    def _complete(self, ref: WindowRef) -> Meta:
        text = self._stored("windows", ref)
        if text is None:
            raise WindowNotFound(f"no window {ref} in {self!r}")
        return Meta.from_json(text, ref)

    def _stored_bytes(self, meta: Meta, entity: Entity) -> int:
        num_buckets = meta.tables[entity].num_buckets
        picked = _spread(num_buckets)
        pipeline = self._client.pipeline(transaction=False)
        for key in bucket_keys(self._base(meta.ref), entity, picked):
            pipeline.memory_usage(key, samples=0)
        sizes = [size or 0 for size in pipeline.execute()]
        return round(sum(sizes) / len(sizes) * num_buckets)

    def _stored(self, which: str, ref: WindowRef) -> bytes | None:
        return cast("bytes | None", self._client.hget(self._key(which), str(ref)))

    def _listed(self, which: str) -> list[WindowRef]:
        with self._translated():
            names = cast("list[bytes]", self._client.hkeys(self._key(which)))
        return sorted(WindowRef.parse(name.decode()) for name in names)

    def _mget(self, keys: list[bytes]) -> list[bytes | None]:
        return cast("list[bytes | None]", self._client.mget(keys))

    def _key(self, name: str) -> str:
        return f"{self._prefix}:{name}"

    def _base(self, ref: WindowRef) -> str:
        return f"{self._prefix}:{ref.window}:{ref.build}"

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except _FOREIGN as error:
            raise translate(error, self._location) from error


class RedisReader:
    """One build in a server. Implements `Reader`; belongs to the event loop that opened it.

    At most `max_connections` lookups are under way. One that waits for its turn until its deadline
    gets StoreBusy; one that the server keeps waiting gets StoreTimeout, and its connection is
    closed, because the reply that may still come is not for whoever would use it next.
    """

    def __init__(
        self,
        ref: WindowRef,
        options: Mapping[str, Any],
        location: str,
        prefix: str,
        max_connections: int,
    ) -> None:
        self._ref = ref
        self._location = location
        self._index = f"{prefix}:windows"
        self._base = f"{prefix}:{ref.window}:{ref.build}"
        self._meta: Meta | None = None
        self._max_connections = max_connections
        # Our own turnstile, and not the pool's blocking one: it tells "busy" from "slow" exactly.
        self._turns = asyncio.Semaphore(max_connections)
        self._num_active = 0
        self._pool = aioredis.ConnectionPool(
            **{
                **options,
                "max_connections": 2 * max_connections,  # `_turns` bounds it, `_reconnect` adds
                "socket_timeout": None,  # each lookup has its own deadline
                "socket_connect_timeout": _CONNECT_TIMEOUT_S,
                "retry": AsyncRetry(NoBackoff(), 1),
            }
        )
        self._client = aioredis.Redis(connection_pool=self._pool)
        self._reconnecting: asyncio.Task[None] | None = None

    @property
    def ref(self) -> WindowRef:
        return self._ref

    @property
    def dim(self) -> int:
        return self._opened().dim

    async def open(self, *, deadline_ms: float = OPEN_DEADLINE_MS) -> None:
        """Connect, and verify that the window is there and complete."""
        async with self._deadline(deadline_ms):
            text = await cast("Any", self._client.hget(self._index, str(self._ref)))
            if text is None:
                raise WindowNotFound(f"{self._location}: no window {self._ref}")
            self._meta = Meta.from_json(text, self._ref)
            await self._connect(self._max_connections)

    async def lookup(
        self, entity: Entity, ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> Windows:
        question = Question.ask(self._opened(), entity, ids)
        return question.answer(await self._fetch(question.keys(self._base), deadline_ms))

    async def lookup_request(
        self, user_id: int, item_ids: Ids, *, deadline_ms: float = DEFAULT_DEADLINE_MS
    ) -> RequestWindows:
        meta = self._opened()
        user = Question.ask(meta, "users", np.array([user_id], dtype=np.uint64))
        items = Question.ask(meta, "items", item_ids)
        keys = user.keys(self._base) + items.keys(self._base)
        replies = await self._fetch(keys, deadline_ms)
        return RequestWindows(user.answer(replies[:1]), items.answer(replies[1:]))

    async def close(self) -> None:
        """Close all connections; later lookups raise StoreClosed."""
        self._meta = None
        if self._reconnecting is not None:
            self._reconnecting.cancel()
        await self._client.aclose()
        await self._pool.aclose()

    def _opened(self) -> Meta:
        if self._meta is None:
            raise StoreClosed(f"reader of window {self._ref} is closed")
        return self._meta

    async def _fetch(self, keys: list[bytes], deadline_ms: float) -> list[bytes | None]:
        if not keys:
            return []
        try:
            async with self._deadline(deadline_ms):
                return cast("list[bytes | None]", await cast("Any", self._client.mget(keys)))
        except StoreUnavailable:
            self._reconnect()
            raise

    @contextlib.asynccontextmanager
    async def _deadline(self, deadline_ms: float) -> AsyncIterator[None]:
        is_queued = False
        try:
            async with asyncio.timeout(deadline_ms / 1000):
                await self._connected(deadline_ms / 2)
                is_queued = True
                async with self._turns:
                    is_queued = False
                    self._num_active += 1
                    try:
                        yield
                    finally:
                        self._num_active -= 1
        except TimeoutError:
            if is_queued:
                message = f"{self._location}: all connections busy for {deadline_ms:g} ms"
                raise StoreBusy(message) from None
            raise StoreTimeout(f"{self._location}: no answer in {deadline_ms:g} ms") from None
        except _FOREIGN as error:
            raise translate(error, self._location) from error

    async def _connect(self, num: int) -> None:
        get_connection = cast("Callable[[], Awaitable[Any]]", self._pool.get_connection)
        held: list[Any] = []

        async def connect_one() -> None:
            held.append(await get_connection())

        try:
            results = await asyncio.gather(
                *(connect_one() for _ in range(num)), return_exceptions=True
            )
            for error in filter(None, results):
                raise error
        finally:
            for connection in held:
                await self._pool.release(connection)

    async def _connected(self, wait_ms: float) -> None:
        """Wait while connections are being made, but keep enough of the deadline for the lookup.

        One that went on with too little left would fail and take the new connection along.
        """
        if self._reconnecting is not None and not self._reconnecting.done():
            await asyncio.wait([self._reconnecting], timeout=wait_ms / 1000)
            if not self._reconnecting.done():
                raise StoreUnavailable(f"{self._location}: still connecting")

    def _reconnect(self) -> None:
        """After a failure, make all connections in the background.

        A lookup that has to connect first may never manage it in its few milliseconds (TLS,
        another zone), and would then fail for ever, long after the server has come back.
        """
        if self._reconnecting is None or self._reconnecting.done():
            self._reconnecting = asyncio.create_task(self._reconnect_once())

    async def _reconnect_once(self) -> None:
        with contextlib.suppress(*_FOREIGN):  # the next lookup reports it
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                await self._connect(self._max_connections - self._num_active)


def _spread(num_buckets: int) -> list[int]:
    """Some buckets, evenly spread, the first and the last among them."""
    step = max(1, num_buckets // _SAMPLE)
    return [*range(0, num_buckets, step), num_buckets - 1]


def _options(url: str, *, asynchronous: bool = False) -> dict[str, Any]:
    """Connection options of a URL; the error does not repeat it, for it may hold a password."""
    parse = parse_url_async if asynchronous else parse_url
    try:
        options = dict(parse(url))
    except ValueError:
        raise ValueError(
            "invalid redis URL: must be redis://[user:password@]host:port/db, rediss://..."
            " or unix:///socket, with special characters of the password percent-encoded"
        ) from None
    # Protocol 2 and no client name: a new connection costs no round trip beyond AUTH and SELECT.
    return {**options, "protocol": 2, "driver_info": None, "decode_responses": False}


def _location(options: Mapping[str, Any]) -> str:
    where = options.get("path") or f"{options.get('host', 'localhost')}:{options.get('port', 6379)}"
    return f"redis {where}/{options.get('db', 0)}"
