"""JSON answers, and what a middleware sees of an answer that passes it."""

from __future__ import annotations

from collections.abc import Awaitable

import orjson
from starlette.responses import Response
from starlette.types import Message, Scope, Send


def json_answer(document: object) -> Response:
    """What orjson can write, with status 200."""
    return Response(orjson.dumps(document), media_type="application/json")


def header(scope: Scope, name: bytes) -> str | None:
    """The value of a header, whose `name` is in lower case."""
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return None


def route_of(scope: Scope) -> str:
    """The template of the route that took a request, never its path; "unknown" before one did."""
    route: str = getattr(scope.get("route"), "path", "unknown")
    return route


def at_once(message: Awaitable[Message]) -> Message | None:
    """A message that is there already; None, and nothing is lost, where it would be waited for."""
    step = message.__await__()
    try:
        next(step)
    except StopIteration as ended:
        found: Message = ended.value
        return found
    step.close()
    return None


class Watched:
    """A `send` that passes everything on, and notes the status."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.status: int | None = None
        """None until the answer has begun."""

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)
