"""One loaded bundle: encodes a request, looks its windows up, runs the model.

Everything that a score depends on (feature spec, item table, model, window) hangs on one object,
and a request keeps the object that it began with: so no score ever mixes two bundles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from bundle.artifact import Artifact
from bundle.encode import Arrays, Encoded, Request
from bundle.parts import ItemParts, Places
from embeddings_store import (
    Reader,
    RequestWindows,
    StoreBusy,
    StoreClosed,
    StoreCorrupt,
    StoreError,
    StoreRejected,
    StoreTimeout,
    StoreUnavailable,
    WindowNotFound,
    Windows,
    all_absent,
    all_failed,
)
from service.errors import DeadlineExceededError
from service.graphs import Graphs, Scores

REASONS: Mapping[type[StoreError], str] = {
    StoreTimeout: "timeout",
    StoreUnavailable: "unavailable",
    StoreBusy: "busy",
    StoreRejected: "rejected",
    StoreClosed: "closed",
    StoreCorrupt: "corrupt",
    WindowNotFound: "window_not_found",
}
"""Why windows are absent, by the store's error; what is not listed is "store_error"."""


@dataclass(frozen=True)
class Deadline:
    """When the caller stops waiting, as `time.perf_counter` counts; infinity when it never said."""

    at_s: float = math.inf

    @classmethod
    def after(cls, started_s: float, budget_ms: float | None) -> Deadline:
        return cls() if budget_ms is None else cls(started_s + budget_ms / 1000)

    def remaining_ms(self) -> float:
        """Milliseconds that are left, above 0.

        Raises:
            DeadlineExceededError: none are left, so whatever would be computed now is not wanted.
        """
        left_ms = (self.at_s - time.perf_counter()) * 1000
        if left_ms <= 0:
            raise DeadlineExceededError(
                "the request's deadline_ms passed before its scores were there"
            )
        return left_ms


@dataclass
class Stages:
    """How long each stage of one request took, in seconds, in the order in which they began."""

    seconds: dict[str, float] = field(default_factory=dict)

    def timed(self, stage: str) -> _Timed:
        """For `with`, whose block is the stage, also where it fails."""
        return _Timed(self.seconds, stage)


class _Timed:
    """A class, since a generator for each stage of each request takes twice as long."""

    __slots__ = ("_seconds", "_stage", "_started_s")

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds, self._stage = seconds, stage

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._seconds[self._stage] = time.perf_counter() - self._started_s


@dataclass(frozen=True)
class Scored:
    """scores: float32 [N], in the order asked. missing: see `bundle.encode.Encoded`, and
    "user_window" (1) and "item_windows" (of N) for those that the store knows nothing of.
    degraded: why an input is absent, wholly or in part, though it may exist, by input; and under
    "store" why windows are those of the second line, which are as good."""

    model: str
    scores: Scores
    degraded: dict[str, str]
    missing: dict[str, int]
    num_invalid: int = 0
    """Vectors in the store that held a NaN or an infinity, and count as absent."""


