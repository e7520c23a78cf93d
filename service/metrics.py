"""What the service counts. Every label has a bounded set of values: routes come from the templates,
features from the spec, reasons from tables, models from promotions."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from embeddings_store.cache import CachedReader
from service.scorer import Scored

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("receive", "decode", "encode", "lookup", "run", "serialise", "total")
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
_CANDIDATES = (0, 1, 10, 50, 100, 200, 500, 1000, 2000, 5000)


class Metrics:
    """The service's metrics, in a registry of their own."""

    def __init__(self, registry: CollectorRegistry, shared: Path | None = None) -> None:
        """`shared` is the folder in which several processes share their values, if they do."""
        self._registry, self._shared = registry, shared
        self.requests = Counter(
            "ecdctr_requests",
            "Answers, by route template and status.",
            ["route", "status"],
            registry=registry,
        )
        seconds = Histogram(
            "ecdctr_stage_seconds",
            "Time per stage of a scoring request that was answered with scores.",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._stages = {stage: seconds.labels(stage) for stage in STAGES}
        self._candidates = Histogram(
            "ecdctr_candidates",
            "Candidates per scoring request.",
            buckets=_CANDIDATES,
            registry=registry,
        )
        self._degraded = Counter(
            "ecdctr_degraded",
            "Requests that were scored without an input, by input and reason.",
            ["what", "reason"],
            registry=registry,
        )
        self._missing = Counter(
            "ecdctr_missing",
            "Values that were absent or unknown, by feature.",
            ["feature"],
            registry=registry,
        )
        self._invalid = Counter(
            "ecdctr_invalid_vectors",
            "Vectors in the store that are not finite, and count as absent.",
            registry=registry,
        )
        self._cache_rows = Counter(
            "ecdctr_item_cache_rows",
            "Items that were asked for, by whether the cache held them (hit, miss).",
            ["result"],
            registry=registry,
        )
        self._cache_evictions = Counter(
            "ecdctr_item_cache_evictions",
            "Items that displaced each other in the cache while still valid.",
            registry=registry,
        )
        self._cache_bytes = Gauge(
            "ecdctr_item_cache_bytes",
            "Bytes of the items that the cache holds.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.impossible = Counter(
            "ecdctr_impossible_scores",
            "Requests for which the live model gave something that is no probability.",
            registry=registry,
        )
        self.swaps = Counter("ecdctr_swaps", "Bundles that went live.", registry=registry)
        self.refusals = Counter(
            "ecdctr_refusals",
            "Attempts to load a bundle that failed, by kind of reason.",
            ["kind"],
            registry=registry,
        )
        self._live = Gauge(
            "ecdctr_live_model",
            "Processes that serve this model (0: it was replaced).",
            ["model", "window"],
            registry=registry,
            multiprocess_mode="livesum",
        )

    def scored(self, scored: Scored, seconds: Iterable[tuple[str, float]]) -> None:
        """Counts one scoring request that was answered with scores."""
        for stage, value in seconds:
            self._stages[stage].observe(value)
        self._candidates.observe(len(scored.scores))
        for what, reason in scored.degraded.items():
            self._degraded.labels(what, reason).inc()
        for feature, num in scored.missing.items():
            self._missing.labels(feature).inc(num)
        if scored.num_invalid:
            self._invalid.inc(scored.num_invalid)

    def cached(self, cache: CachedReader) -> None:
        """Takes over what the cache has counted."""
        counts = cache.take_counts()
        self._cache_rows.labels("hit").inc(counts.hits)
        self._cache_rows.labels("miss").inc(counts.misses)
        self._cache_evictions.inc(counts.evictions)
        self._cache_bytes.set(cache.size_bytes)

    def live(self, model: str, window: str, *, replaced: tuple[str, str] | None) -> None:
        """Notes which model is live from now on, and which (model, window) no longer is."""
        self.swaps.inc()
        if replaced:
            self._live.labels(*replaced).set(0)
        self._live.labels(model, window).set(1)

    def render(self) -> bytes:
        """Everything in the text format, summed over processes where there are several."""
        if self._shared is None:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged, path=str(self._shared))  # type: ignore[no-untyped-call]
        return generate_latest(merged)

    def close(self, pid: int) -> None:
        """The process `pid` ends: what it served live is no longer live."""
        if self._shared is not None:
            mark_process_dead(pid, path=str(self._shared))  # type: ignore[no-untyped-call]


class CountAnswers:
    """ASGI middleware that counts every answer by route template, never by path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what an exception becomes further out

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._metrics.requests.labels(route, status).inc()
