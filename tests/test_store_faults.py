"""What a store in a server does when the server, the network or the data fails."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import redis
from proxies import Proxy, proxied
from runclock import run_s
from servers import Server, free_port, running_server
from test_store import LONG_MS, UNKNOWN, Place, look, many_ids, uint64, window_of

from embeddings_store import (
    ENTITIES,
    PackedWindow,
    Reader,
    StoreBusy,
    StoreCorrupt,
    StoreError,
    StoreRejected,
    StoreTimeout,
    StoreUnavailable,
    WindowNotFound,
    WindowRef,
    Windows,
    open_store,
)
from embeddings_store.buckets import bucket_keys
from embeddings_store.node import FOREIGN, TRANSLATIONS, translate

IDS = many_ids(1000)
SLACK_S = 0.4
"""For a machine that is busy with something else, beyond the time in which it does not let this
process run at all."""
NUM_CONNECTIONS = 2

_prefixes = count()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running_server("--repl-diskless-sync-delay", "0") as running:
        yield running


@pytest.fixture
def place(server: Server) -> Place:
    return Place(server.url, f"fault{next(_prefixes)}")


@asynccontextmanager
async def opened(url: str, near: str = "") -> AsyncIterator[Reader]:
    """A reader at `url` of a window with `IDS`, published at `near` if that is given."""
    store = open_store(near or url)
    ref = store.publish(window_of(IDS))
    store.close()
    reader = await open_store(url, max_connections=NUM_CONNECTIONS).reader(ref)
    try:
        yield reader
    finally:
        await reader.close()


def expected(ids: np.ndarray, seed: float = 0.0) -> np.ndarray:
    """What `window_of(ids, seed)` has in every place of the newest month."""
    return (ids % np.uint64(1000)).astype(np.float32) + np.float32(seed + 0.6)


def assert_right(got: Windows, ids: np.ndarray, seed: float = 0.0) -> None:
    """Every row is right, or named in `failure` and absent."""
    failed = got.failure.rows if got.failure else np.zeros(len(ids), np.bool_)
    assert (got.present == ~failed[:, None]).all()
    assert not got.vectors[failed].any()
    there = expected(ids, seed)[~failed]
    assert np.array_equal(got.vectors[~failed][:, 0, 0], there)


async def assert_found(reader: Reader, ids: np.ndarray) -> None:
    got = await reader.lookup("items", ids, deadline_ms=LONG_MS)
    assert got.present.all()
    assert_right(got, ids)


async def outcome(reader: Reader, ids: np.ndarray, deadline_ms: float = 20) -> StoreError | None:
    """The error of a lookup, which kept its deadline and whose rows were right."""
    start_s = run_s()
    try:
        assert_right(await reader.lookup("items", ids, deadline_ms=deadline_ms), ids)
    except StoreError as error:
        return error
    finally:
        assert run_s() - start_s < deadline_ms / 1000 + SLACK_S
    return None


async def storm(reader: Reader, num_lookups: int, at_once: int = 10) -> list[StoreError | None]:
    """`num_lookups` outcomes, over a second or so."""
    outcomes: list[StoreError | None] = []
    while len(outcomes) < num_lookups:
        asked = (outcome(reader, IDS[place : place + 20]) for place in range(at_once))
        outcomes += await asyncio.gather(*asked)
        await asyncio.sleep(0.01)
    return outcomes


async def usable(reader: Reader, ids: np.ndarray, within_s: float = 4.0) -> None:
    """Returns once the reader answers. That takes less than a second (`make bench-store` measures
    it), but not on a machine that is busy with other things."""
    give_up_at_s = run_s() + within_s
    while error := await outcome(reader, ids, LONG_MS):
        assert run_s() < give_up_at_s, error
        await asyncio.sleep(0.01)
    assert run_s() < give_up_at_s


async def soon(is_so: Callable[[], bool]) -> None:
    """Returns once it is so; fails when it is not within ten seconds."""
    give_up_at_s = run_s() + 10
    while not is_so():
        assert run_s() < give_up_at_s
        await asyncio.sleep(0.01)


def num_files() -> int:
    """Open files and sockets of this process."""
    return len(os.listdir("/proc/self/fd"))


def test_a_connection_that_is_looked_at_when_time_is_up_is_closed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def look_long(_: object) -> bool:
        await asyncio.sleep(60)
        return False

    async def run() -> None:
        async with opened(place.url) as reader:
            await assert_found(reader, IDS[:5])
            before = num_files()
            for _ in range(3):
                with monkeypatch.context() as patch:
                    patch.setattr("redis.asyncio.connection.AbstractConnection.can_read", look_long)
                    assert isinstance(await outcome(reader, IDS[:5]), StoreTimeout)
                await usable(reader, IDS[:5])
            await soon(lambda: num_files() <= before)

    asyncio.run(run())


def counted(server: Server) -> tuple[int, int]:
    """Connections and commands that the server has seen."""
    with server.client() as client:
        stats = client.info("stats")
    return int(stats["total_connections_received"]), int(stats["total_commands_processed"])


def kill_clients(server: Server) -> None:
    with server.client() as client:
        client.client_kill_filter(_type="normal", skipme=True)


# Ways to fail that pass again.


@contextmanager
def frozen(proxy: Proxy) -> Iterator[None]:
    proxy.server.freeze()
    try:
        yield
    finally:
        proxy.server.thaw()


@contextmanager
def refusing(proxy: Proxy) -> Iterator[None]:
    proxy.mode = "refuse"
    proxy.cut()
    try:
        yield
    finally:
        proxy.mode = "pass"


@contextmanager
def half_open(proxy: Proxy) -> Iterator[None]:
    proxy.mode = "swallow"
    try:
        yield
    finally:
        proxy.mode = "pass"


@contextmanager
def locked_out(proxy: Proxy) -> Iterator[None]:
    with proxy.server.client() as client:
        client.config_set("requirepass", "another")
        client.client_kill_filter(_type="normal", skipme=True)
        try:
            yield
        finally:
            client.config_set("requirepass", "")


@pytest.mark.parametrize(
    ("fault", "kinds"),
    [
        (frozen, {StoreTimeout, StoreBusy, StoreUnavailable}),
        (refusing, {StoreTimeout, StoreBusy, StoreUnavailable}),
        (half_open, {StoreTimeout, StoreBusy, StoreUnavailable}),
        (locked_out, {StoreRejected, StoreTimeout, StoreBusy, StoreUnavailable}),
    ],
)
def test_a_thousand_lookups_at_a_server_that_is_away_reach_it_a_handful_of_times(
    server: Server, fault: Callable[[Proxy], AbstractContextManager[None]], kinds: set[type]
) -> None:
    async def run(proxy: Proxy) -> None:
        files = num_files()
        async with opened(proxy.url, server.url) as reader:
            connections, commands = counted(server)
            with fault(proxy):
                seen, start_s = proxy.num_accepted, time.monotonic()
                outcomes = await storm(reader, 1000)
                # Five attempts a second, and what was under way when it went away.
                handful = 10 + 6 * (time.monotonic() - start_s)
                assert proxy.num_accepted - seen < handful
            connections_after, commands_after = counted(server)
            assert connections_after - connections < handful
            assert commands_after - commands < 3 * handful  # AUTH, PING, MGET
            # Which of them comes first depends on the machine; what lasts is that it is away.
            found = {type(error) for error in outcomes}
            assert StoreUnavailable in found
            assert found <= kinds
            # At once, but for the first ones, and any that a busy machine kept past their deadline.
            assert sum(type(error) is not StoreUnavailable for error in outcomes) < 100
            await usable(reader, IDS[:20])
            assert all(error is None for error in await storm(reader, 100, at_once=2))
            with server.client() as client:
                await soon(lambda: client.info("clients")["connected_clients"] <= 1 + 2)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await soon(lambda: num_files() <= files)

    with proxied(server) as proxy:
        asyncio.run(run(proxy))


def test_failing_lookups_leave_nothing_in_memory(server: Server) -> None:
    async def run(proxy: Proxy) -> None:
        async with opened(proxy.url, server.url) as reader:
            with refusing(proxy):
                await storm(reader, 500)
                before = measured()
                await storm(reader, 2000, at_once=100)
                num_bytes, num_objects = np.subtract(measured(), before)
            # One error with its traceback has a kilobyte: less than one in a hundred is kept.
            assert num_bytes < 20_000
            assert num_objects < 200

    tracemalloc.start()
    try:
        with proxied(server) as proxy:
            asyncio.run(run(proxy))
    finally:
        tracemalloc.stop()


def measured() -> tuple[int, int]:
    """Bytes and objects that are in use."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], len(gc.get_objects())


