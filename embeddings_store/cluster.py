"""Which server has which buckets: one server all of them, the masters of a cluster their slots."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, cast

from redis.exceptions import AskError, MovedError, RedisError, TryAgainError

from embeddings_store.address import Address
from embeddings_store.buckets import NUM_SLOTS, Reply, slot_of, tags
from embeddings_store.node import CONNECT_TIMEOUT_S, PROBE_PAUSE_S, Ask, Command, Node, translate
from embeddings_store.window import StoreError, StoreUnavailable

Part = tuple[int, list[bytes]]
"""Place of a tag in `buckets.tags()`, and keys that have it."""
_Endpoint = tuple[str, int]


class Servers(Protocol):
    """Where the buckets are. Belongs to one event loop."""

    async def open(self) -> None:
        """Connect to all; StoreError when that fails. The caller sets the deadline."""
        ...

    async def hget(self, key: str, field: str) -> bytes | None:
        """One field of a hash; StoreError on failure. The caller sets the deadline."""
        ...

    async def mget(self, parts: Sequence[Part], deadline_s: float) -> list[Reply]:
        """The value of each key, in order, or why its server gave none; deadline_s as the event
        loop counts. StoreError when no server gave any."""
        ...

    async def close(self) -> None: ...


class OneServer:
    """A server that stands alone. Implements `Servers`."""

    def __init__(self, address: Address, max_connections: int) -> None:
        self._node = Node(address.asynchronous, address.location, max_connections, _ping)

    async def open(self) -> None:
        await self._node.open()

    async def hget(self, key: str, field: str) -> bytes | None:
        (reply,) = await self._node.ask([("HGET", key, field)], _soon())
        return cast("bytes | None", _checked(reply, self._node))

    async def mget(self, parts: Sequence[Part], deadline_s: float) -> list[Reply]:
        keys = [key for _, some in parts for key in some]
        (replies,) = await self._node.ask([("MGET", *keys)], deadline_s)
        return cast("list[Reply]", _checked(replies, self._node))

    async def close(self) -> None:
        await self._node.close()


class Cluster:
    """The masters of a cluster. Implements `Servers`.

    A server that fails, or that says that a slot has moved, makes it ask in the background who has
    which slots, until every slot's master answers.
    """

    def __init__(self, address: Address, max_connections: int) -> None:
        self._address = address
        self._max_connections = max_connections
        self._nodes: dict[_Endpoint, Node] = {}
        self._masters: list[_Endpoint] = []
        """Of each slot."""
        self._watcher: asyncio.Task[None] | None = None
        self._is_closed = False

    async def open(self) -> None:
        await self._refresh(self._address.seeds)

    async def hget(self, key: str, field: str) -> bytes | None:
        start, end = key.index("{"), key.index("}")
        node = self._nodes[self._masters[slot_of(key[start + 1 : end].encode())]]
        command = ("HGET", key, field)
        (reply,) = await node.ask([command], _soon())
        if isinstance(reply, AskError):  # or MovedError, which is one: its slot moves
            node = self._node((reply.host, reply.port))
            _, reply = await node.ask([("ASKING",), command], _soon())
        return cast("bytes | None", _checked(reply, node))

    async def mget(self, parts: Sequence[Part], deadline_s: float) -> list[Reply]:
        places: dict[_Endpoint, list[int]] = {}
        for place, (tag, _) in enumerate(parts):
            places.setdefault(self._masters[slot_of(tags()[tag].encode())], []).append(place)
        asked = [
            self._ask_master(self._nodes[endpoint], [parts[place][1] for place in mine], deadline_s)
            for endpoint, mine in places.items()
        ]
        answers: dict[int, list[Reply]] = {}
        for mine, replies in zip(places.values(), await asyncio.gather(*asked), strict=True):
            answers.update(zip(mine, replies, strict=True))
        flat = [reply for place in range(len(parts)) for reply in answers[place]]
        if flat and all(isinstance(reply, StoreError) for reply in flat):
            raise next(reply for reply in flat if isinstance(reply, StoreError))
        return flat

    async def close(self) -> None:
        self._is_closed = True
        if self._watcher is not None:
            self._watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watcher
        for node in self._nodes.values():
            await node.close()

    async def _ask_master(
        self, node: Node, parts: Sequence[list[bytes]], deadline_s: float
    ) -> list[list[Reply]]:
        try:
            replies = await node.ask([("MGET", *keys) for keys in parts], deadline_s)
        except StoreError as error:
            self._watch()
            return [[error] * len(keys) for keys in parts]
        return [
            reply
            if isinstance(reply, list)
            else await self._redirected(node, reply, keys, deadline_s)
            for reply, keys in zip(replies, parts, strict=True)
        ]

    async def _redirected(
        self, node: Node, error: Exception, keys: list[bytes], deadline_s: float
    ) -> list[Reply]:
        """The values of keys whose MGET was refused."""
        self._watch()
        try:
            if isinstance(error, MovedError):
                node = self._node((error.host, error.port))
                (reply,) = await node.ask([("MGET", *keys)], deadline_s)
                if isinstance(reply, list):
                    return reply
                error = reply  # it moves on already
            if isinstance(error, AskError | TryAgainError):
                return await self._one_by_one(node, keys, deadline_s)
            return list(_checked(error, node))
        except StoreError as failed:
            return [failed] * len(keys)

    async def _one_by_one(
        self, node: Node, keys: Sequence[bytes], deadline_s: float
    ) -> list[Reply]:
        """While a slot moves, some of its keys are here already and some still there."""
        replies = await node.ask([("GET", key) for key in keys], deadline_s)
        moved = [place for place, reply in enumerate(replies) if isinstance(reply, AskError)]
        if moved:
            target = self._node((replies[moved[0]].host, replies[moved[0]].port))
            commands: list[Command] = []
            for place in moved:
                commands += [("ASKING",), ("GET", keys[place])]
            found = (await target.ask(commands, deadline_s))[1::2]
            for place, reply in zip(moved, found, strict=True):
                replies[place] = reply
        return [_checked(reply, node) for reply in replies]

    def _node(self, endpoint: _Endpoint) -> Node:
        if endpoint not in self._nodes:
            host, port = endpoint
            options = {**self._address.asynchronous, "host": host, "port": port}
            self._nodes[endpoint] = Node(
                options, f"redis {host}:{port}", self._max_connections, _ping
            )
        return self._nodes[endpoint]

    def _watch(self) -> None:
        if not self._is_closed and (self._watcher is None or self._watcher.done()):
            self._watcher = asyncio.create_task(self._refresh_until_well())

    async def _refresh_until_well(self) -> None:
        while True:
            with contextlib.suppress(StoreError):
                known = sorted(self._nodes, key=lambda at: self._nodes[at].is_away)
                # At last by the names that they were first found by: all addresses may be new.
                await self._refresh([*known, *self._address.seeds])
                if not any(self._nodes[endpoint].is_away for endpoint in set(self._masters)):
                    return
            await asyncio.sleep(PROBE_PAUSE_S)

    async def _refresh(self, known: Iterable[_Endpoint]) -> None:
        """Ask one of the servers who has which slots; StoreError when none can tell."""
        error: StoreError = StoreUnavailable(f"{self._address.location}: no server to ask")
        for endpoint in known:
            try:
                (reply,) = await self._node(endpoint).ask([("CLUSTER", "SLOTS")], _soon())
                await self._adopt(_masters(_checked(reply, self._node(endpoint)), endpoint[0]))
                return
            except StoreError as failed:
                error = failed
        raise error

    async def _adopt(self, masters: list[_Endpoint]) -> None:
        """Connect to masters that are new, go over to them, let go of servers that are none."""
        new = [self._node(endpoint) for endpoint in set(masters) - set(self._masters)]
        results = await asyncio.gather(*(node.open() for node in new), return_exceptions=True)
        self._masters = masters
        for failed in results:
            if failed is not None:
                raise failed
        for endpoint in set(self._nodes) - set(masters):
            await self._nodes.pop(endpoint).close()


def _masters(slots: Sequence[Sequence[Any]], host: str) -> list[_Endpoint]:
    """The master of each slot, from the answer to CLUSTER SLOTS; StoreUnavailable when one has
    none. A server that doesn't say its own host has the one that it was asked at."""
    masters: list[_Endpoint | None] = [None] * NUM_SLOTS
    for start, end, (name, port, *_), *_ in slots:
        named = name.decode() if name else ""
        masters[start : end + 1] = [(named or host, int(port))] * (end + 1 - start)
    found = [master for master in masters if master is not None]
    if len(found) < NUM_SLOTS:
        raise StoreUnavailable(f"redis {host}: {NUM_SLOTS - len(found)} slots have no master")
    return found


async def _ping(ask: Ask) -> None:
    (reply,) = await ask([("PING",)])
    if isinstance(reply, RedisError):
        raise reply


def _checked(reply: Any, node: Node) -> Any:
    """The reply, or the error that it is, after which the server is tried before it is used."""
    if not isinstance(reply, RedisError):
        return reply
    error = translate(reply, node.location)
    node.note(error)
    raise error


def _soon() -> float:
    return asyncio.get_running_loop().time() + CONNECT_TIMEOUT_S


def open_servers(address: Address, max_connections: int) -> Servers:
    """What the address names; nothing is connected yet."""
    kind = Cluster if address.is_cluster else OneServer
    return kind(address, max_connections)
