"""Point-in-time counts: what a row of day d may know is what happened before day d."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import polars as pl

from bundle.spec import Count, Counted, Entity
from training.events import Entities, EventLog, Ints

Floats = npt.NDArray[np.float32]


class Counts:
    """Counts of one entity's events over days, for all its rows at once."""

    def __init__(self, log: EventLog, entity: Entity) -> None:
        self._log, self._entity = log, entity
        self._rows: Entities = log.users if entity == "user" else log.items
        self._features = log.spec.of(entity, "numeric")
        days = log.days(entity).sort("date")
        self._sources = {
            str(source): _Days(frame, self._rows, f"{entity}_id")
            for (source,), frame in days.partition_by("source", as_dict=True).items()
        }

    def asof(self, day: date) -> Floats:
        """Numeric features float32 [n, 2 G] of all entities as they stand before `day`: a value
        and a presence mark each. A feature without a count is missing here."""
        encoded = np.zeros((len(self._rows.ids), 2 * len(self._features)), np.float32)
        for i, feature in enumerate(self._features):
            if feature.count:
                values = self._count(feature.count, day)
                pair = self._log.encoder.numeric(feature, values, feature.name)  # type: ignore[arg-type]
                encoded[:, 2 * i : 2 * i + 2] = pair
        return encoded

    def raw(self, day: date) -> dict[str, Floats]:
        """The same by feature name, not encoded: what a request says of a user, float32 [n]."""
        counted = [f for f in self._features if f.count]
        return {f.name: self._count(f.count, day).astype(np.float32) for f in counted if f.count}

    def _count(self, count: Count, day: date) -> npt.NDArray[np.float64]:
        total = self._total(count, count.of, day)
        if count.per is None:
            return total
        over = self._total(count, count.per, day)
        return np.log((total + count.strength * count.prior) / (over + count.strength))

    def _total(self, count: Count, of: Counted, day: date) -> npt.NDArray[np.float64]:
        per_row = self._sources[count.source].total(of, count.days, day)
        if count.by == f"{self._entity}_id":
            return per_row
        names = [f.name for f in self._log.spec.of(self._entity, "categorical")]
        group = self._rows.categorical[:, names.index(count.by)]
        totals = np.bincount(group, per_row).astype(np.float64)
        # A missing group has nothing in common but that it is missing.
        totals[0] = 0.0
        return totals[group]


class _Days:
    """Daily counts of one source, in order of time."""

    def __init__(self, frame: pl.DataFrame, rows: Entities, by: str) -> None:
        self._day = frame["date"].to_numpy().astype("datetime64[D]")
        self._row: Ints = rows.rows(frame[by].to_numpy())
        self._num_rows = len(rows.ids)
        self._columns = {
            "impression": frame["impressions"].to_numpy(),
            "positive": frame["positives"].to_numpy(),
        }

    def total(self, of: Counted, days: int, day: date) -> npt.NDArray[np.float64]:
        """Sum float64 [n] over the `days` days before `day`, by entity row."""
        span = np.array([day - timedelta(days=days), day], "datetime64[D]")
        first, end = np.searchsorted(self._day, span)
        weights = self._columns[of][first:end].astype(np.float64)
        return np.bincount(self._row[first:end], weights, self._num_rows).astype(np.float64)