def test_a_frozen_server_costs_the_deadline_and_is_used_again_afterwards() -> None:
    ids = many_ids(1000)

    async def run(server: Server) -> None:
        store = open_store(server.url)
        reader = await store.reader(store.publish(window_of(ids)))
        server.freeze()
        for _ in range(3):
            start_s = run_s()
            with pytest.raises(StoreUnavailable):  # at first because of the deadline
                await reader.lookup("items", ids[:50], deadline_ms=30)
            assert run_s() - start_s < 0.2
        server.thaw()
        await usable(reader, ids[:1])
        # The replies of the three lookups above arrive now, for connections that are closed.
        for start in range(100, 300, 50):
            await assert_found(reader, ids[start : start + 50])
        await reader.close()
        store.close()

    with running_server() as server:
        asyncio.run(run(server))


def test_a_slow_server_is_a_timeout_at_first_and_its_late_replies_are_nobodys(
    server: Server,
) -> None:
    async def run(proxy: Proxy) -> None:
        async with opened(proxy.url, server.url) as reader:
            proxy.delay_s = 0.03
            for start in range(0, 500, 50):
                await outcome(reader, IDS[start : start + 50], deadline_ms=50)
            kinds = {type(await outcome(reader, IDS[:50], deadline_ms=50)) for _ in range(20)}
            assert kinds <= {StoreTimeout, StoreUnavailable}
            for start in range(0, 1000, 50):  # two ways of 30 ms are within this deadline
                assert await outcome(reader, IDS[start : start + 50], LONG_MS) is None
            proxy.delay_s = 0.0
            await usable(reader, IDS[:20])

    with proxied(server) as proxy:
        asyncio.run(run(proxy))


