"""Scores again, with a second bundle, what was answered: to see how it would do, at nobody's cost.

It is done when nothing else is to be done: no answer waits for it, but for a request that comes
just while one is scored again. Where requests leave no time, they are not scored again.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque

from service.admission import Admission
from service.graphs import Scores
from service.live import Live
from service.metrics import Metrics
from service.schemas import ScoreRequest
from service.scorer import Deadline, Scored, Stages

log = logging.getLogger(__name__)

MOST_WAITING = 64
"""Requests; beyond that, and so under load, they are dropped."""
_PAUSE_S = 0.001
"""Between two looks for a moment in which nothing else is to be done, the answer being away."""


class Shadow:
    """The requests that wait to be scored again. For the event loop."""

    def __init__(self, live: Live, admission: Admission, metrics: Metrics) -> None:
        self._live, self._admission, self._metrics = live, admission, metrics
        self._waiting: deque[tuple[ScoreRequest, Scores]] = deque()
        self._offered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def offer(self, asked: ScoreRequest, scored: Scored) -> None:
        """Has a request that was answered scored again, if its user is in the shadow's share."""
        with self._live.use_shadow(asked.user.id) as scorer:
            if scorer is None or not len(scored.scores):
                return
        if len(self._waiting) >= MOST_WAITING:
            self._metrics.shadowed.labels("dropped").inc()
            return
        self._waiting.append((asked, scored.scores))
        self._offered.set()

    async def _run(self) -> None:
        while True:
            await self._offered.wait()
            self._offered.clear()
            while self._waiting:
                await asyncio.sleep(_PAUSE_S)
                while not self._admission.is_idle():
                    await asyncio.sleep(_PAUSE_S)
                await self._score(*self._waiting.popleft())

    async def _score(self, asked: ScoreRequest, scores: Scores) -> None:
        with self._live.use_shadow(asked.user.id) as scorer:
            if scorer is None:
                return
            try:
                again = await scorer.score(asked.to_encode(), Deadline(), Stages())
            except Exception as error:  # whatever it is, nobody's answer depends on it
                self._metrics.shadowed.labels("failed").inc()
                log.warning("the shadow %s failed: %s", scorer.id, error)
                return
        self._metrics.scored_again(scores, again.scores)
