"""Which requests are begun, and when: one after the other, and none that would wait too long.

Scores are computed on the event loop, so what waits, waits on sockets. Between two requests the
loop looks at all of these: whatever has arrived is seen within the time of one request, is counted
as work to come, and is turned away at once where that is too much. A queue without a bound would
have every request wait until nobody wants its answer.
"""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import NoReturn

from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Receive, Scope, Send

from service.answers import at_once
from service.errors import DeadlineExceededError, OverloadedError, problem
from service.metrics import Metrics

PATHS = ("/v1/score", "/v1/feedback")
"""What is admitted; all else, probes before all, is answered whatever the load is."""
MAX_BEGUN = 16
"""Requests that may be begun and not ended: more than one where they wait for a store."""
_QUIET_TURNS, _MOST_TURNS = 3, 64
"""Turns of the loop in which nothing arrives, and in all, before the next request is begun. libuv
accepts one connection a turn, and reads from it two turns later."""
_CALM, _CALM_TIMES = 0.9, 3.0
"""While less work arrives than this share of what can usually be done, a queue gathered in a pause
of the machine and goes by itself: it may be so many times as long."""
_LOAD_OVER_S = 1.0
NOW, USUALLY = 0.98, 0.9995
"""Weights of a request in two estimates of what one costs, relative to that of the next one: of the
last fifty or so, and of the last two thousand, for which a slow second of the machine is short."""
_FIRST_GUESS_S = 0.001
_MOST_TIMES_EXPECTED = 3
"""A request that seems to have taken longer has met a pause, which is no property of it."""
_DEADLINE = re.compile(rb'"deadline_ms"\s*:\s*(\d+(?:\.\d+)?)')
_ARRIVED_S = "ecdctr.arrived_s"


class Cost:
    """Seconds that a request takes by its size in bytes: a line through what those before took, by
    least squares. memory: the weight of each, relative to that of the next one."""

    def __init__(self, memory: float = NOW) -> None:
        self._memory = memory
        self._weight, self._size, self._seconds = 1.0, 0.0, _FIRST_GUESS_S
        self._square, self._product = 0.0, 0.0

    def learn(self, size: int, seconds: float) -> None:
        seconds = min(seconds, _MOST_TIMES_EXPECTED * self.of(size) + _FIRST_GUESS_S)
        self._weight = self._memory * self._weight + 1
        share = 1 / self._weight
        self._size += share * (size - self._size)
        self._seconds += share * (seconds - self._seconds)
        self._square += share * (size * size - self._square)
        self._product += share * (size * seconds - self._product)

    def of(self, size: int) -> float:
        variance = self._square - self._size * self._size
        covariance = self._product - self._size * self._seconds
        # Sizes that hardly differ say nothing about a slope.
        slope = max(0.0, covariance / variance) if variance > 1 else 0.0
        return max(0.0, self._seconds + slope * (size - self._size))

    @property
    def mean(self) -> float:
        """Of a request whose size is not known."""
        return self._seconds


class Load:
    """Seconds of usual work that arrive in a second: a mean over the last one, weighted by age."""

    def __init__(self) -> None:
        self._load, self._at_s = 0.0, 0.0

    def add(self, expected_s: float) -> None:
        self._load = self.now() + expected_s / _LOAD_OVER_S
        self._at_s = time.perf_counter()

    def now(self) -> float:
        return self._load * math.exp((self._at_s - time.perf_counter()) / _LOAD_OVER_S)


@dataclass(frozen=True)
class Admitted:
    """Times of `time.perf_counter`."""

    arrived_s: float
    received_s: float
    """The body was complete."""
    begun_s: float


class Queue:
    """Turns, first come first served; and how long the next one would wait."""

    def __init__(self) -> None:
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._begun = 0
        self._num = 0
        self._scheduled = False
        self._turns = self._quiet_turns = 0
        self.wait_s = 0.0
        """Expected seconds of work that is waiting or begun."""

    @property
    def is_empty(self) -> bool:
        """Nothing waits, and nothing is begun."""
        return not self._num

    def saw_arrival(self) -> None:
        """A request was read, so there may be more."""
        self._quiet_turns = 0

    @asynccontextmanager
    async def turn(self, expected_s: float) -> AsyncIterator[None]:
        """Waits for its turn, and ends it with the block."""
        self._num += 1
        self.wait_s += expected_s
        try:
            await self._granted()
            try:
                yield
            finally:
                self._give_back()
        finally:
            self._num -= 1
            # Exactly 0 when nothing is there, whatever was rounded before.
            self.wait_s = self.wait_s - expected_s if self._num else 0.0

    async def _granted(self) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        self._schedule()
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._give_back()
            raise

    def _give_back(self) -> None:
        self._begun -= 1
        self._schedule()

    def _schedule(self) -> None:
        if not self._scheduled and self._waiting and self._begun < MAX_BEGUN:
            self._scheduled = True
            self._turns = self._quiet_turns = 0
            asyncio.get_running_loop().call_soon(self._look)

    def _look(self) -> None:
        self._turns += 1
        self._quiet_turns += 1
        if self._quiet_turns <= _QUIET_TURNS and self._turns < _MOST_TURNS:
            asyncio.get_running_loop().call_soon(self._look)
        else:
            self._scheduled = False
            self._grant()
            self._schedule()

    def _grant(self) -> None:
        while self._waiting:
            turn = self._waiting.popleft()
            if not turn.done():
                self._begun += 1
                turn.set_result(None)
                return


