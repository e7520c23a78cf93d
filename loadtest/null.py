"""A server that does nothing: it reads a request and answers with a constant. What a load test
measures against it is the load test.

    python -m loadtest.null NUM_CANDIDATES

prints its port and serves until it is ended.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

import httptools
import orjson
import uvloop

START_TIMEOUT_S = 30.0


def answer(num_candidates: int, model: str = "null") -> bytes:
    """A whole HTTP answer to a request of that many candidates."""
    scores = [0.01 + i / 1e6 for i in range(num_candidates)]
    document: dict[str, object] = {
        "model": model,
        "scores": scores,
        "degraded": [],
        "missing": {},
        "request_id": None,
    }
    content = orjson.dumps(document)
    head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
    return head.encode("ascii") + b"\r\n\r\n" + content


@contextmanager
def null_server(num_candidates: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """Its port on 127.0.0.1 and its process, which ends with the block."""
    command = [sys.executable, "-m", "loadtest.null", str(num_candidates)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        with process.stdout:
            yield int(process.stdout.readline()), process
    finally:
        process.kill()  # reaches a stopped process too
        process.wait()


class _Null(asyncio.Protocol):
    def __init__(self, content: bytes) -> None:
        self._answer = content
        self._parser = httptools.HttpRequestParser(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        self._transport.write(self._answer)


async def _serve(num_candidates: int) -> None:
    content = answer(num_candidates)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Null(content), "127.0.0.1", 0, backlog=2048)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1])))
