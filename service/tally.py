"""What scored requests add to the metrics, gathered here and handed on in bulk: a counter of
Prometheus' client takes a lock and a histogram a search, for each of a request's twenty numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from prometheus_client import Histogram

from bundle.reference import EDGES, histogram
from service.scorer import Scored


class Tally:
    """Of one model, since it was last handed on. For one thread."""

    def __init__(self) -> None:
        self.seconds: list[Mapping[str, float]] = []
        """By stage, of each request."""
        self.num_candidates: list[int] = []
        """Of each request."""
        self.scores = np.zeros(len(EDGES), np.int64)
        """In the bins of `bundle.reference`."""
        self.sum_scores = 0.0
        self.missing: Counter[str] = Counter()
        self.degraded: Counter[tuple[str, str]] = Counter()
        """By input and reason."""
        self.num_invalid = 0

    def add(self, scored: Scored, seconds: Mapping[str, float]) -> None:
        """One request; on the way of its answer, so it has to be quick."""
        self.seconds.append(seconds)
        self.num_candidates.append(len(scored.scores))
        self.scores += histogram(scored.scores)
        self.sum_scores += float(scored.scores.sum())
        self.num_invalid += scored.num_invalid
        for feature, num in scored.missing.items():
            self.missing[feature] += num
        for what, reason in scored.degraded.items():
            self.degraded[what, reason] += 1


def observe_all(metric: Histogram, values: Sequence[float]) -> None:
    """The same as `metric.observe` of each value, for which the client has no call."""
    places = np.searchsorted(metric._upper_bounds, values)
    counts = np.bincount(places, minlength=len(metric._upper_bounds))
    for bucket, num in zip(metric._buckets, counts.tolist(), strict=True):
        if num:
            bucket.inc(num)
    metric._sum.inc(float(np.sum(values)))
