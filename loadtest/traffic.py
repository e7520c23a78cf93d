"""Requests on the wire for one phase: by a schedule, or by clients that each wait for an answer."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from dataclasses import replace

from loadtest.answers import OK, REFUSED, RESET, UNREACHABLE, Answer
from loadtest.bodies import Request
from loadtest.client import Client, Exchange, Target, clock_s
from loadtest.schedule import MAX_REQUESTS, Floats, choices

LEAD_S = 0.05
"""Between the decision to start and the start, so that the first request is not late already."""
RETRY_S = 0.05
"""How long a closed-loop client that got no connection waits, instead of trying without end."""


class Samples:
    """What came of each request, in columns of equal length, in the order in which they ended."""

    def __init__(self) -> None:
        self.intended_s, self.sent_s, self.done_s = array("d"), array("d"), array("d")
        self.late = bytearray()
        self.answers: list[Answer] = []
        self.num_ok = 0
        self._known: dict[Answer, Answer] = {}

    def __len__(self) -> int:
        return len(self.answers)

    def add(self, exchange: Exchange, answer: Answer) -> None:
        self.intended_s.append(exchange.intended_s)
        self.sent_s.append(exchange.sent_s)
        self.done_s.append(exchange.done_s)
        self.late.append(exchange.late)
        self.num_ok += answer.outcome == OK
        # A million answers of one model are one object.
        self.answers.append(self._known.setdefault(answer, answer))


class Traffic:
    """One phase's requests; use once. What it has counted can be read while it runs."""

    def __init__(self, target: Target, requests: Sequence[Request], seed: int) -> None:
        self.samples = Samples()
        self.started = asyncio.Event()
        """Connections are open."""
        self.started_s = clock_s()
        self.under_way = self.peak_in_flight = 0
        self._target, self._requests, self._seed = target, requests, seed
        self._due: list[float] = []
        self._order: list[int] = []
        self._submitted = 0
        self._end_s = 0.0
        self._sending = True
        self._all_ended = asyncio.Event()

    async def open_loop(self, arrivals: Floats, stop: asyncio.Event) -> None:
        """Sends each request at its time and waits for the last one's end, or until `stop`."""
        self._order = choices(len(arrivals), len(self._requests), self._seed).tolist()
        async with Client(self._target, self._ended) as self._client:
            self.started_s = clock_s() + LEAD_S
            self.started.set()
            self._due = (arrivals + self.started_s).tolist()
            self._send_due()
            await self._end(stop)

    async def closed_loop(self, clients: int, seconds: float, stop: asyncio.Event) -> None:
        """Each client sends its next request when it has the answer to the last one."""
        target = replace(self._target, connections=clients, max_in_flight=clients)
        self._order = choices(100_003, len(self._requests), self._seed).tolist()
        async with Client(target, self._ended_closed) as self._client:
            self.started_s = clock_s()
            self.started.set()
            self._end_s = self.started_s + seconds
            for _ in range(clients):
                self._send_next()
            await self._end(stop)

    async def _end(self, stop: asyncio.Event) -> None:
        """Waits for all to end, or for `stop`; from then on nothing is sent."""
        try:
            if self._submitted or self._due:
                await _first_of(self._all_ended, stop)
        finally:
            self._sending = False
        self.under_way, self.peak_in_flight = len(self._client.under_way), self._client.peak

    def _send_due(self) -> None:
        if not self._sending:
            return
        now_s, due = clock_s(), self._due
        while self._submitted < len(due) and due[self._submitted] <= now_s:
            self._submit(due[self._submitted])
        if self._submitted < len(due):
            loop = asyncio.get_running_loop()
            loop.call_later(due[self._submitted] - clock_s(), self._send_due)

    def _submit(self, intended_s: float) -> None:
        request = self._requests[self._order[self._submitted % len(self._order)]]
        self._submitted += 1
        self._client.submit(Exchange(request, intended_s))
        self.under_way = len(self._client.under_way)

    def _ended(self, exchange: Exchange, answer: Answer) -> None:
        self.samples.add(exchange, answer)
        if len(self.samples) == len(self._due):
            self._all_ended.set()

    def _send_next(self) -> None:
        if not self._sending:
            return
        now_s = clock_s()
        if now_s < self._end_s and self._submitted < MAX_REQUESTS:
            self._submit(now_s)
        elif not self._client.under_way:
            self._all_ended.set()

    def _ended_closed(self, exchange: Exchange, answer: Answer) -> None:
        self.samples.add(exchange, answer)
        if answer.outcome in (REFUSED, RESET, UNREACHABLE):
            asyncio.get_running_loop().call_later(RETRY_S, self._send_next)
        else:
            self._send_next()


async def _first_of(*events: asyncio.Event) -> None:
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        ended, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for wait in ended:
            wait.result()  # an event of another loop did not happen, it failed
    finally:
        for wait in waits:
            wait.cancel()
