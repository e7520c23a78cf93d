"""The end of a process: whoever sends requests learns of it while they are still answered.

uvicorn closes connections that are idle when it ends; a caller that sends its next request at that
moment gets a reset instead of an answer. So it is told to end only after a while, in which the
process is not ready, and every answer asks its caller to close the connection.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

log = logging.getLogger(__name__)

_CLOSE = (b"connection", b"close")


class Drain:
    """Whether this process is about to end; it begins with SIGTERM and takes `seconds`."""

    def __init__(self, seconds: float = 0.0) -> None:
        self._seconds = seconds
        self.begun = self.serving = False

    def why_not_ready(self) -> str:
        """Empty before SIGTERM."""
        return "the process is about to end" if self.begun else ""

    @contextmanager
    def on_sigterm(self, give_up: Callable[[], None]) -> Iterator[None]:
        """Puts the drain before what SIGTERM does when the block begins; a second SIGTERM ends it.
        Until `serving` is set there is nobody to answer: what the start waits for is given up.
        Signals are for the main thread: in another one nothing changes."""
        loop, end = asyncio.get_running_loop(), signal.getsignal(signal.SIGTERM)
        if threading.current_thread() is not threading.main_thread() or not callable(end):
            yield
            return

        def begin(number: int, frame: FrameType | None) -> None:
            if not self.serving:
                give_up()
            if self.begun or not self._seconds or not self.serving:
                end(number, frame)
            else:
                # Not here, between two instructions of whatever is running.
                loop.call_soon_threadsafe(self._begin, loop, end)

        signal.signal(signal.SIGTERM, begin)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, end)

    def _begin(self, loop: asyncio.AbstractEventLoop, end: Callable[..., Any]) -> None:
        self.begun = True
        log.info("SIGTERM: answering for another %g s, then ending", self._seconds)
        loop.call_later(self._seconds, end, signal.SIGTERM, None)


class SayGoodbye:
    """ASGI middleware that asks callers to close their connections once the drain has begun."""

    def __init__(self, app: ASGIApp, drain: Drain) -> None:
        self._app, self._drain = app, drain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def closing(message: Message) -> None:
            if message["type"] == "http.response.start" and self._drain.begun:
                message = {**message, "headers": [*message.get("headers", ()), _CLOSE]}
            await send(message)

        await self._app(scope, receive, closing if scope["type"] == "http" else send)