class Scorer:
    """One bundle with its sessions, which it owns, and a reader, which is lent to it."""

    def __init__(
        self, artifact: Artifact, graphs: Graphs, reader: Reader, store_deadline_ms: float
    ) -> None:
        self.artifact = artifact
        self.in_flight = 0
        self._graphs = graphs
        encoder = artifact.encoder
        self._parts = ItemParts(encoder, artifact.parts, graphs.item_parts)
        self._computed = ItemParts(encoder, None, graphs.item_parts)
        self.reader = reader
        self._store_deadline_ms = store_deadline_ms

    @property
    def id(self) -> str:
        return self.artifact.manifest.id

    @contextmanager
    def in_use(self) -> Iterator[Scorer]:
        """Counted in `in_flight`, also when the request fails or is cancelled."""
        self.in_flight += 1
        try:
            yield self
        finally:
            self.in_flight -= 1

    async def score(self, request: Request, deadline: Deadline, stages: Stages) -> Scored:
        """Scores one request; a store that fails costs the windows, not the answer.

        Raises:
            FeatureError: a value can't be encoded.
            DeadlineExceededError: checked before each stage that costs something.
            ImpossibleScoreError: see `Graphs.scores`.
        """
        deadline.remaining_ms()
        with stages.timed("encode"):
            encoded = self.artifact.encoder.request(request)
        if not len(encoded.item_keys):
            return Scored(self.id, np.zeros(0, np.float32), {}, encoded.missing)
        lacking = self._parts.lacking(encoded)
        with stages.timed("lookup"):
            windows, degraded = await self._look_up(encoded, lacking, deadline)
        deadline.remaining_ms()
        with stages.timed("run"):
            part = self._parts.of(encoded, lacking, item_inputs(windows.items))
            scores = self._graphs.scores(
                {**encoded.inputs, **user_inputs(windows.user), "item_part": part}
            )
        missing = {**encoded.missing, **_missing_windows(windows, part)}
        num_invalid = windows.user.num_invalid + windows.items.num_invalid
        return Scored(self.id, scores, degraded, missing, num_invalid)

    def score_now(
        self, request: Request, windows: RequestWindows, *, from_table: bool = True
    ) -> Scores:
        """Scores float32 [N] with given windows, of all candidates; `from_table` is False to
        compute the parts of all items. For checks.

        Raises:
            FeatureError: a value can't be encoded.
            ImpossibleScoreError: not one finite number in 0 .. 1 per candidate.
        """
        encoded = self.artifact.encoder.request(request)
        parts = self._parts if from_table else self._computed
        lacking = parts.lacking(encoded)
        items = Windows(windows.items.vectors[lacking], windows.items.present[lacking])
        part = parts.of(encoded, lacking, item_inputs(items))
        return self._graphs.scores(
            {**encoded.inputs, **user_inputs(windows.user), "item_part": part}
        )

    def release(self) -> None:
        """Frees the sessions and their models; takes a while, so not on the event loop."""
        self._graphs.release()

    async def _look_up(
        self, encoded: Encoded, lacking: Places, deadline: Deadline
    ) -> tuple[RequestWindows, dict[str, str]]:
        """Windows of the user, and of the candidates whose parts are lacking; absent where the
        store failed, and why: see `Scored.degraded`."""
        # Half of what is left: scores without windows in time are worth more than a 504.
        budget_ms = min(self._store_deadline_ms, deadline.remaining_ms() / 2)
        try:
            if len(lacking):
                user_id = int(encoded.user_key[0])
                keys = encoded.item_keys[lacking]
                found = await self.reader.lookup_request(user_id, keys, deadline_ms=budget_ms)
            else:
                user = await self.reader.lookup("users", encoded.user_key, deadline_ms=budget_ms)
                found = RequestWindows(user, all_absent(0, self.reader.dim))
        except StoreError as error:
            num, dim = len(lacking), self.reader.dim
            found = RequestWindows(all_failed(1, dim, error), all_failed(num, dim, error))
        return found, _degraded(found)


def absent_windows(num_items: int, dim: int) -> RequestWindows:
    """Windows of one user and `num_items` items of which the store gave nothing."""
    return RequestWindows(all_absent(1, dim), all_absent(num_items, dim))


def _degraded(windows: RequestWindows) -> dict[str, str]:
    """Why windows are absent, by input, and under "store" why those of a second line are used."""
    items = windows.items.failure
    errors = {
        "user_window": windows.user.failure and windows.user.failure.error,
        "item_windows": items.error if items and len(items.rows) else None,
        "store": windows.user.second_line or windows.items.second_line,
    }
    return {
        what: REASONS.get(type(error), "store_error") for what, error in errors.items() if error
    }


def user_inputs(user: Windows) -> Arrays:
    """user_window float32 [1, 3, D + 1] and user_window_present bool [1, 3] for the graph."""
    return {"user_window": user.vectors, "user_window_present": user.present}


def item_inputs(items: Windows) -> Arrays:
    """item_window float32 [m, 3, D + 1] and item_window_present bool [m, 3] for the item graph."""
    return {"item_window": items.vectors, "item_window_present": items.present}


def _missing_windows(windows: RequestWindows, part: Scores) -> dict[str, int]:
    """How many windows have no month at all in the store, by input; of those that it answered."""
    num_failed = int(windows.items.failure.rows.sum()) if windows.items.failure else 0
    absent = {
        "user_window": int(not windows.user.present.any() and not windows.user.failure),
        "item_windows": int((part[:, -1] == 0).sum()) - num_failed,
    }
    return {name: num for name, num in absent.items() if num}
