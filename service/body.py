"""Bounds on request bodies, held while they arrive: bytes, whether or not they were announced, and
the time that they take."""

from __future__ import annotations

import asyncio

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.answers import at_once, header
from service.errors import (
    BodyTooLargeError,
    SlowBodyError,
    UnsupportedMediaTypeError,
    problem,
)


class BodyLimit:
    """ASGI middleware. starlette's own answers some cases as plain text, hence this one."""

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_s: float) -> None:
        self._app, self._max_bytes, self._timeout_s = app, max_bytes, timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = header(scope, b"content-length") or "0"
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await problem(self._too_large())(scope, receive, send)
            return
        num_bytes, is_whole = 0, False
        give_up_at_s = asyncio.get_running_loop().time() + self._timeout_s

        async def counting() -> Message:
            nonlocal num_bytes, is_whole
            if is_whole:  # what comes after the body is that the caller has gone away
                return await receive()
            message = at_once(receive()) or await self._in_time(receive, give_up_at_s)
            num_bytes += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    async def _in_time(self, receive: Receive, give_up_at_s: float) -> Message:
        try:
            async with asyncio.timeout_at(give_up_at_s):
                return await receive()
        except TimeoutError:
            text = f"the body must arrive within {self._timeout_s:g} s"
            raise SlowBodyError(text) from None

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body must be at most {self._max_bytes} bytes")


def check_json(scope: Scope) -> None:
    """A body without a media type is taken to be JSON. A compressed one is not read: a few bytes
    could become more than any limit.

    Raises:
        UnsupportedMediaTypeError: it is declared as something else, or as compressed.
    """
    encoding = header(scope, b"content-encoding")
    if encoding and encoding.strip().lower() != "identity":
        raise UnsupportedMediaTypeError(
            f"content-encoding is {encoding!r:.100}, must be identity or absent"
        )
    declared = header(scope, b"content-type") or "application/json"
    media_type = declared.partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"content-type is {media_type!r:.100}, must be application/json"
        )
