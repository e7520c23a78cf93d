"""One loaded bundle: encodes a request, looks its windows up, runs the model.

Everything that a score depends on (feature spec, item table, model, window) hangs on one object,
and a request keeps the object that it began with: so no score ever mixes two bundles.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from bundle.artifact import Artifact
from bundle.encode import Arrays, Encoded, Request
from embeddings_store import (
    Failure,
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
)
from service.errors import DeadlineExceededError, ImpossibleScoreError

Scores = npt.NDArray[np.float32]
OUTPUT = "score"
NUM_MONTHS = 3

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

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started_s = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = time.perf_counter() - started_s


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
    """One bundle with its session and its reader, both of which it owns."""

    def __init__(
        self,
        artifact: Artifact,
        session: ort.InferenceSession,
        reader: Reader,
        store_deadline_ms: float,
    ) -> None:
        self.artifact = artifact
        self.in_flight = 0
        self._session: ort.InferenceSession | None = session
        self.reader = reader
        self._store_deadline_ms = store_deadline_ms
        self._inputs = [tensor.name for tensor in artifact.manifest.inputs]

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
            ImpossibleScoreError: see `run`.
        """
        deadline.remaining_ms()
        with stages.timed("encode"):
            encoded = self.artifact.encoder.request(request)
        if not len(encoded.item_keys):
            return Scored(self.id, np.zeros(0, np.float32), {}, encoded.missing)
        with stages.timed("lookup"):
            windows, degraded = await self._look_up(encoded, deadline)
        deadline.remaining_ms()
        with stages.timed("run"):
            scores = self.run({**encoded.inputs, **window_inputs(windows)})
        missing = {**encoded.missing, **_missing_windows(windows)}
        num_invalid = windows.user.num_invalid + windows.items.num_invalid
        return Scored(self.id, scores, degraded, missing, num_invalid)

    def run(self, inputs: Arrays) -> Scores:
        """The model's scores float32 [N] for the arrays of `Encoded.inputs` and the four windows.

        Raises:
            ImpossibleScoreError: not one finite number in 0 .. 1 per candidate.
        """
        assert self._session is not None, "a released scorer was used"
        feed = {name: inputs[name] for name in self._inputs}
        (scores,) = self._session.run([OUTPUT], feed)
        expected = inputs["item_key"].shape
        # Comparisons are false for NaN, so this refuses NaN and infinities too.
        if scores.shape != expected or not ((scores >= 0) & (scores <= 1)).all():
            raise ImpossibleScoreError(
                f"{self.id}: scores outside 0 .. 1, or not one per candidate"
            )
        result: Scores = scores
        return result

    async def close(self) -> None:
        """Closes the reader; nothing may be in flight."""
        await self.reader.close()

    def release(self) -> None:
        """Frees the session and its model; takes a while, so not on the event loop."""
        self._session = None

    async def _look_up(
        self, encoded: Encoded, deadline: Deadline
    ) -> tuple[RequestWindows, dict[str, str]]:
        """The windows, absent where the store failed, and why: see `Scored.degraded`."""
        # Half of what is left: scores without windows in time are worth more than a 504.
        budget_ms = min(self._store_deadline_ms, deadline.remaining_ms() / 2)
        try:
            user_id = int(encoded.user_key[0])
            found = await self.reader.lookup_request(
                user_id, encoded.item_keys, deadline_ms=budget_ms
            )
        except StoreError as error:
            found = _failed(len(encoded.item_keys), self.reader.dim, error)
        return found, _degraded(found)


def open_session(path: Path) -> ort.InferenceSession:
    """A session over the model at `path`; its external data stays on disk, memory-mapped.

    onnxruntime itself refuses external data outside the model's folder, and links out of it.
    """
    options = ort.SessionOptions()
    # More than one thread costs a small model more in hand-overs than it gains, and threads that
    # spin while they wait take the processor from everything else.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Denormals make some inputs many times slower. The calling thread flushes them from now on.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def absent_windows(num_items: int, dim: int) -> RequestWindows:
    """Windows of one user and `num_items` items of which the store gave nothing."""
    return RequestWindows(_absent(1, dim), _absent(num_items, dim))


def _failed(num_items: int, dim: int, error: StoreError) -> RequestWindows:
    absent = absent_windows(num_items, dim)
    return RequestWindows(
        *(
            replace(part, failure=Failure(error, np.ones(len(part.present), np.bool_)))
            for part in (absent.user, absent.items)
        )
    )


def _degraded(windows: RequestWindows) -> dict[str, str]:
    """Why windows are absent, by input, and under "store" why those of a second line are used."""
    errors = {
        "user_window": windows.user.failure and windows.user.failure.error,
        "item_windows": windows.items.failure and windows.items.failure.error,
        "store": windows.user.second_line or windows.items.second_line,
    }
    return {
        what: REASONS.get(type(error), "store_error") for what, error in errors.items() if error
    }


def _absent(num: int, dim: int) -> Windows:
    vectors = np.zeros((num, NUM_MONTHS, dim + 1), np.float32)
    return Windows(vectors, np.zeros((num, NUM_MONTHS), np.bool_))


def window_inputs(windows: RequestWindows) -> Arrays:
    """The graph's inputs: user_window float32 [1, 3, D + 1], user_window_present bool [1, 3],
    item_window float32 [N, 3, D + 1], item_window_present bool [N, 3]."""
    return {
        "user_window": windows.user.vectors,
        "user_window_present": windows.user.present,
        "item_window": windows.items.vectors,
        "item_window_present": windows.items.present,
    }


def _missing_windows(windows: RequestWindows) -> dict[str, int]:
    """How many windows have no month at all in the store, by input; of those that it answered."""
    absent = {
        "user_window": _num_absent(windows.user),
        "item_windows": _num_absent(windows.items),
    }
    return {name: num for name, num in absent.items() if num}


def _num_absent(windows: Windows) -> int:
    absent = ~windows.present.any(axis=1)
    if windows.failure:
        absent &= ~windows.failure.rows
    return int(absent.sum())
