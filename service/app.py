"""The HTTP application, and the server that runs it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from prometheus_client import CollectorRegistry
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.supervisors import Multiprocess

from bundle.registry import Registry, RegistryUnavailable
from bundle.remote import RemoteRegistry, open_registry
from embeddings_store import Store
from service import console, errors, logs
from service.admission import Admission, TurnAway
from service.audit import Audit
from service.background import download_in_background
from service.body import BodyLimit
from service.control import Control, own_port
from service.direct import Direct
from service.endpoints import Endpoints
from service.live import Live
from service.logs import FollowRequests
from service.metrics import CountAnswers, Metrics
from service.processors import processors
from service.schemas import (
    MAX_EVENTS,
    Event,
    FeedbackCounts,
    Models,
    Problem,
    ScoreRequest,
    ScoreResponse,
)
from service.settings import Settings
from service.shadow import Shadow
from service.shutdown import Drain, SayGoodbye
from service.traces import TraceRequests, open_provider
from service.windows import WindowSource

log = logging.getLogger(__name__)

GRACE_S = 30
"""How long requests that are under way may take after SIGTERM."""
CONTROL_HOST = "127.0.0.1"
"""Control on a port of its own is for this machine; `kubectl port-forward` reaches it too."""
TICK_S = 5.0
"""How often metrics that are not counted for each request are brought up to date."""
KEEP_ALIVE_S = 80
"""Longer than the 60 to 75 s of usual load balancers, so that it is they who close."""
WORKER_ANSWERS_WITHIN_S = 60
"""A worker that says nothing for so long is replaced. It is silent while it starts too, for many
seconds where its share of a processor is small: uvicorn's own limit of 5 s had such a one killed
and begun again, for ever."""
_SWAGGER_FILES = ("swagger-ui-bundle.js", "swagger-ui.css", "favicon-32x32.png")
_PROBLEMS = {
    400: "The body is not JSON.",
    408: "The body did not arrive in time.",
    413: "The body is too large.",
    415: "The body is declared as something other than JSON.",
    422: "A value is wrong; `errors` names the fields.",
    503: "No model is live, or more work is waiting than can be done in time.",
    504: "The request's `deadline_ms` passed.",
}


class _App(FastAPI):
    """FastAPI with layers around it, and with the models documented that it does not handle."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._outermost: ASGIApp = super().__call__

    def surround(self, layers: Sequence[Callable[[ASGIApp], ASGIApp]]) -> None:
        """From now on requests come by all of the layers, of which the first is the innermost."""
        for layer in layers:
            self._outermost = layer(self._outermost)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._outermost(scope, receive, send)

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            schemas = super().openapi().setdefault("components", {}).setdefault("schemas", {})
            schemas.update(_schemas(ScoreRequest, Event, Problem))
        assert self.openapi_schema is not None
        return self.openapi_schema


def create_app(settings: Settings, store: Store | None = None) -> FastAPI:
    """The application; it opens files and connections only once it is started.

    `store` is the one that `settings` name unless given.
    """
    metrics = Metrics(CollectorRegistry(), settings.metrics_dir)
    registry = open_registry(settings.registry, settings.registry_cache)
    if isinstance(registry, RemoteRegistry):
        download_in_background()
    live = Live(settings, registry, metrics, WindowSource(settings, store))
    audit = _audit(settings, metrics)
    traces = open_provider() if settings.traces else None
    admission = Admission(settings.max_wait_ms / 1000, metrics)
    shadow = Shadow(live, admission, metrics)
    drain = Drain(settings.drain_s)
    control = Control(registry, live, metrics, settings.control_token)
    has_control = bool(settings.control_token) and not settings.control_port

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        ticking = None
        metrics.forget_the_dead()
        try:
            if audit is not None:
                audit.start()
            with drain.on_sigterm(registry.close):
                await live.start()
                shadow.start()
                ticking = asyncio.create_task(_tick(registry, live, metrics))
                async with _control_port(settings, control):
                    drain.serving = True
                    yield
        finally:
            if ticking is not None:
                ticking.cancel()
                await asyncio.wait([ticking])
            await shadow.stop()
            await live.stop()
            if audit is not None:
                await asyncio.to_thread(audit.close)
            if traces is not None:
                await asyncio.to_thread(traces.shutdown)
            metrics.close(os.getpid())

    app = _App(
        title="Cross-domain CTR scoring",
        description="How likely is a click, for one user and N candidate ads?",
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
    )
    errors.install(app)
    endpoints = Endpoints(settings, registry, live, metrics, admission, drain, shadow, audit)
    # Within the framework's own, which would close the connection upon a fault.
    app.add_middleware(errors.AnswerFaults)
    app.surround(
        [
            partial(Direct, handlers=endpoints.direct()),
            partial(
                BodyLimit, max_bytes=settings.max_body_bytes, timeout_s=settings.body_timeout_s
            ),
            partial(CountAnswers, metrics=metrics),
            *([partial(TraceRequests, provider=traces)] if traces else []),
            FollowRequests,
            partial(TurnAway, admission=admission, metrics=metrics),
            partial(SayGoodbye, drain=drain),
        ]
    )
    _add_endpoints(app, endpoints)
    if has_control:
        control.install(app)
    _add_docs(app)
    if settings.console:
        console.install(app, console.Console(registry, live, control=has_control))
    return app


@asynccontextmanager
async def _control_port(settings: Settings, control: Control) -> AsyncIterator[None]:
    if not (settings.control_token and settings.control_port):
        yield
        return
    async with own_port(control, CONTROL_HOST, settings.control_port):
        yield


