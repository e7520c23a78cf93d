"""Connections to one server, and whether it is worth asking now."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import redis
from redis.asyncio.connection import AbstractConnection, Connection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from embeddings_store.window import (
    StoreBusy,
    StoreClosed,
    StoreError,
    StoreRejected,
    StoreTimeout,
    StoreUnavailable,
)

Command = tuple[bytes | str, ...]
Ask = Callable[[Sequence[Command]], Awaitable[list[Any]]]
"""Asks a server, as `Node.ask` does."""
Verify = Callable[[Ask], Awaitable[None]]
"""Raises when the server is of no use."""

CONNECT_TIMEOUT_S = 0.5
PROBE_PAUSE_S = 0.2
"""Between two attempts to reach a server that is away: it is asked five times a second by a
process, however many requests come in, and it is back in use half a second after it is back."""

# Foreign errors become ours here and nowhere else. The first that fits counts.
TRANSLATIONS: tuple[tuple[type[Exception], type[StoreError]], ...] = (
    (redis.exceptions.MaxConnectionsError, StoreBusy),
    (redis.exceptions.AuthenticationError, StoreRejected),
    (redis.exceptions.AuthorizationError, StoreRejected),
    (redis.exceptions.ClusterError, StoreUnavailable),
    (redis.exceptions.TryAgainError, StoreUnavailable),
    (redis.exceptions.ResponseError, StoreRejected),
    (redis.exceptions.TimeoutError, StoreTimeout),
    (redis.exceptions.ConnectionError, StoreUnavailable),
    (redis.exceptions.RedisError, StoreError),
    (redis.exceptions.RedisClusterException, StoreUnavailable),  # no RedisError
    (OSError, StoreUnavailable),
)
FOREIGN = (redis.exceptions.RedisError, redis.exceptions.RedisClusterException, OSError)


def translate(error: Exception, location: str) -> StoreError:
    """Our error for one of redis-py's."""
    if isinstance(error, redis.exceptions.RedisClusterException):
        # It stands for whatever the last server that was tried said.
        cause = error.__cause__
        error = cause if isinstance(cause, FOREIGN) else error
    ours = next(ours for foreign, ours in TRANSLATIONS if isinstance(error, foreign))
    return ours(f"{location}: {error}")


