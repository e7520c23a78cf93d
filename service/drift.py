"""Do scores and inputs still look as they did when the bundle was made?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bundle.artifact import Artifact
from bundle.reference import EDGES, Counts, read_histogram
from bundle.spec import Entity
from service.recent import Recent
from service.tally import Tally

WINDOW_S = 600.0
SLICE_S = 10.0
MIN_SCORES = 1000
"""Fewer scores say nothing: with 29 bins, chance alone gives an index of 28 / MIN_SCORES."""


@dataclass(frozen=True)
class Summary:
    """Of the last ten minutes."""

    psi: float | None
    """Population stability index of the scores against the bundle's reference; None where that has
    none, or has given too few scores."""
    missing: dict[str, float]
    """Each input with the share of requests (of candidates, where it is one of items) that lack
    it; empty before the first request."""


class Drift:
    """Counts scores and missing values of the live bundle, over the last ten minutes."""

    def __init__(self, recent: Recent) -> None:
        self._recent = recent
        self._model = ""
        self._inputs: list[tuple[str, Entity]] = []
        self._reference: Counts | None = None

    def follow(self, artifact: Artifact) -> None:
        """From now on `artifact` is the live bundle."""
        # Not the artifact itself: a bundle that is replaced is to be freed at once.
        if artifact.manifest.id != self._model:
            features = artifact.encoder.spec.features
            # Ids are in every request.
            self._inputs = [
                (f.name, f.entity) for f in features if f.name not in ("user_id", "item_id")
            ]
            self._inputs += [("user_window", "user"), ("item_windows", "item")]
            self._reference = read_histogram(artifact.folder)
            self._model = artifact.manifest.id

    def add(self, model: str, tally: Tally) -> None:
        """Counts what requests to a model came to."""
        recent = self._recent
        recent.add(f"scores {model}", tally.scores)
        recent.add(f"requests {model}", len(tally.seconds))
        for feature, num in tally.missing.items():
            recent.add(f"missing {model} {feature}", num)

    def summary(self) -> Summary:
        """How the live bundle does, over all processes that share the window."""
        if not self._model:
            return Summary(None, {})
        total, model = self._recent.total(), self._model
        scores = total.get(f"scores {model}", np.zeros(len(EDGES)))
        num_requests = float(total.get(f"requests {model}", np.zeros(())))
        shares = {}
        for name, entity in self._inputs:
            if num := float(scores.sum()) if entity == "item" else num_requests:
                shares[name] = float(total.get(f"missing {model} {name}", np.zeros(()))) / num
        return Summary(self._psi(scores), shares)

    def _psi(self, scores: npt.NDArray[np.float64]) -> float | None:
        if self._reference is None or scores.sum() < MIN_SCORES:
            return None
        return stability_index(scores, self._reference)


def stability_index(found: npt.ArrayLike, expected: npt.ArrayLike) -> float:
    """Sum over bins of (p - q) ln(p / q), for counts [B] of two samples in the same bins.

    Half a count is added to each bin, so that an empty one is no infinity.
    """
    p, q = (_shares(np.asarray(counts, np.float64)) for counts in (found, expected))
    return float(((p - q) * np.log(p / q)).sum())


def _shares(counts: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shares: npt.NDArray[np.float64] = (counts + 0.5) / (counts + 0.5).sum()
    return shares