def test_lookups_recover_although_connecting_takes_longer_than_their_deadline() -> None:
    async def run(server: Server, proxy: Proxy) -> None:
        near, far = (url.replace("/0", "/1") for url in (server.url, proxy.url))
        async with opened(far, near) as reader:
            kill_clients(server)
            await asyncio.sleep(0.1)
            # Signing in, choosing the database and asking are three round trips of 100 ms.
            assert isinstance(await outcome(reader, IDS[:1], 280), StoreTimeout)
            give_up_at_s = run_s() + 5
            while await outcome(reader, IDS[:1], 280):
                assert run_s() < give_up_at_s

    with running_server(password="s3cret") as server, proxied(server, delay_s=0.05) as proxy:
        asyncio.run(run(server, proxy))


def test_a_refused_connection_is_unavailable() -> None:
    store = open_store(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(StoreUnavailable, match=r"127\.0\.0\.1"):
        asyncio.run(store.reader(UNKNOWN))
    with pytest.raises(StoreUnavailable):
        store.windows()


def test_a_server_that_dies_makes_an_open_reader_unavailable() -> None:
    async def run() -> None:
        with running_server() as server:
            store = open_store(server.url)
            reader = await store.reader(store.publish(window_of(uint64(1))))
            store.close()
        with pytest.raises(StoreUnavailable):
            await reader.lookup("items", uint64(1), deadline_ms=LONG_MS)
        await reader.close()

    asyncio.run(run())


def test_a_server_that_lost_its_data_says_so_and_serves_again_what_is_published_again() -> None:
    async def run() -> None:
        port, window = free_port(), window_of(IDS)
        with running_server(port=port) as server:
            store = open_store(server.url, max_connections=NUM_CONNECTIONS)
            ref = store.publish(window)
            store.close()
            reader = await store.reader(ref)
        assert isinstance(await outcome(reader, IDS), StoreUnavailable)
        with running_server(port=port):
            error: StoreError | None = StoreUnavailable()
            give_up_at_s = run_s() + 2
            while isinstance(error, StoreUnavailable) and run_s() < give_up_at_s:
                error = await outcome(reader, IDS, LONG_MS)
                await asyncio.sleep(0.01)
            assert isinstance(error, StoreCorrupt)
            assert "a bucket is lost" in str(error)
            with pytest.raises(WindowNotFound, match=str(ref)):
                await store.reader(ref)
            assert store.publish(window) == ref
            assert await outcome(reader, IDS, LONG_MS) is None
            await (await store.reader(ref)).close()
            store.close()
        await reader.close()

    asyncio.run(run())


def test_a_server_that_still_loads_its_data_is_away_until_it_has(tmp_path: Path) -> None:
    port = free_port()
    here = ["--dir", str(tmp_path), "--dbfilename", "dump.rdb"]
    # Seconds, until the test says that it is enough; between any two keys the server answers.
    slowly = ["--key-load-delay", "50000", "--loading-process-events-interval-bytes", "1024"]

    async def run() -> None:
        with running_server(*here, port=port) as server:
            store = open_store(server.url, max_connections=NUM_CONNECTIONS)
            ref = store.publish(window_of(IDS))
            store.close()
            reader = await store.reader(ref)
            with server.client() as client:
                client.save()
        with running_server(*here, *slowly, port=port) as server, server.client() as client:
            refusals = [str(error) for error in await storm(reader, 300)]
            with pytest.raises(StoreUnavailable, match="loading"):
                await store.reader(ref)
            assert any("loading" in refusal for refusal in refusals)
            assert "None" not in refusals
            client.config_set("key-load-delay", 0)
            await usable(reader, IDS)
            connections = client.info("stats")["total_connections_received"]
            assert connections < 50
        await reader.close()

    asyncio.run(run())


def test_connections_killed_in_mid_lookup_fail_no_other_and_mix_nothing_up(server: Server) -> None:
    async def run() -> None:
        async with opened(server.url) as reader:
            for start in range(0, 1000, 50):
                asked = [outcome(reader, IDS[start:][:50], LONG_MS) for _ in range(3)]
                answering = asyncio.gather(*asked)
                await asyncio.sleep(random.Random(start).uniform(0, 0.002))
                await asyncio.to_thread(kill_clients, server)
                failed = [error for error in await answering if error]
                assert {type(error) for error in failed} <= {StoreUnavailable}
                await usable(reader, IDS[start : start + 50])

    asyncio.run(run())


def test_a_connection_killed_while_idle_costs_nothing_at_all(server: Server) -> None:
    async def run() -> None:
        async with opened(server.url) as reader:
            for _ in range(10):
                kill_clients(server)
                await asyncio.sleep(0.01)
                assert await outcome(reader, IDS[:50], LONG_MS) is None

    asyncio.run(run())


def test_an_answer_reaches_the_caller_that_asked_and_no_other_however_many_give_up(
    server: Server,
) -> None:
    rng = random.Random(5)
    late = {StoreTimeout, StoreBusy, StoreUnavailable}
    may_be = {type(None), asyncio.CancelledError, *late}

    async def one(reader: Reader) -> StoreError | None:
        ids = IDS[rng.sample(range(len(IDS)), rng.randint(1, 60))]
        return await outcome(reader, ids, deadline_ms=rng.choice((5, 20, LONG_MS)))

    async def run(proxy: Proxy) -> None:
        async with opened(proxy.url, server.url) as reader:
            num_answered = 0
            for _ in range(30):
                asked = [asyncio.create_task(one(reader)) for _ in range(20)]
                for task in rng.sample(asked, 10):
                    await asyncio.sleep(rng.uniform(0, 0.003))
                    task.cancel()
                outcomes = await asyncio.gather(*asked, return_exceptions=True)
                for wrong in (o for o in outcomes if isinstance(o, AssertionError)):
                    raise wrong
                assert {type(found) for found in outcomes} <= may_be
                num_answered += sum(found is None for found in outcomes)
            assert num_answered > 50
            for start in range(0, 1000, 50):
                await usable(reader, IDS[start : start + 50])

    with proxied(server, delay_s=0.001) as proxy:
        asyncio.run(run(proxy))


def test_a_cancelled_lookup_does_not_leave_its_reply_to_the_next() -> None:
    ids = many_ids(1000)

    async def run(server: Server) -> None:
        store = open_store(server.url, max_connections=1)
        reader = await store.reader(store.publish(window_of(ids)))
        for start in range(0, 500, 50):
            server.freeze()
            asked = asyncio.create_task(reader.lookup("items", ids[:50], deadline_ms=LONG_MS))
            await asyncio.sleep(0.01)
            asked.cancel()
            server.thaw()
            with pytest.raises(asyncio.CancelledError):
                await asked
            await assert_found(reader, ids[start : start + 50])
        await reader.close()
        store.close()

    with running_server() as server:
        asyncio.run(run(server))


def test_a_full_pool_is_busy_and_told_apart_from_a_slow_server() -> None:
    async def run(server: Server) -> None:
        store = open_store(server.url, max_connections=1)
        reader = await store.reader(store.publish(window_of(uint64(1))))
        server.freeze()
        first = asyncio.create_task(reader.lookup("items", uint64(1), deadline_ms=200))
        await asyncio.sleep(0.01)
        with pytest.raises(StoreBusy):
            await reader.lookup("items", uint64(1), deadline_ms=20)
        with pytest.raises(StoreTimeout):
            await first
        server.thaw()
        await usable(reader, uint64(1))
        assert (await reader.lookup("items", uint64(1), deadline_ms=LONG_MS)).present.all()
        await reader.close()
        store.close()

    with running_server() as server:
        asyncio.run(run(server))


def test_a_replica_is_read_from_and_refuses_to_be_written_to(server: Server, place: Place) -> None:
    ref = place.open().publish(window_of(IDS))
    with running_server("--replicaof", "127.0.0.1", str(server.port)) as replica:
        with replica.client() as client:
            give_up_at_s = run_s() + 20
            while client.info("replication")["master_link_status"] != "up":
                assert run_s() < give_up_at_s
                time.sleep(0.05)
        there = Place(replica.url, place.prefix)
        assert_right(look(there.open(), ref, "items", IDS), IDS)
        store = there.open()
        for action in (lambda: store.publish(window_of(IDS, 1)), lambda: store.remove(ref)):
            with pytest.raises(StoreRejected, match="read only replica"):
                action()
        assert store.windows() == [ref]
        store.close()


def test_a_full_server_rejects_a_window_and_shows_none_until_it_has_room() -> None:
    window = window_of(many_ids(40_000))
    with running_server("--maxmemory", "4mb", "--maxmemory-policy", "noeviction") as server:
        store = open_store(server.url)
        with pytest.raises(StoreRejected, match="maxmemory"):
            store.publish(window)
        assert store.windows() == []
        assert store.unfinished() == [window.ref]
        with pytest.raises(WindowNotFound):
            look(open_store(server.url), window.ref, "items", IDS)
        with server.client() as client:
            client.config_set("maxmemory", "0")
        assert store.publish(window) == window.ref
        assert store.unfinished() == []
        store.check(window.ref)
        store.close()


def test_a_server_that_evicts_while_a_window_is_published_shows_no_half_window() -> None:
    options = ["--maxmemory", "4mb", "--maxmemory-policy", "allkeys-random"]
    with running_server(*options) as server:
        store = open_store(server.url)
        with pytest.raises(StoreCorrupt, match="reads back wrong"):
            store.publish(window_of(many_ids(40_000)))
        assert store.windows() == []
        store.close()


def test_what_a_server_evicts_is_named_and_the_rest_is_answered() -> None:
    async def run(server: Server) -> None:
        async with opened(server.url) as reader:
            with server.client() as client:
                num_keys = client.dbsize()
                client.config_set("maxmemory-policy", "allkeys-random")
                while client.dbsize() > num_keys * 0.8:
                    client.config_set("maxmemory", client.info("memory")["used_memory"] - 5000)
            got = await reader.lookup("items", IDS, deadline_ms=LONG_MS)
            assert got.failure is not None
            assert isinstance(got.failure.error, StoreCorrupt)
            assert "evicted" in str(got.failure.error)
            assert 0 < got.failure.rows.sum() < len(IDS)
            assert_right(got, IDS)
            assert isinstance(await outcome(reader, IDS[got.failure.rows], LONG_MS), StoreCorrupt)

    with running_server() as server:
        asyncio.run(run(server))


# What is stored is wrong.


def bucket_key(place: Place, ref: WindowRef, bucket: int) -> bytes:
    base = f"{place.prefix}:{ref.window}:{ref.build}"
    return bucket_keys(base, "items", 0, [bucket])[0]


@pytest.mark.parametrize("damage", ["longer", "shorter", "swapped", "lost"])
def test_a_damaged_bucket_is_corrupt_and_not_absent(
    server: Server, place: Place, damage: str
) -> None:
    ids = many_ids(1000)
    store, window = place.open(), window_of(ids)
    ref = store.publish(window)
    key = bucket_key(place, ref, 0)
    with redis.Redis(port=server.port) as client:
        content = client.get(key)
        assert content
        if damage == "longer":
            client.append(key, b"x")
        elif damage == "shorter":
            client.set(key, content[:-1])
        elif damage == "swapped":
            client.set(key, client.get(bucket_key(place, ref, 1)) or b"")
        else:
            client.delete(key)
    got = look(place.open(), ref, "items", ids)
    assert got.failure is not None
    assert isinstance(got.failure.error, StoreCorrupt)
    lost = got.failure.rows
    assert 0 < lost.sum() < 20  # those of the damaged bucket
    assert not got.present[lost].any()
    assert not got.vectors[lost].any()
    assert got.present[~lost].all()
    with pytest.raises(StoreCorrupt):
        look(place.open(), ref, "items", ids[lost])
    with pytest.raises(StoreCorrupt):
        store.check(ref)
    assert look(place.open(), ref, "users", ids).present.all()
    store.publish(window)
    assert look(place.open(), ref, "items", ids).present.all()


def test_a_window_under_the_name_of_another_build_is_refused(server: Server, place: Place) -> None:
    ref = place.open().publish(window_of(uint64(1)))
    with redis.Redis(port=server.port) as client:
        index = f"{{{place.prefix}}}:windows"
        meta = client.hget(index, str(ref))
        client.hset(index, mapping={str(UNKNOWN): meta, str(ref): b"{}"})
    for damaged, complaint in ((UNKNOWN, "is that of"), (ref, "is damaged")):
        with pytest.raises(StoreCorrupt, match=complaint):
            look(place.open(), damaged, "items", uint64(1))


def copy_over(server: Server, place: Place, source: PackedWindow, target: PackedWindow) -> None:
    """All item buckets of `source` come under the keys of `target`, where it has some."""
    for window in (source, target):
        place.open().publish(window)
    with server.client() as client:
        for key in client.scan_iter(f"{place.prefix}:*:{source.ref.build}:*:i:*", count=1000):
            goal = key.replace(source.ref.build.encode(), target.ref.build.encode())
            if client.exists(goal):
                client.copy(key, goal, replace=True)


def test_buckets_of_a_build_of_other_size_are_corrupt(server: Server, place: Place) -> None:
    target = window_of(IDS)
    copy_over(server, place, window_of(IDS[:900], seed=1), target)
    got = look(place.open(), target.ref, "items", IDS)
    assert got.failure is not None
    assert isinstance(got.failure.error, StoreCorrupt)
    with pytest.raises(StoreCorrupt, match="checksum"):
        place.open().check(target.ref)


def test_buckets_of_a_build_with_the_same_ids_never_pass_for_ours(
    server: Server, place: Place
) -> None:
    target = window_of(IDS)
    copy_over(server, place, window_of(IDS, seed=1), target)
    with pytest.raises(StoreCorrupt, match="another bucket or build"):
        look(place.open(), target.ref, "items", IDS)
    with pytest.raises(StoreCorrupt, match=r"items .* checksum"):
        place.open().check(target.ref)


# Several publishers.


PUBLISHED = many_ids(20_000)


def publish_on_demand(url: str, prefix: str) -> None:
    """Runs in a process of its own: publishes the window of each seed that it reads, and dies when
    it has written the share that stands beside it."""
    store = open_store(url, prefix=prefix)
    for line in sys.stdin:
        seed, share = map(float, line.split())

        def die(done: int, total: int, share: float = share) -> None:
            if done >= share * total:
                signal.raise_signal(signal.SIGKILL)

        print(store.publish(window_of(PUBLISHED, seed), progress=die), flush=True)


@contextmanager
def publishers(place: Place, num: int) -> Iterator[list[subprocess.Popen[str]]]:
    code = f"import test_store_faults as t; t.publish_on_demand({place.url!r}, {place.prefix!r})"
    here = Path(__file__).parent
    path = {"PYTHONPATH": f"{here}:{here.parent}"}
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    command = [sys.executable, "-c", code]
    processes = [subprocess.Popen(command, env=path, **pipes) for _ in range(num)]
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def demand(process: subprocess.Popen[str], seed: float, share: float = 2.0) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{seed} {share}\n")
    process.stdin.flush()


def published(process: subprocess.Popen[str]) -> WindowRef:
    assert process.stdout is not None
    return WindowRef.parse(process.stdout.readline().strip())


def assert_whole(place: Place, ref: WindowRef, seed: float) -> None:
    store = place.open()
    store.check(ref)
    assert store.unfinished() == []
    store.close()
    for entity in ENTITIES:
        assert_right(look(place.open(), ref, entity, PUBLISHED), PUBLISHED, seed)


def test_two_publishers_at_once_never_mix_their_builds(server: Server, place: Place) -> None:
    with publishers(place, 2) as both:
        for seeds in [(0, 0), (1, 2), (3, 3), (4, 5), (6, 6)]:
            for process, seed in zip(both, seeds, strict=True):
                demand(process, seed)
            refs = [published(process) for process in both]
            assert len(set(refs)) == len(set(seeds))
            for ref, seed in zip(refs, seeds, strict=True):
                assert_whole(place, ref, seed)
            for ref in set(refs):
                place.open().remove(ref)


def test_publishers_that_are_killed_anywhere_leave_what_the_next_one_completes(
    server: Server, place: Place
) -> None:
    rng = random.Random(11)
    window = window_of(PUBLISHED)
    with publishers(place, 6) as processes:
        for pair in (processes[:2], processes[2:4], processes[4:]):
            for process in pair:
                demand(process, 0, rng.random())
            assert [process.wait(30) for process in pair] == [-signal.SIGKILL] * 2
            assert place.open().windows() == []
            assert place.open().unfinished() == [window.ref]
            with pytest.raises(WindowNotFound):
                look(place.open(), window.ref, "items", PUBLISHED)
    assert place.open().publish(window) == window.ref
    assert_whole(place, window.ref, 0)


def test_a_repair_that_was_broken_off_at_its_end_is_finished_by_the_next(
    server: Server, place: Place
) -> None:
    def stop(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    store, window = place.open(), window_of(IDS)
    ref = store.publish(window)
    with server.client() as client:
        client.delete(bucket_key(place, ref, 0))
    with pytest.raises(KeyboardInterrupt):
        store.publish(window, progress=stop)
    assert store.windows() == store.unfinished() == [ref]
    store.publish(window)
    assert store.unfinished() == []
    store.check(ref)


def test_a_throttled_publish_keeps_to_its_rate(server: Server, place: Place) -> None:
    window = window_of(many_ids(20_000))
    store = open_store(server.url, prefix=place.prefix, max_mbps=3)
    with server.client() as client:
        before = client.info("stats")["total_net_input_bytes"]
        start_s = time.monotonic()
        store.publish(window)
        elapsed_s = time.monotonic() - start_s
        num_bytes = client.info("stats")["total_net_input_bytes"] - before
    store.close()
    assert num_bytes > 2.5e6
    assert num_bytes / elapsed_s <= 3e6 * 1.2


def test_every_error_of_the_client_library_has_a_translation() -> None:
    roots = (redis.exceptions.RedisError, redis.exceptions.RedisClusterException)
    named = [kind for kind in vars(redis.exceptions).values() if isinstance(kind, type)]
    foreign = [kind for kind in named if issubclass(kind, roots)]
    assert len(foreign) > 10
    for kind in foreign:
        assert issubclass(kind, FOREIGN)
        assert any(issubclass(kind, known) for known, _ in TRANSLATIONS)
    refused = redis.exceptions.AuthenticationError("no")
    assert type(translate(refused, "there")) is StoreRejected
    assert issubclass(StoreTimeout, StoreUnavailable)
    assert not issubclass(StoreBusy, StoreTimeout)
    assert all(issubclass(ours, StoreError) for _, ours in TRANSLATIONS)
