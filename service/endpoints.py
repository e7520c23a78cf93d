"""What each path does. `app` says which path that is and how it is documented."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import orjson
from starlette.requests import Request
from starlette.responses import Response

from bundle.encode import FeatureError
from bundle.registry import Registry
from service.admission import PATHS, Admission, Admitted
from service.answers import json_answer
from service.audit import Audit
from service.background import answer_of
from service.body import check_json
from service.decode import decode, decode_events, validated
from service.direct import Handler
from service.errors import ImpossibleScoreError, NotReadyError
from service.live import Live
from service.logs import facts, trail
from service.metrics import CONTENT_TYPE, Metrics
from service.schemas import LiveModel, Models, RefusedModel, ScoreRequest
from service.scorer import Deadline, Scored, Stages
from service.settings import Settings
from service.shadow import Shadow
from service.shutdown import Drain

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Endpoints:
    """The handlers, and what they share."""

    settings: Settings
    registry: Registry
    live: Live
    metrics: Metrics
    admission: Admission
    drain: Drain
    shadow: Shadow
    audit: Audit | None = None

    def direct(self) -> Mapping[str, Handler]:
        """By path, those that are POSTed to for each page."""
        return dict(zip(PATHS, (self.score, self.feedback), strict=True))

    async def score(self, request: Request) -> Response:
        """Click probabilities of N candidates for one user, in the order of the candidates."""
        self.metrics.in_progress += 1
        try:
            check_json(request.scope)
            body = await request.body()
            async with self.admission.turn(request, body) as admitted:
                return await self._score(body, admitted)
        finally:
            self.metrics.in_progress -= 1

    async def feedback(self, request: Request) -> Response:
        """Takes events, each with its score and its model, and says how many were counted."""
        check_json(request.scope)
        body = await request.body()
        async with self.admission.turn(request, body):
            outcomes = self.metrics.feedback.take(decode_events(body))
            self.metrics.reported(outcomes)
            return json_answer(outcomes)

    async def _score(self, body: bytes, admitted: Admitted) -> Response:
        started_s = admitted.arrived_s
        stages = Stages()
        own = trail()
        own.stages = stages.seconds
        stages.seconds["receive"] = admitted.received_s - started_s
        stages.seconds["queue"] = admitted.begun_s - admitted.received_s
        with stages.timed("decode"):
            asked = decode(body, self.settings)
        own.request_id = asked.request_id or own.request_id
        deadline = Deadline.after(started_s, asked.deadline_ms)
        try:
            scored = await self._scored(asked, deadline, stages)
        except FeatureError:
            # With the values as they were sent, so that the error names these and not an array's.
            scored = await self._scored(validated(body), deadline, stages)
        with stages.timed("serialise"):
            content = _content(scored, asked.request_id)
        stages.seconds["total"] = time.perf_counter() - started_s
        self.metrics.scored(scored, stages.seconds)
        own.facts = {"model": scored.model, "candidates": len(scored.scores)}
        if stages.seconds["total"] * 1000 > self.settings.slow_ms:
            self._note_slow(asked, scored, stages)
        self.shadow.offer(asked, scored)
        if self.audit is not None:
            self.audit.offer(own.request_id, body, scored)
        return Response(content, media_type="application/json", headers=_timing(stages))

    async def models(self) -> Response:
        """The live bundle, the last refusals, and all bundles in the registry."""
        available = await answer_of(self.registry.ids)
        refusals = [RefusedModel(**asdict(refusal)) for refusal in self.live.refusals]
        models = Models(live=self._live_model(), refusals=refusals, available=available)
        return json_answer(models.model_dump())

    async def livez(self) -> Response:
        """The process answers. Nothing is looked at, so nothing can make it slow or fail."""
        return json_answer({"status": "alive"})

    async def readyz(self) -> Response:
        """A bundle is live, so requests can be scored; 503 and the reason otherwise."""
        if reason := self.drain.why_not_ready() or self.live.why_not_ready():
            raise NotReadyError(reason)
        return json_answer({"status": "ready"})

    async def render_metrics(self) -> Response:
        """Metrics in Prometheus' text format."""
        self.metrics.tick(self.live.scorer.artifact if self.live.scorer else None)
        return Response(self.metrics.render(), headers={"content-type": CONTENT_TYPE})

    async def _scored(self, asked: ScoreRequest, deadline: Deadline, stages: Stages) -> Scored:
        try:
            with self.live.use(asked.user.id) as scorer:
                return await scorer.score(asked.to_encode(), deadline, stages)
        except ImpossibleScoreError as error:
            self.metrics.impossible.inc()
            log.error("request %r: %s", asked.request_id, error)
            raise

    def _note_slow(self, asked: ScoreRequest, scored: Scored, stages: Stages) -> None:
        stage_ms = {stage: round(value * 1000, 3) for stage, value in stages.seconds.items()}
        named = random.random() < self.settings.log_user_sample
        user = {"user": asked.user.id} if named else {}
        slow = facts(**trail().facts, degraded=scored.degraded, stage_ms=stage_ms, **user)
        log.warning("slow request", extra=slow)

    def _live_model(self) -> LiveModel | None:
        if self.live.scorer is None:
            return None
        manifest = self.live.scorer.artifact.manifest
        return LiveModel(
            id=manifest.id,
            asof=manifest.asof,
            created=manifest.created,
            since=self.live.since,
            dataset=manifest.dataset,
            window=asdict(manifest.window),
            lineage=asdict(manifest.lineage),
            metrics=manifest.metrics,
        )


def _content(scored: Scored, request_id: str | None) -> bytes:
    """A `ScoreResponse` as JSON. Not through pydantic: the scores are an array already."""
    answer = {
        "model": scored.model,
        "scores": scored.scores,
        "degraded": [{"what": what, "reason": why} for what, why in scored.degraded.items()],
        "missing": scored.missing,
        "request_id": request_id,
    }
    return orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)


def _timing(stages: Stages) -> dict[str, str]:
    """Milliseconds per stage, as browsers and proxies read them."""
    entries = (f"{stage};dur={seconds * 1000:.3f}" for stage, seconds in stages.seconds.items())
    return {"server-timing": ", ".join(entries)}