class Admission:
    """What one process has to do, and what it takes on."""

    def __init__(self, max_wait_s: float, metrics: Metrics) -> None:
        self._queue, self._max_wait_s, self._metrics = Queue(), max_wait_s, metrics
        self._costs: Mapping[str, Cost] = {path: Cost() for path in PATHS}
        self._usual_costs: Mapping[str, Cost] = {path: Cost(USUALLY) for path in PATHS}
        self._ended_s = 0.0
        self._load = Load()

    def saw_arrival(self) -> None:
        """A request was read, so there may be more."""
        self._queue.saw_arrival()

    def is_full(self) -> bool:
        """Whether what comes now would wait too long."""
        wait_s = self._queue.wait_s
        if wait_s <= self._max_wait_s:
            return False
        return wait_s > _CALM_TIMES * self._max_wait_s or self._load.now() > _CALM

    def is_idle(self) -> bool:
        """Whether no request waits or is begun."""
        return self._queue.is_empty

    def turned_away(self, path: str) -> None:
        """A request to one of `PATHS` came while it was full."""
        self._load.add(self._usual_costs[path].mean)
        self._count("wait")

    @asynccontextmanager
    async def turn(self, request: Request, body: bytes) -> AsyncIterator[Admitted]:
        """Waits until the request may be begun, and ends its turn with the block.

        Raises:
            OverloadedError: it would wait too long, or longer than its caller.
            DeadlineExceededError: its deadline passed while it waited.
            ClientDisconnect: its caller has gone away meanwhile.
        """
        received_s = time.perf_counter()
        arrived_s: float = request.scope.get(_ARRIVED_S, received_s)
        deadline_s = arrived_s + _asked_for_s(body)
        path = request.scope["path"]
        expected_s = self._costs[path].of(len(body))
        self._load.add(self._usual_costs[path].of(len(body)))
        if self.is_full():
            self._refuse("wait", OverloadedError(_OVERLOADED))
        wait_s = self._queue.wait_s
        # With nobody before it, it is begun: what is expected may be wrong, and must not stay so.
        if wait_s and received_s + wait_s + expected_s > deadline_s:
            self._refuse("deadline", OverloadedError(_OVERLOADED))
        async with self._queue.turn(expected_s):
            begun_s = time.perf_counter()
            if begun_s > deadline_s:
                self._refuse("expired", DeadlineExceededError(_EXPIRED))
            if _is_gone(request.receive):
                self._refuse("gone", ClientDisconnect())
            yield Admitted(arrived_s, received_s, begun_s)
            self._learn(path, len(body), received_s)

    def _refuse(self, reason: str, error: Exception) -> NoReturn:
        self._count(reason)
        raise error

    def _count(self, reason: str) -> None:
        """A request that was not begun."""
        self._metrics.shed.labels(reason).inc()

    def _learn(self, path: str, size: int, received_s: float) -> None:
        """From the end of the one before it where it waited for that: so what lies between two
        requests is counted too, and what runs beside another is not counted twice."""
        now_s = time.perf_counter()
        seconds = now_s - max(received_s, self._ended_s)
        self._costs[path].learn(size, seconds)
        self._usual_costs[path].learn(size, seconds)
        self._ended_s = now_s


class TurnAway:
    """ASGI middleware. The outermost: what comes while too much is waiting must cost next to
    nothing, so it is answered before its body is looked at."""

    def __init__(self, app: ASGIApp, admission: Admission, metrics: Metrics) -> None:
        self._app, self._admission, self._metrics = app, admission, metrics
        self._answer = problem(OverloadedError(_OVERLOADED))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            self._admission.saw_arrival()
            if scope["path"] in PATHS and scope["method"] == "POST":
                if self._admission.is_full():
                    self._admission.turned_away(scope["path"])
                    self._metrics.requests.labels(scope["path"], self._answer.status_code).inc()
                    await self._answer(scope, receive, send)
                    return
                scope[_ARRIVED_S] = time.perf_counter()
        await self._app(scope, receive, send)


_OVERLOADED = "more work is waiting than can be done in time; try later"
_EXPIRED = "the request's deadline_ms passed before it was begun"


def _asked_for_s(body: bytes) -> float:
    """`deadline_ms` of a body that is not yet decoded, in seconds; infinity without one, or with
    one that is refused. Only what is turned away early depends on it: the schema has the last
    word."""
    found = _DEADLINE.search(body)
    return (float(found[1]) if found else 0.0) / 1000 or math.inf


def _is_gone(receive: Receive) -> bool:
    """Whether the caller has closed the connection: one that is open has nothing to say after its
    body."""
    message = at_once(receive())
    return message is not None and message["type"] == "http.disconnect"
