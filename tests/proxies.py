"""A proxy in front of a real server: it counts, delays, swallows or refuses what passes it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Literal

from servers import Server


class Proxy:
    """Runs in a thread of its own, so that the loop under test holds nothing of it."""

    def __init__(self, server: Server, delay_s: float) -> None:
        self.server = server
        self.delay_s = delay_s
        """Every chunk of either direction is passed on after this."""
        self.mode: Literal["pass", "swallow", "refuse"] = "pass"
        """`swallow`: connections stay open and nothing gets through, as behind a dead router.
        `refuse`: new connections end at once."""
        self.num_accepted = 0
        """Connections that were made to it."""
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        serving = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._listening = self._loop.run_until_complete(serving)
        self.port = int(self._listening.sockets[0].getsockname()[1])
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return self.server.url.replace(f":{self.server.port}/", f":{self.port}/")

    def cut(self) -> None:
        """End all connections that are open."""
        self._loop.call_soon_threadsafe(self._close_all)

    def end(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.num_accepted += 1
        if self.mode == "refuse":
            writer.close()
            return
        with suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.server.port)
            self._writers |= {writer, far_writer}
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        writer.close()

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with suppress(OSError):
            while chunk := await source.read(1 << 16):
                await asyncio.sleep(self.delay_s)
                if self.mode == "pass":
                    sink.write(chunk)
        sink.close()
        self._writers.discard(sink)

    def _close_all(self) -> None:
        for writer in self._writers:
            writer.close()

    async def _end(self) -> None:
        stop_accepting(self._listening)
        while serving := asyncio.all_tasks() - {asyncio.current_task()}:
            self._close_all()  # again: one that was accepted just now may have opened more
            await asyncio.wait(serving, timeout=0.1)
        self._listening.close()


def stop_accepting(server: asyncio.Server) -> None:
    """To be closed once no task of its loop is left: what it has accepted, and has made no
    connection of when it is closed, asyncio would leave open."""
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())


@contextmanager
def proxied(server: Server, delay_s: float = 0.0) -> Iterator[Proxy]:
    """A proxy that is ended with all its connections."""
    proxy = Proxy(server, delay_s)
    try:
        yield proxy
    finally:
        proxy.end()