def _audit(settings: Settings, metrics: Metrics) -> Audit | None:
    if settings.audit_dir is None:
        return None
    limit_bytes = settings.audit_mb * 1_000_000
    return Audit(settings.audit_dir, settings.audit_sample, limit_bytes, metrics.audited)


async def _tick(registry: Registry, live: Live, metrics: Metrics) -> None:
    """What is done every few seconds, and not for each request."""
    while True:
        try:
            with suppress(RegistryUnavailable):
                metrics.feedback.known = frozenset(await asyncio.to_thread(registry.ids))
            metrics.tick(live.scorer.artifact if live.scorer else None)
            await metrics.share()
        except Exception:
            log.exception("metrics could not be brought up to date; trying again")
        await asyncio.sleep(TICK_S)


def _add_endpoints(app: FastAPI, endpoints: Endpoints) -> None:
    app.post(
        "/v1/score",
        summary="Score candidates",
        response_model=ScoreResponse,
        responses={status: _problem(text) for status, text in _PROBLEMS.items()},
        openapi_extra={
            "requestBody": {"required": True, **_body("application/json", ScoreRequest)}
        },
    )(endpoints.score)
    app.post(
        "/v1/feedback",
        summary="Report clicks",
        response_model=FeedbackCounts,
        responses={status: _problem(_PROBLEMS[status]) for status in (400, 413, 415, 422)},
        openapi_extra={"requestBody": {"required": True, **_events_body()}},
    )(endpoints.feedback)
    app.get("/v1/models", summary="Which models there are", response_model=Models)(endpoints.models)
    app.get("/livez", summary="Is the process alive?")(endpoints.livez)
    app.get(
        "/readyz", summary="Can it score?", responses={503: _problem("It can't, and why not.")}
    )(endpoints.readyz)
    app.get("/metrics", include_in_schema=False)(endpoints.render_metrics)


def _add_docs(app: FastAPI) -> None:
    """Swagger UI from the installed package. Its own set-up writes the Host header into the page;
    relative addresses need none, and hold behind a proxy too."""
    folder = Path(str(files("fastapi_swagger"))) / "resources"

    async def docs() -> Response:
        return get_swagger_ui_html(
            openapi_url="openapi.json",
            title=app.title,
            swagger_js_url=f"docs/{_SWAGGER_FILES[0]}",
            swagger_css_url=f"docs/{_SWAGGER_FILES[1]}",
            swagger_favicon_url=f"docs/{_SWAGGER_FILES[2]}",
            # Null keeps it from sending the schema to a validator on the internet.
            swagger_ui_parameters={"validatorUrl": None},
        )

    app.get("/docs", include_in_schema=False)(docs)
    for name in _SWAGGER_FILES:
        app.get(f"/docs/{name}", include_in_schema=False)(_file(folder / name))


def _file(path: Path) -> Callable[[], Any]:
    async def send() -> Response:
        return FileResponse(path)

    return send


def _problem(description: str) -> dict[str, Any]:
    return {"description": description, **_body(errors.MEDIA_TYPE, Problem)}


def _body(media_type: str, model: type[BaseModel]) -> dict[str, Any]:
    return {"content": {media_type: {"schema": {"$ref": _REF.format(model=model.__name__)}}}}


def _events_body() -> dict[str, Any]:
    event = {"$ref": _REF.format(model=Event.__name__)}
    schema = {"anyOf": [event, {"type": "array", "items": event, "maxItems": MAX_EVENTS}]}
    return {"content": {"application/json": {"schema": schema}}}


_REF = "#/components/schemas/{model}"


def _schemas(*models: type[BaseModel]) -> dict[str, Any]:
    """JSON schemas of the models and of what they refer to, by name."""
    _, document = models_json_schema([(m, "validation") for m in models], ref_template=_REF)
    schemas: dict[str, Any] = document["$defs"]
    return schemas


def serve(settings: Settings, host: str, port: int, workers: int | None = None) -> None:
    """Serves until SIGTERM or SIGINT, lets running requests end, and returns.

    `workers` processes, one per processor unless given, each with its own session; they share the
    model's memory-mapped pages, and each follows the registry by itself.
    """
    if settings.traces:
        open_provider().shutdown()  # what is not installed is said here, not by each worker
    open_registry(settings.registry, settings.registry_cache)  # likewise
    workers = workers or processors()
    if workers == 1:
        _serve_one(_config(settings, host, port, workers))
        return
    with TemporaryDirectory(prefix="ecdctr-metrics-") as folder:
        # Read by prometheus_client when a worker imports it.
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
        config = _config(replace(settings, metrics_dir=Path(folder)), host, port, workers)
        # Workers are spawned, not forked: no thread or lock of this process comes along.
        with config.bind_socket() as listener:
            Multiprocess(config, [listener]).run()


def _serve_one(config: uvicorn.Config) -> None:
    # uvicorn raises the signal that ended it once more, for the handler from before.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = uvicorn.Server(config)
    server.run()
    if not server.started:
        sys.exit("the server did not start; the log says why")


def _config(settings: Settings, host: str, port: int, workers: int) -> uvicorn.Config:
    return uvicorn.Config(
        partial(create_app, settings),
        factory=True,
        host=host,
        port=port,
        workers=workers,
        loop="uvloop",
        http="httptools",
        ws="none",
        proxy_headers=False,
        lifespan="on",
        access_log=False,
        server_header=False,
        log_config=logs.config(settings.log_level, settings.log_format),
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=GRACE_S,
        timeout_worker_healthcheck=WORKER_ANSWERS_WITHIN_S,
    )
