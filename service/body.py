"""A bound on request bodies, held while they arrive, whether or not their length was announced."""

from __future__ import annotations

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import BodyTooLargeError, UnsupportedMediaTypeError, problem


class BodyLimit:
    """ASGI middleware. starlette's own answers some cases as plain text, hence this one."""

    def __init__(self, app: ASGIApp, max_bytes: int) -> None:
        self._app, self._max_bytes = app, max_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        if announced.isdecimal() and int(announced) > self._max_bytes:
            await problem(self._too_large())(scope, receive, send)
            return
        num_bytes = 0

        async def counting() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_bytes:
                raise self._too_large()
            return message

        await self._app(scope, counting, send)

    def _too_large(self) -> BodyTooLargeError:
        return BodyTooLargeError(f"the body must be at most {self._max_bytes} bytes")


def check_json(content_type: str | None) -> None:
    """A body without a media type is taken to be JSON.

    Raises:
        UnsupportedMediaTypeError: it is declared as something else.
    """
    media_type = (content_type or "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json" and not media_type.endswith("+json"):
        raise UnsupportedMediaTypeError(
            f"content-type is {media_type!r:.100}, must be application/json"
        )
