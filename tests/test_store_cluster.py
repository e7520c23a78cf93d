"""What a store in a cluster does while slots move, masters die and seeds are away."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from itertools import count

import pytest
import redis
from runclock import run_s
from servers import ClusterServers, Server, free_port, running_cluster
from test_store import LONG_MS, Place, look, many_ids, window_of
from test_store_auth import SECRET, lone_master
from test_store_faults import IDS, SLACK_S, assert_right, num_files, soon

from embeddings_store import (
    Reader,
    StoreError,
    StoreUnavailable,
    Windows,
    open_store,
)
from embeddings_store.buckets import slot_of, tags

RECOVERY_S = 15.0
"""The servers notice a dead master after one second, and then vote."""

_prefixes = count()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterServers]:
    with running_cluster() as running:
        yield running


@pytest.fixture
def place(cluster: ClusterServers) -> Place:
    return Place(cluster.url, f"test{next(_prefixes)}")


@asynccontextmanager
async def opened(place: Place) -> AsyncIterator[Reader]:
    """A reader of a window with `IDS`."""
    store = place.open()
    ref = store.publish(window_of(IDS))
    store.close()
    reader = await place.open(max_connections=2).reader(ref)
    try:
        yield reader
    finally:
        await reader.close()


async def asked(reader: Reader, deadline_ms: float = LONG_MS) -> Windows | StoreError:
    """A lookup of everything, which kept its deadline and whose rows were right."""
    start_s = run_s()
    try:
        got = await reader.lookup("items", IDS, deadline_ms=deadline_ms)
    except StoreError as error:
        return error
    finally:
        assert run_s() - start_s < deadline_ms / 1000 + SLACK_S
    assert_right(got, IDS)
    return got


def error_of(answer: Windows | StoreError) -> StoreError | None:
    """Why some of the rows, or all, are not there."""
    if isinstance(answer, StoreError):
        return answer
    return answer.failure.error if answer.failure else None


def is_whole(answer: Windows | StoreError) -> bool:
    return error_of(answer) is None


async def whole(reader: Reader, within_s: float) -> None:
    """Returns once a lookup is answered wholly."""
    give_up_at_s = run_s() + within_s
    while not is_whole(await asked(reader)):
        assert run_s() < give_up_at_s
        await asyncio.sleep(0.02)


def keys_of(server: Server, prefix: str) -> set[bytes]:
    with server.client() as client:
        return set(client.scan_iter(f"*{prefix}*", count=10_000))


def test_the_keys_of_a_window_are_spread_evenly_and_none_is_left_when_it_is_removed(
    cluster: ClusterServers, place: Place
) -> None:
    store = place.open()
    ref = store.publish(window_of(many_ids(20_000)))
    nums = [len(keys_of(master, place.prefix)) for master in cluster.masters]
    assert sum(nums) > 20_000 / 4
    for num in nums:
        assert abs(num * 3 / sum(nums) - 1) < 0.2
    store.check(ref)
    store.remove(ref)
    store.close()
    everyone = [*cluster.masters, *cluster.replicas]
    asyncio.run(soon(lambda: not any(keys_of(server, place.prefix) for server in everyone)))


# Slots that move.


def owner(cluster: ClusterServers, slot: int) -> Server:
    with cluster.masters[0].client() as client:
        shards = client.execute_command("CLUSTER SLOTS")
    (port,) = (shard[2][1] for shard in shards if shard[0] <= slot <= shard[1])
    return next(server for server in cluster.masters if server.port == port)


@contextmanager
def moving(cluster: ClusterServers, slot: int, num_keys: int | None = None) -> Iterator[None]:
    """A slot goes to another master with this many of its keys, or all; then with the rest."""
    source = owner(cluster, slot)
    target = next(server for server in cluster.masters if server is not source)
    with source.client() as here, target.client() as there:
        ids = [client.execute_command("CLUSTER MYID").decode() for client in (here, there)]
        there.execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[0])
        here.execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[1])
        _migrate(here, target, slot, num_keys)
        try:
            yield
        finally:
            _migrate(here, target, slot, None)
            for client in (there, here):
                client.execute_command("CLUSTER SETSLOT", slot, "NODE", ids[1])


def _migrate(client: redis.Redis, target: Server, slot: int, num_keys: int | None) -> None:
    keys = client.execute_command("CLUSTER GETKEYSINSLOT", slot, num_keys or 10_000)
    if keys:
        client.migrate("127.0.0.1", target.port, keys, 0, 5000)


def test_a_slot_that_moves_to_another_master_costs_no_row(
    cluster: ClusterServers, place: Place
) -> None:
    slots = [slot_of(tags()[at].encode()) for at in (3, 40)]

    def move() -> None:
        for slot in slots:
            with moving(cluster, slot):
                time.sleep(0.05)

    async def run() -> None:
        async with opened(place) as reader:
            move_task = asyncio.create_task(asyncio.to_thread(move))
            num_asked = 0
            while not move_task.done() or num_asked < 20:
                assert error_of(await asked(reader)) is None
                num_asked += 1
            await move_task
            assert error_of(await asked(reader)) is None

    before = [owner(cluster, slot) for slot in slots]
    asyncio.run(run())
    assert all(owner(cluster, slot) is not old for slot, old in zip(slots, before, strict=True))


def test_a_slot_that_is_half_moved_costs_no_row(cluster: ClusterServers, place: Place) -> None:
    async def run() -> None:
        async with opened(place) as reader:
            for num_keys in (1, 3):
                with moving(cluster, slot_of(tags()[10].encode()), num_keys):
                    for _ in range(10):
                        assert error_of(await asked(reader)) is None
                    kinds = {type(await asked_one(reader, at)) for at in range(0, 1000, 50)}
                    assert kinds == {Windows}

    asyncio.run(run())


async def asked_one(reader: Reader, at: int) -> Windows:
    got = await reader.lookup("items", IDS[at : at + 1], deadline_ms=LONG_MS)
    assert_right(got, IDS[at : at + 1])
    return got


def test_a_reader_is_opened_while_the_slot_of_the_index_moves(
    cluster: ClusterServers, place: Place
) -> None:
    ref = place.open().publish(window_of(IDS))
    with moving(cluster, slot_of(place.prefix.encode())):
        assert_right(look(place.open(), ref, "items", IDS), IDS)


def test_publishing_into_a_slot_that_moves_fails_clearly_or_completes_and_completes_afterwards(
    cluster: ClusterServers, place: Place
) -> None:
    other = place.open()
    other.publish(window_of(IDS, seed=1))  # so that there are keys to move
    store, window = place.open(), window_of(many_ids(5000))
    with moving(cluster, slot_of(tags()[20].encode()), 1):
        with suppress(StoreUnavailable):
            store.publish(window)
        if window.ref not in store.windows():
            assert store.unfinished() == [window.ref]
    assert store.publish(window) == window.ref
    store.check(window.ref)
    for each in (store, other):
        each.close()


# Servers that fail.


def test_a_frozen_master_costs_its_rows_only_and_is_not_hammered(
    cluster: ClusterServers, place: Place
) -> None:
    async def run(frozen: Server, client: redis.Redis) -> None:
        async with opened(place) as reader:
            before = client.info("stats")["total_connections_received"]
            frozen.freeze()  # for less than what the others take for its death
            answers = [await asked(reader, deadline_ms=20) for _ in range(100)]
            frozen.thaw()
            assert not any(map(is_whole, answers))
            partial = [got for got in answers if isinstance(got, Windows)]
            assert len(partial) > 90
            for got in partial:
                assert got.failure is not None
                assert 0.2 < got.failure.rows.mean() < 0.5
            await whole(reader, within_s=4.0)
            after = client.info("stats")["total_connections_received"]
            assert after - before < 10

    server = cluster.masters[1]
    with server.client() as client:
        asyncio.run(run(server, client))


def test_a_master_that_dies_in_the_middle_of_traffic_is_replaced() -> None:
    rng = random.Random(3)
    window = window_of(many_ids(5000), seed=2)
    complaints: list[str] = []

    async def traffic(reader: Reader, until: Callable[[], bool]) -> list[Windows | StoreError]:
        answers: list[Windows | StoreError] = []
        while not until():
            some = (asked(reader, deadline_ms=rng.uniform(10, 50)) for _ in range(4))
            answers += await asyncio.gather(*some)
            await asyncio.sleep(0.005)
        return answers

    def published(place: Place) -> bool:
        """Whether publishing went well; anything but a StoreError fails the test."""
        store = place.open()
        try:
            return store.publish(window) == window.ref
        except StoreError as error:
            complaints.append(str(error))
            return False
        finally:
            store.close()

    async def run(servers: ClusterServers) -> None:
        place, files = Place(servers.url, "mine"), num_files()
        async with opened(place) as reader:
            other = await place.open(max_connections=2).reader(reader.ref)
            assert error_of(await asked(reader)) is None
            servers.masters[0].kill()
            publishing = asyncio.create_task(asyncio.to_thread(published, place))
            give_up_at_s = run_s() + RECOVERY_S
            soon_over = run_s() + 0.5
            answers = await traffic(reader, lambda: run_s() > soon_over)
            partial = [got for got in answers if isinstance(got, Windows) and got.failure]
            assert len(partial) > len(answers) / 2
            lookups = [asyncio.create_task(asked(other, deadline_ms=50)) for _ in range(20)]
            await asyncio.sleep(0)
            await other.close()
            await asyncio.gather(*lookups)
            await whole(reader, within_s=RECOVERY_S)
            await publishing
            while not await asyncio.to_thread(published, place):
                assert run_s() < give_up_at_s
            store = place.open()  # its first seed is the dead master
            store.check(window.ref)
            store.remove(window.ref)
            assert window.ref not in store.windows()
            store.close()
            assert error_of(await asked(reader)) is None
        assert asyncio.all_tasks() == {asyncio.current_task()}
        await soon(lambda: num_files() <= files)

    with running_cluster() as servers:
        asyncio.run(run(servers))
    assert all("127.0.0.1" in complaint for complaint in complaints)


def test_any_server_serves_as_the_only_seed_that_answers(cluster: ClusterServers) -> None:
    prefix = f"test{next(_prefixes)}"
    ref = Place(cluster.url, prefix).open().publish(window_of(IDS))
    replica = f"127.0.0.1:{cluster.replicas[2].port}"
    for seeds in (replica, f"127.0.0.1:{free_port()},{replica}"):
        place = Place(f"redis+cluster://{seeds}", prefix)
        assert place.open().windows() == [ref]
        assert_right(look(place.open(), ref, "items", IDS), IDS)


def test_a_cluster_whose_servers_all_have_new_addresses_is_found_by_its_other_seeds() -> None:
    first, second = free_port(), free_port()
    url = f"redis+cluster://:{SECRET}@127.0.0.1:{first},127.0.0.1:{second}"

    async def run() -> None:
        with lone_master(port=first):
            store = open_store(url, max_connections=2)
            ref = store.publish(window_of(IDS))
            reader = await store.reader(ref)
            store.close()
        assert not is_whole(await asked(reader, deadline_ms=50))
        with lone_master(port=second):
            assert store.publish(window_of(IDS)) == ref
            await whole(reader, within_s=3)
            store.close()
        await reader.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())
