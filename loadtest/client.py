"""Keep-alive connections with one request under way on each, without a task per request, so that
little stands between the schedule and the wire."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import httptools

from loadtest.answers import (
    MALFORMED,
    NOT_SENT,
    REFUSED,
    RESET,
    TIMEOUT,
    UNREACHABLE,
    Answer,
    judge,
)
from loadtest.bodies import Request

clock_s = time.monotonic


@dataclass(frozen=True)
class Target:
    """Whom to ask, and how much at once."""

    host: str
    port: int
    timeout_s: float = 5.0
    """How long after its intended time a request is given up."""
    connections: int = 64
    """Opened before the first request: to open one in a burst costs more than to send a request."""
    max_in_flight: int = 512
    """Most connections, so most requests under way; more are opened as they are needed."""


class Exchange:
    """A request and how it ended. Times are those of `clock_s`; `sent_s` is 0 until it is sent."""

    __slots__ = ("connection", "done_s", "intended_s", "late", "over", "request", "sent_s", "timer")

    def __init__(self, request: Request, intended_s: float) -> None:
        self.request, self.intended_s = request, intended_s
        self.sent_s = self.done_s = 0.0
        self.late = False
        """All connections were taken when it was due."""
        self.over = False
        self.connection: _Connection | None = None
        self.timer: asyncio.TimerHandle | None = None

    def end(self, done_s: float) -> None:
        self.over, self.done_s, self.connection = True, done_s, None
        if self.timer:
            self.timer.cancel()


class Client:
    """Sends exchanges and says when each is over; use as `async with`, which closes all."""

    def __init__(self, target: Target, over: Callable[[Exchange, Answer], None]) -> None:
        self.under_way: set[Exchange] = set()
        """Submitted and not over."""
        self.peak = 0
        """Most of them at a time."""
        self._target, self._over = target, over
        self._loop = asyncio.get_running_loop()
        self._idle: deque[_Connection] = deque()
        self._waiting: deque[Exchange] = deque()
        self._connections: set[_Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Client:
        for _ in range(min(self._target.connections, self._target.max_in_flight)):
            self._start_opening()
        await asyncio.gather(*self._opening)
        return self

    async def __aexit__(self, *_: object) -> None:
        for exchange in self.under_way:
            exchange.end(clock_s())
        self.under_way.clear()
        self._waiting.clear()
        for task in self._opening:
            task.cancel()
        await asyncio.gather(*self._opening, return_exceptions=True)
        for connection in list(self._connections):
            connection.abort()
        await asyncio.sleep(0)  # in which the transports close; or else they warn

    def submit(self, exchange: Exchange) -> None:
        """Sends it now, or as soon as a connection is free; `over` is called later, once."""
        self.under_way.add(exchange)
        self.peak = max(self.peak, len(self.under_way))
        wait_s = exchange.intended_s + self._target.timeout_s - clock_s()
        exchange.timer = self._loop.call_later(wait_s, self._expire, exchange)
        self._waiting.append(exchange)
        self._pump()
        exchange.late = not exchange.sent_s and len(self._waiting) > len(self._opening)

    def finish(self, exchange: Exchange, answer: Answer, done_s: float) -> None:
        exchange.end(done_s)
        self.under_way.discard(exchange)
        self._over(exchange, answer)

    def opened(self, connection: _Connection) -> None:
        self._connections.add(connection)

    def free(self, connection: _Connection) -> None:
        self._idle.append(connection)
        self._pump()

    def lost(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        self._pump()

    def _pump(self) -> None:
        while self._waiting and (self._waiting[0].over or self._idle):
            exchange = self._waiting.popleft()
            if not exchange.over:
                # The longest idle one, which spreads requests over the server's processes.
                self._idle.popleft().send(exchange)
        while len(self._waiting) > len(self._opening) and self._may_open():
            self._start_opening()

    def _may_open(self) -> bool:
        return len(self._connections) + len(self._opening) < self._target.max_in_flight

    def _start_opening(self) -> None:
        self._opening.add(self._loop.create_task(self._open()))

    async def _open(self) -> None:
        """Opens a connection; where that fails, so does the request that has waited longest."""
        connection, failure = None, ""
        try:
            async with asyncio.timeout(self._target.timeout_s):
                _, connection = await self._loop.create_connection(
                    lambda: _Connection(self), self._target.host, self._target.port
                )
        except TimeoutError:
            pass  # so have the requests that waited for it
        except OSError as error:
            failure = _FAILURES.get(type(error), UNREACHABLE)
        finally:
            self._opening.discard(_this_task())
        if connection:
            self.free(connection)
        elif failure:
            self._fail_next(Answer(failure))
        else:
            self._pump()

    def _fail_next(self, answer: Answer) -> None:
        while self._waiting:
            exchange = self._waiting.popleft()
            if not exchange.over:
                self.finish(exchange, answer, clock_s())
                break
        self._pump()

    def _expire(self, exchange: Exchange) -> None:
        connection = exchange.connection
        self.finish(exchange, Answer(NOT_SENT if _never_got_one(exchange) else TIMEOUT), clock_s())
        if connection:
            connection.abort()


_FAILURES: dict[type[OSError], str] = {ConnectionRefusedError: REFUSED, ConnectionResetError: RESET}


def _never_got_one(exchange: Exchange) -> bool:
    return exchange.late and not exchange.sent_s


def _this_task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


class _Connection(asyncio.Protocol):
    """Also what httptools calls while it parses; those calls only take notes, since the parser
    turns whatever they raise into an error of its own."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._exchange: Exchange | None = None
        self._parser = httptools.HttpResponseParser(self)
        self._content: list[bytes] = []
        self._complete = self._keep_alive = False

    def send(self, exchange: Exchange) -> None:
        self._exchange, exchange.connection = exchange, self
        exchange.sent_s = clock_s()
        self._transport.write(exchange.request.wire)

    def abort(self) -> None:
        self._exchange = None
        self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        if exchange := self._exchange:
            self._exchange = None
            self._client.finish(exchange, Answer(RESET), clock_s())
        del self._parser  # the two refer to each other
        self._client.lost(self)

    def data_received(self, data: bytes) -> None:
        done_s = clock_s()
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._end_with(Answer(MALFORMED), done_s)
            return
        if self._complete:
            self._end(done_s)

    def on_headers_complete(self) -> None:
        self._keep_alive = self._parser.should_keep_alive()

    def on_body(self, data: bytes) -> None:
        self._content.append(data)

    def on_message_complete(self) -> None:
        self._complete = True

    def _end(self, done_s: float) -> None:
        exchange, content = self._exchange, b"".join(self._content)
        status = self._parser.get_status_code()
        if exchange is None:  # nothing was asked
            self.abort()
            return
        self._exchange, self._content, self._complete = None, [], False
        if self._keep_alive:
            self._client.free(self)  # before the answer is read: the next one may be waiting
        else:
            self._transport.close()
        self._client.finish(
            exchange, judge(status, content, exchange.request.num_candidates), done_s
        )

    def _end_with(self, answer: Answer, done_s: float) -> None:
        exchange = self._exchange
        self.abort()
        if exchange:
            self._client.finish(exchange, answer, done_s)
