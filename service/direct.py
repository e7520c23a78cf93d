"""A short way to the handlers of the routes that most requests are for."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from service.errors import TABLE, problem

log = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]
_KNOWN = tuple(TABLE)


@dataclass(frozen=True)
class Route:
    """As `answers.route_of` reads it."""

    path: str
    handler: Handler


class Direct:
    """ASGI middleware: POST requests of some paths go to their handlers without the framework
    between, which takes as long over a small request as its model does. The framework has these
    routes too: it documents them, and answers other methods."""

    def __init__(self, app: ASGIApp, handlers: Mapping[str, Handler]) -> None:
        self._app = app
        self._routes = {path: Route(path, handler) for path, handler in handlers.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        route = self._routes.get(scope["path"]) if scope["type"] == "http" else None
        if route is None or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        scope["route"] = route
        try:
            response = await route.handler(Request(scope, receive))
        except Exception as error:
            if not isinstance(error, _KNOWN):
                log.exception("POST %s failed", route.path)
            response = problem(error)
        await response(scope, receive, send)
