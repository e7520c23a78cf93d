"""What the generator itself adds to a latency, and how much it can send: measured against a server
that does nothing, beside other clients that are installed."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import orjson

from loadtest import loop
from loadtest.bodies import Body, Request, encode, resized
from loadtest.client import Target, clock_s
from loadtest.null import answer, null_server
from loadtest.report import Latency, PhaseReport, machine
from loadtest.run import Phase, Runner
from loadtest.schedule import arrivals_of

CLIENTS = 32
LOW_RATE = 200.0
PATH = "/v1/score"

Post = Callable[[bytes], Awaitable[bytes]]


@dataclass(frozen=True)
class Closed:
    """One client that waits for each answer, and `CLIENTS` of them."""

    one_ms: Latency
    max_per_s: float


@dataclass(frozen=True)
class Overhead:
    """Milliseconds and requests a second, all against the null server."""

    machine: str
    load_average: float
    """Of the minute before: where it is not near 0, others took part in the tails."""
    candidates: int
    request_bytes: int
    answer_bytes: int
    low_rate: float
    floor_ms: Latency
    """A blocking socket that parses nothing, at the low rate, from the actual time of sending."""
    open_ms: Latency
    """The generator at the low rate, from the intended time."""
    lag_ms: Latency
    half_rate: float
    """Half of the generator's maximum."""
    half_ms: Latency
    clients: dict[str, Closed]
    """By client; `loadtest` is this one."""

    @property
    def added_p50_ms(self) -> float:
        return (self.open_ms.p50 or 0) - (self.floor_ms.p50 or 0)

    @property
    def added_p99_ms(self) -> float:
        return (self.open_ms.p99 or 0) - (self.floor_ms.p99 or 0)

    def document(self) -> dict[str, Any]:
        return asdict(self) | {"added_p50_ms": self.added_p50_ms, "added_p99_ms": self.added_p99_ms}


def measure_overhead(bodies: Sequence[Body], candidates: int, seconds: float) -> Overhead:
    """Each of its parts takes `seconds`; the server is a process of its own."""
    load_average = os.getloadavg()[0]
    requests = encode([resized(body, candidates) for body in bodies], "127.0.0.1", PATH)
    with null_server(candidates) as (port, _):
        target = Target("127.0.0.1", port)
        floor = _floor(port, requests[0], candidates, seconds)
        low = _phase(target, requests, Phase("low", seconds, LOW_RATE))
        one = _phase(target, requests, Phase("one", seconds, clients=1))
        many = _phase(target, requests, Phase("many", seconds, clients=CLIENTS))
        half = _phase(target, requests, Phase("half", seconds, many.ok_per_s / 2))
        peers = _peers(f"http://127.0.0.1:{port}{PATH}", requests[0], seconds)
    return Overhead(
        machine(),
        load_average,
        candidates,
        len(requests[0].wire),
        len(answer(candidates)),
        LOW_RATE,
        floor,
        low.latency_ms,
        low.lag_ms,
        many.ok_per_s / 2,
        half.latency_ms,
        {"loadtest": Closed(one.latency_ms, many.ok_per_s), **peers},
    )


def table(overhead: Overhead) -> str:
    """For people to read."""
    rows = {
        f"blocking socket, {overhead.low_rate:g}/s": overhead.floor_ms,
        f"open loop, {overhead.low_rate:g}/s": overhead.open_ms,
        f"open loop, {overhead.half_rate:.0f}/s": overhead.half_ms,
    }
    rows |= {f"one client, {name}": one.one_ms for name, one in overhead.clients.items()}
    lines = [f"{'':<28}{'p50 ms':>9}{'p99 ms':>9}{'max/s':>9}"]
    for name, latency in rows.items():
        closed = overhead.clients.get(name.removeprefix("one client, "))
        most = f"{closed.max_per_s:>9.0f}" if closed else ""
        lines.append(f"{name:<28}{latency.p50 or 0:>9.3f}{latency.p99 or 0:>9.3f}{most}")
    added = f"{overhead.added_p50_ms:.3f} ms at p50 and {overhead.added_p99_ms:.3f} ms at p99"
    return "\n".join([*lines, f"The generator adds {added}, at {overhead.low_rate:g}/s."])


def _phase(target: Target, requests: Sequence[Request], phase: Phase) -> PhaseReport:
    async def run() -> PhaseReport:
        report = await Runner(target, requests).run_phase(phase)
        if report.num_failed:
            raise RuntimeError(f"the null server failed: {report.failed}")
        return report

    return loop.run(run())


def _floor(port: int, request: Request, candidates: int, seconds: float) -> Latency:
    size, latencies = len(answer(candidates)), []
    with socket.create_connection(("127.0.0.1", port)) as connection:
        start_s = clock_s()
        for due_s in arrivals_of("poisson", LOW_RATE, seconds, 0):
            time.sleep(max(0.0, start_s + due_s - clock_s()))
            sent_s = clock_s()
            connection.sendall(request.wire)
            connection.recv(size, socket.MSG_WAITALL)
            latencies.append(clock_s() - sent_s)
    return Latency.of(np.array(latencies))


def _peers(url: str, request: Request, seconds: float) -> dict[str, Closed]:
    body = request.wire.partition(b"\r\n\r\n")[2]
    installed = {name: run for name, run in _PEERS.items() if find_spec(name)}
    return {name: asyncio.run(run(url, body, seconds)) for name, run in installed.items()}


async def _httpx(url: str, body: bytes, seconds: float) -> Closed:
    import httpx

    limits = httpx.Limits(max_connections=CLIENTS, max_keepalive_connections=CLIENTS)
    async with httpx.AsyncClient(limits=limits, trust_env=False) as client:

        async def post(content: bytes) -> bytes:
            headers = {"content-type": "application/json"}
            return (await client.post(url, content=content, headers=headers)).content

        return await _closed(post, body, seconds)


async def _aiohttp(url: str, body: bytes, seconds: float) -> Closed:
    import aiohttp

    async with aiohttp.ClientSession() as session:

        async def post(content: bytes) -> bytes:
            headers = {"content-type": "application/json"}
            async with session.post(url, data=content, headers=headers) as response:
                return bytes(await response.read())

        return await _closed(post, body, seconds)


_PEERS = {"httpx": _httpx, "aiohttp": _aiohttp}


async def _closed(post: Post, body: bytes, seconds: float) -> Closed:
    one = await _posting(post, body, seconds)
    many = await asyncio.gather(*(_posting(post, body, seconds) for _ in range(CLIENTS)))
    return Closed(Latency.of(np.array(one)), round(sum(map(len, many)) / seconds, 3))


async def _posting(post: Post, body: bytes, seconds: float) -> list[float]:
    """Latencies of one client; as in the generator, the answer is read as JSON."""
    latencies, end_s = [], clock_s() + seconds
    while (sent_s := clock_s()) < end_s:
        content = await post(body)
        latencies.append(clock_s() - sent_s)
        orjson.loads(content)
    return latencies
