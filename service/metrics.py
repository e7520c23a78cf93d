"""What the service counts. Every label has a bounded set of values: routes come from the templates,
features from the spec, reasons from tables, models from promotions."""

from __future__ import annotations

import asyncio
import os
from collections import defaultdict
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

import numpy as np
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from starlette.types import ASGIApp, Receive, Scope, Send

from bundle.artifact import Artifact
from bundle.reference import EDGES
from bundle.registry import Role
from embeddings_store.cache import CachedReader
from service import drift, feedback
from service.answers import Watched, route_of
from service.drift import Drift
from service.feedback import Feedback, Outcome
from service.graphs import Scores
from service.recent import Recent
from service.scorer import Scored
from service.tally import Tally, observe_all
from service.windowed import Windowed

CONTENT_TYPE = CONTENT_TYPE_LATEST
STAGES = ("receive", "queue", "decode", "encode", "lookup", "run", "serialise", "total")
_SECONDS = (
    *(0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0),
)
MOST_WAITING = 256
"""Requests whose numbers are handed on together: a pause of less than a millisecond."""
_DOES: Mapping[Role, str] = {"canary": "score a share of the users", "shadow": "score again"}
_LOGITS = (0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
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
        self.in_progress = 0
        """Scoring requests that are read, wait or are scored, in this process."""
        self._in_progress = Gauge(
            "ecdctr_score_requests_in_progress",
            "Scoring requests that have begun and are not yet answered.",
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.shed = Counter(
            "ecdctr_shed",
            "Requests that were not begun, by reason (wait, deadline, expired, gone).",
            ["reason"],
            registry=registry,
        )
        self._beside = {
            role: Gauge(
                f"ecdctr_{role}_model",
                f"Processes that {does} with this model (0: no longer).",
                ["model", "window"],
                registry=registry,
                multiprocess_mode="livesum",
            )
            for role, does in _DOES.items()
        }
        self.shadowed = Counter(
            "ecdctr_shadow_requests",
            "Requests of the shadow's share, by outcome (scored, dropped, failed).",
            ["outcome"],
            registry=registry,
        )
        self._shadow_clicks = Counter(
            "ecdctr_shadow_predicted_clicks",
            "Sum of all scores of requests scored again, by who gave them (live, shadow).",
            ["by"],
            registry=registry,
        )
        self._shadow_same_first = Counter(
            "ecdctr_shadow_same_first",
            "Requests scored again whose best candidate is the same.",
            registry=registry,
        )
        self._shadow_difference = Histogram(
            "ecdctr_shadow_logit_difference",
            "Mean absolute difference of the logits of a request's candidates.",
            buckets=_LOGITS,
            registry=registry,
        )
        self._scored = Counter(
            "ecdctr_scored_requests",
            "Requests that were answered with scores, by the model that gave them.",
            ["model"],
            registry=registry,
        )
        self.control = Counter(
            "ecdctr_control",
            "Control over HTTP, by action (promote, rollback) and outcome.",
            ["action", "outcome"],
            registry=registry,
        )
        self._created = Gauge(
            "ecdctr_model_created_timestamp_seconds",
            "When the live bundle was made; 0 before there is one.",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        self._asof = Gauge(
            "ecdctr_model_asof_timestamp_seconds",
            "The day that the live bundle is for, at 0:00 UTC; 0 before there is one.",
            registry=registry,
            multiprocess_mode="livemostrecent",
        )
        scores = Counter(
            "ecdctr_scores",
            "Scores above the bin before, and up to this one.",
            ["up_to"],
            registry=registry,
        )
        self._scores = [scores.labels(f"{edge:g}") for edge in EDGES]
        self._predicted = Counter(
            "ecdctr_predicted_clicks", "Sum of all scores.", registry=registry
        )
        self._feedback = Counter(
            "ecdctr_feedback",
            "Events of feedback, by outcome (counted, duplicate, unknown_model).",
            ["outcome"],
            registry=registry,
        )
        self._audit = Counter(
            "ecdctr_audit",
            "Requests chosen for the audit log, by outcome (written, dropped).",
            ["outcome"],
            registry=registry,
        )
        self._recent = (
            Recent("drift", drift.WINDOW_S, drift.SLICE_S, shared),
            Recent("feedback", feedback.WINDOW_S, feedback.SLICE_S, shared),
        )
        self.drift = Drift(self._recent[0])
        self.feedback = Feedback(self._recent[1], shared)
        self._tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self._windowed = Windowed(self.drift, self.feedback)
        registry.register(self._windowed)

    def scored(self, scored: Scored, seconds: Mapping[str, float]) -> None:
        """Counts one scoring request that was answered with scores; to be seen from the next `tick`
        on, or after `MOST_WAITING` requests."""
        tally = self._tallies[scored.model]
        tally.add(scored, seconds)
        if len(tally.seconds) >= MOST_WAITING:
            self._hand_on()

    def reported(self, outcomes: Mapping[Outcome, int]) -> None:
        """Counts events of feedback."""
        for outcome, num in outcomes.items():
            self._feedback.labels(outcome).inc(num)

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
        self.feedback.known |= {model}
        if replaced:
            self._live.labels(*replaced).set(0)
        self._live.labels(model, window).set(1)

    def beside(
        self, role: Role, started: tuple[str, str] | None, *, replaced: tuple[str, str] | None
    ) -> None:
        """Notes which (model, window) has the role from now on, and which no longer has."""
        if replaced:
            self._beside[role].labels(*replaced).set(0)
        if started:
            self.feedback.known |= {started[0]}
            self._beside[role].labels(*started).set(1)

    def scored_again(self, live: Scores, shadow: Scores) -> None:
        """Counts one request with N > 0 candidates that the shadow scored too: float32 [N] each."""
        self.shadowed.labels("scored").inc()
        self._shadow_clicks.labels("live").inc(float(live.sum()))
        self._shadow_clicks.labels("shadow").inc(float(shadow.sum()))
        self._shadow_same_first.inc(int(live.argmax() == shadow.argmax()))
        self._shadow_difference.observe(float(np.abs(_logits(live) - _logits(shadow)).mean()))

    def audited(self, outcome: str) -> None:
        """Counts a request that was chosen for the audit log."""
        self._audit.labels(outcome).inc()

    def tick(self, artifact: Artifact | None) -> None:
        """For every few seconds: what is not worth doing for each request. `artifact` is that of
        the live bundle."""
        self._in_progress.set(self.in_progress)
        if artifact is not None:
            self.drift.follow(artifact)
            self._created.set(_timestamp_s(artifact.manifest.created))
            self._asof.set(_timestamp_s(artifact.manifest.asof))
        self._hand_on()
        for recent in self._recent:
            recent.tick()

    async def share(self) -> None:
        """Lets the other processes know what this one has counted in the last minutes."""
        if self._shared is not None:
            for recent in self._recent:
                await asyncio.to_thread(recent.share, recent.content())

    def render(self) -> bytes:
        """Everything in the text format, summed over processes where there are several."""
        if self._shared is None:
            return generate_latest(self._registry)
        merged = CollectorRegistry()
        MultiProcessCollector(merged, path=str(self._shared))  # type: ignore[no-untyped-call]
        merged.register(self._windowed)
        return generate_latest(merged)

    def forget_the_dead(self) -> None:
        """What processes served that were killed, and so could not say that they end. A worker that
        takes the place of one does this when it starts."""
        if self._shared is None:
            return
        pids = {int(path.stem.rpartition("_")[2]) for path in self._shared.glob("*_[0-9]*.db")}
        for pid in pids:
            if not _is_alive(pid):
                mark_process_dead(pid, path=str(self._shared))  # type: ignore[no-untyped-call]

    def close(self, pid: int) -> None:
        """The process `pid` ends: what it served live is no longer live."""
        self._hand_on()
        for recent in self._recent:
            recent.close()
        if self._shared is not None:
            mark_process_dead(pid, path=str(self._shared))  # type: ignore[no-untyped-call]

    def _hand_on(self) -> None:
        """What requests have added since the last time."""
        tallies = dict(self._tallies)
        self._tallies.clear()
        for model, tally in tallies.items():
            for stage, histogram in self._stages.items():
                observe_all(histogram, [s[stage] for s in tally.seconds if stage in s])
            observe_all(self._candidates, tally.num_candidates)
            for counter, num in zip(self._scores, tally.scores.tolist(), strict=True):
                counter.inc(num)
            self._predicted.inc(tally.sum_scores)
            self._scored.labels(model).inc(len(tally.seconds))
            for feature, num in tally.missing.items():
                self._missing.labels(feature).inc(num)
            for (what, reason), num in tally.degraded.items():
                self._degraded.labels(what, reason).inc(num)
            self._invalid.inc(tally.num_invalid)
            self.drift.add(model, tally)


def _logits(scores: Scores) -> Scores:
    inside = scores.clip(1e-7, 1 - 1e-6)
    logits: Scores = np.log(inside / (1 - inside))
    return logits


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _timestamp_s(text: str) -> float:
    """Seconds since 1970 of an ISO 8601 date or time, in UTC unless it names a zone; not a number
    for anything else."""
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        return float("nan")
    return (at if at.tzinfo else at.replace(tzinfo=UTC)).timestamp()


class CountAnswers:
    """ASGI middleware that counts every answer by route template, never by path."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._counter = cache(metrics.requests.labels)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        watched = Watched(send)
        try:
            await self._app(scope, receive, watched)
        finally:
            # An exception becomes a 500 further out.
            self._counter(route_of(scope), watched.status or 500).inc()