class Node:
    """One server. Belongs to the event loop that it was first used in.

    At most `max_connections` questions are under way. One that waits for its turn until its
    deadline gets StoreBusy; one that the server keeps waiting gets StoreTimeout, and its connection
    is closed, because the reply that may still come is not for whoever would use it next.

    After a failure the server counts as away: new connections are made in the background and tried
    out with `verify`, and until that works, questions fail at once instead of waiting for nothing
    and hammering it. One that comes while this is tried for the first time waits for it, for a
    question that had to connect first (TLS, another zone) might never manage within its few
    milliseconds, and would fail for ever, long after the server has come back.
    """

    def __init__(
        self, options: Mapping[str, Any], location: str, max_connections: int, verify: Verify
    ) -> None:
        own = {
            "socket_timeout": None,  # each question has its own deadline
            "socket_connect_timeout": CONNECT_TIMEOUT_S,
            "retry": Retry(NoBackoff(), 0),
        }
        self._options = {**options, **own}
        self._connection_class = self._options.pop("connection_class", Connection)
        self.location = location
        self._max_connections = max_connections
        self._verify = verify
        self._turns = asyncio.Semaphore(max_connections)
        self._idle: list[AbstractConnection] = []
        self._num_active = 0
        self._error: StoreError | None = None
        self._first_try = asyncio.Event()
        self._prober: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def is_away(self) -> bool:
        """It failed, and has not been reached since."""
        return self._prober is not None and not self._prober.done()

    async def open(self) -> None:
        """Connect and verify, with all connections made so that no question has to wait for one.

        StoreError when that fails; the caller sets the deadline.
        """
        try:
            await self._connect()
        except FOREIGN as error:
            raise translate(error, self.location) from error

    async def ask(self, commands: Sequence[Command], deadline_s: float) -> list[Any]:
        """The reply to each command, in one round trip; an error reply is an element of it.

        deadline_s: as the event loop counts time. StoreError when there is no reply.
        """
        is_queued = False
        try:
            async with asyncio.timeout_at(deadline_s):
                await self._reachable(deadline_s)
                is_queued = True
                async with self._turns:
                    is_queued = False
                    await self._reachable(deadline_s)  # it may have failed in the meantime
                    return await self._asked(commands)
        except TimeoutError:
            if is_queued:
                raise StoreBusy(
                    f"{self.location}: all connections busy until the deadline"
                ) from None
            raise self._failed(StoreTimeout(f"{self.location}: no answer in time")) from None
        except FOREIGN as error:
            raise self._failed(translate(error, self.location)) from error

    def note(self, error: StoreError) -> None:
        """A reply showed that the server is of no use now; it counts as away until it is tried."""
        self._failed(error)

    async def close(self) -> None:
        """Close all connections; later questions raise StoreClosed."""
        self._is_closed = True
        if self._prober is not None:
            self._prober.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._prober
        await self._drop_idle()

    async def _asked(self, commands: Sequence[Command]) -> list[Any]:
        self._num_active += 1
        try:
            while self._idle:
                connection = self._idle.pop()
                if await _is_open(connection):
                    # Where it is closed on the way, another is as good.
                    with contextlib.suppress(redis.exceptions.ConnectionError):
                        return await self._exchange(connection, commands)
            return await self._exchange(self._new(), commands)
        finally:
            self._num_active -= 1

    async def _exchange(
        self, connection: AbstractConnection, commands: Sequence[Command]
    ) -> list[Any]:
        is_whole = False
        try:
            await _connect(connection)
            await connection.send_packed_command(connection.pack_commands(commands))
            replies = [await _reply(connection) for _ in commands]
            is_whole = not self._is_closed
            return replies
        finally:
            # Replies that are still to come are not for whoever would use it next.
            if is_whole and len(self._idle) < self._max_connections:
                self._idle.append(connection)
            else:
                await _drop(connection)

    async def _reachable(self, deadline_s: float) -> None:
        if self._is_closed:
            raise StoreClosed(f"{self.location}: the reader is closed")
        if not self.is_away:
            return
        if not self._first_try.is_set():
            # Half of the time is kept for the question: one that went on with too little left
            # would fail, and take the new connection along.
            now_s = asyncio.get_running_loop().time()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout((deadline_s - now_s) / 2):
                    await self._first_try.wait()
        if self.is_away:
            raise StoreUnavailable(f"{self.location}: away, is being tried again: {self._error}")

    def _failed(self, error: StoreError) -> StoreError:
        self._error = error
        if not self.is_away and not self._is_closed:
            self._first_try = asyncio.Event()
            self._prober = asyncio.create_task(self._probe())
        return error

    async def _probe(self) -> None:
        while True:
            try:
                await self._connect()
                return
            except StoreError as error:
                self._error = error
            except FOREIGN as error:  # a timeout too
                self._error = translate(error, self.location)
            finally:
                self._first_try.set()
            await self._drop_idle()  # they may be dead without knowing it
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _connect(self) -> None:
        """Try the server out with a new connection, then make those that are missing."""
        async with asyncio.timeout(CONNECT_TIMEOUT_S):
            await self._verify(lambda commands: self._exchange(self._new(), commands))
        num_missing = self._max_connections - len(self._idle) - self._num_active
        made = [self._new() for _ in range(num_missing)]
        try:
            connecting = (_connect(connection) for connection in made)
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                for failed in await asyncio.gather(*connecting, return_exceptions=True):
                    if failed is not None:
                        raise failed
        except BaseException:
            for connection in made:
                await _drop(connection)
            raise
        self._idle += made

    async def _drop_idle(self) -> None:
        while self._idle:
            await _drop(self._idle.pop())

    def _new(self) -> AbstractConnection:
        connection: AbstractConnection = self._connection_class(**self._options)
        return connection


async def _connect(connection: AbstractConnection) -> None:
    await connection.connect()  # type: ignore[no-untyped-call]


async def _is_open(connection: AbstractConnection) -> bool:
    """Whether the other side has left it open while it lay idle; drops it unless that is known."""
    is_open = False
    try:
        is_open = not await connection.can_read()
    except redis.exceptions.ConnectionError:
        pass
    finally:
        if not is_open:
            await _drop(connection)
    return is_open


async def _drop(connection: AbstractConnection) -> None:
    """Without a good-bye, for whose answer TLS would wait half a minute."""
    if connection._writer is not None:
        connection._writer.transport.abort()
    await connection.disconnect(nowait=True)


async def _reply(connection: AbstractConnection) -> Any:
    try:
        return await connection.read_response()
    except redis.exceptions.ResponseError as error:
        return error
