"""OpenTelemetry spans of scoring requests and their stages; only with the extra [otel], and only
where they are asked for. Where they go is up to the standard OTEL_* variables."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from service.answers import Watched, route_of
from service.logs import trail
from service.settings import SettingsError

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import Span, Tracer

SERVICE_NAME = "ecdctr"


def open_provider() -> TracerProvider:
    """One that sends over OTLP/HTTP, in a thread and in batches, to OTEL_EXPORTER_OTLP_ENDPOINT.

    Raises:
        SettingsError: the libraries are not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"ECDCTR_TRACES=1 needs {error.name}; run: pip install 'ecdctr[otel]'"
        ) from error
    resource = Resource.create()
    if str(resource.attributes.get("service.name", "")).startswith("unknown_service"):
        resource = resource.merge(Resource({"service.name": SERVICE_NAME}))
    # Its own handler would run in each worker when the interpreter ends; the application closes it.
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return provider


class TraceRequests:
    """ASGI middleware: a span for each request, the caller's as its parent (W3C traceparent), and a
    span for each stage. Stages follow each other, so they are laid end to end once they are
    known; the microseconds between them go to the last."""

    def __init__(self, app: ASGIApp, provider: TracerProvider) -> None:
        self._app = app
        self._tracer: Tracer = provider.get_tracer("ecdctr.service")

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            await self._app(scope, receive, send)
            return
        started_ns = time.time_ns()
        span = self._begin(scope, started_ns)
        watched = Watched(send)
        try:
            await self._app(scope, receive, watched)
        finally:
            self._stages(span, started_ns)
            # An exception becomes a 500 further out.
            self._end(span, scope["method"], route_of(scope), watched.status or 500)

    def _begin(self, scope: Scope, started_ns: int) -> Span:
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        parent = TraceContextTextMapPropagator().extract(dict(Headers(scope=scope)))
        return self._tracer.start_span(
            "request", parent, kind=SpanKind.SERVER, start_time=started_ns
        )

    def _stages(self, parent: Span, started_ns: int) -> None:
        from opentelemetry.trace import set_span_in_context

        context = set_span_in_context(parent)
        for stage, seconds in trail().stages.items():
            if stage != "total":
                span = self._tracer.start_span(stage, context, start_time=started_ns)
                started_ns += int(seconds * 1e9)
                span.end(started_ns)

    def _end(self, span: Span, method: str, route: str, status: int) -> None:
        from opentelemetry.trace import StatusCode

        span.update_name(f"{method} {route}")
        own = trail()
        span.set_attribute("http.route", route)
        span.set_attribute("http.response.status_code", status)
        span.set_attribute("ecdctr.request_id", own.request_id)
        for fact, value in own.facts.items():
            span.set_attribute(f"ecdctr.{fact}", value if isinstance(value, int) else str(value))
        if status >= 500:
            span.set_status(StatusCode.ERROR)
        span.end()
