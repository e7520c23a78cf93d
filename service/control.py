"""Control over HTTP: which bundle is current, changed by whoever knows the token.

A bundle is loaded and checked by the process that is asked before the registry says that it is
current: so what this service refuses never becomes current this way.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from bundle.manifest import BundleError, refusals
from bundle.registry import Current, Registry, RegistryError, RegistryUnavailable
from service import errors
from service.answers import json_answer
from service.live import Live
from service.logs import facts
from service.metrics import Metrics
from service.vetting import RefusedError

log = logging.getLogger(__name__)

_OUTCOMES = {401: "unauthorised", 404: "unknown", 409: "refused", 503: "unavailable"}


class Control:
    """The handlers; one action at a time in a process."""

    def __init__(self, registry: Registry, live: Live, metrics: Metrics, token: str) -> None:
        self._registry, self._live, self._metrics = registry, live, metrics
        self._token = f"Bearer {token}".encode()
        self._lock = asyncio.Lock()

    def install(self, app: FastAPI) -> None:
        app.post("/v1/models/rollback", summary="Back to the previous bundle")(self.rollback)
        app.post("/v1/models/{bundle_id}/promote", summary="Make a bundle current")(self.promote)

    async def promote(self, bundle_id: str, request: Request) -> Response:
        """Makes a bundle current, and live in this process; if it is both, nothing changes."""
        with self._noted("promote", bundle_id):
            self._authorise(request)
            async with self._lock:
                await self._vet(bundle_id)
                changed = await _changed(self._registry.promote, bundle_id)
                return await self._answer(changed)

    async def rollback(self, request: Request) -> Response:
        """Makes the previous bundle current again, and live in this process."""
        with self._noted("rollback", None):
            self._authorise(request)
            async with self._lock:
                before = await _changed(self._registry.current)
                if before is None or before.previous is None:
                    raise HTTPException(409, "there is no previous bundle to roll back to")
                await self._vet(before.previous)
                return await self._answer(await _changed(self._registry.rollback))

    def _authorise(self, request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if not hmac.compare_digest(given, self._token):
            detail = "the header authorization must be 'Bearer ' and the service's control token"
            raise HTTPException(401, detail, {"www-authenticate": "Bearer"})

    async def _vet(self, bundle_id: str) -> None:
        try:
            manifest = await asyncio.to_thread(self._registry.read, bundle_id)
        except RegistryUnavailable as error:
            raise HTTPException(503, str(error)) from error
        except RegistryError:
            raise HTTPException(404, f"there is no bundle {bundle_id!r:.120}") from None
        except BundleError as error:
            raise HTTPException(409, str(error)) from error
        if reasons := refusals(manifest):
            raise HTTPException(409, f"{bundle_id} was refused: {'; '.join(reasons)}")
        try:
            await self._live.vet(bundle_id)
        except RefusedError as refused:
            if refused.kind == "unavailable":
                raise HTTPException(503, str(refused)) from refused
            raise HTTPException(409, f"{bundle_id} was refused: {refused}") from refused

    async def _answer(self, changed: Current) -> Response:
        await self._live.refresh()
        live = self._live.scorer.id if self._live.scorer else None
        document = {
            "current": changed.current,
            "previous": changed.previous,
            "changed_at": changed.changed_at,
            "live": live,
            "taken": live == changed.current,
        }
        return json_answer(document)

    @contextmanager
    def _noted(self, action: str, bundle_id: str | None) -> Iterator[None]:
        outcome = "failed"
        try:
            yield
            outcome = "done"
        except HTTPException as error:
            outcome = _OUTCOMES[error.status_code]
            raise
        finally:
            self._metrics.control.labels(action, outcome).inc()
            log.warning("control", extra=facts(action=action, bundle=bundle_id, outcome=outcome))


async def _changed(act: Callable[..., Any], *arguments: str) -> Any:
    """What the registry answers, off the event loop; what it can't do is a conflict."""
    try:
        return await asyncio.to_thread(act, *arguments)
    except RegistryUnavailable as error:
        raise HTTPException(503, str(error)) from error
    except (RegistryError, BundleError) as error:
        raise HTTPException(409, str(error)) from error


@asynccontextmanager
async def own_port(control: Control, host: str, port: int) -> AsyncIterator[None]:
    """Serves control at a port of its own while the block runs. All workers listen at it; each
    connection reaches one of them.

    Raises:
        OSError: the port is taken by something else.
    """
    app = FastAPI(title="Control", docs_url=None, redoc_url=None, openapi_url=None)
    errors.install(app)
    control.install(app)
    app.add_middleware(errors.AnswerFaults)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        config = uvicorn.Config(app, lifespan="off", access_log=False, log_config=None)
        server = _Quiet(config)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            yield
        finally:
            server.should_exit = True
            await asyncio.wait([serving])


class _Quiet(uvicorn.Server):
    """Leaves signals to the server that it runs beside."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield
