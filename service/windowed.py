"""Gauges over the last minutes, computed from the counts of all processes when they are read.

As metrics of each process they could not be put together again: an index of drift is no sum.
"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from service.drift import Drift
from service.feedback import Feedback


class Windowed(Collector):
    """For a registry of prometheus_client, which calls `collect` each time it is read."""

    def __init__(self, drift: Drift, feedback: Feedback) -> None:
        self._drift, self._feedback = drift, feedback

    def collect(self) -> Iterator[Metric]:
        summary = self._drift.summary()
        psi = GaugeMetricFamily(
            "ecdctr_score_psi",
            "Population stability index of the last 10 minutes' scores against the bundle's own.",
        )
        if summary.psi is not None:
            psi.add_metric([], summary.psi)
        yield psi
        missing = GaugeMetricFamily(
            "ecdctr_missing_share",
            "Share of requests, or of candidates, of the last 10 minutes that lack a feature.",
            labels=["feature"],
        )
        for feature, share in summary.missing.items():
            missing.add_metric([feature], share)
        yield missing
        yield from self._observed()

    def _observed(self) -> Iterator[Metric]:
        help_texts = {
            "events": "Events of feedback in the last hour, by the model that scored.",
            "ctr": "Clicks per event of feedback in the last hour, by the model that scored.",
            "pcoc": "Predicted over observed clicks in the last hour, by the model that scored.",
            "auc": "AUC of scores for clicks in the last hour, by the model that scored.",
        }
        families = {
            name: GaugeMetricFamily(f"ecdctr_feedback_{name}", text, labels=["model"])
            for name, text in help_texts.items()
        }
        for model, observed in self._feedback.observed():
            values = (observed.num, observed.ctr, observed.pcoc, observed.auc)
            for family, value in zip(families.values(), values, strict=True):
                family.add_metric([model], value)
        yield from families.values()
