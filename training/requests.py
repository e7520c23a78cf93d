"""Rows of the log as the requests that an ad ranker would send."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date

import polars as pl

from bundle.encode import Request, Value
from training.events import EventLog
from training.examples import Builder


class RequestMaker:
    """Makes requests of one day: raw features, history and counts as they stood before it."""

    def __init__(self, log: EventLog, builder: Builder, day: date) -> None:
        self._log, self._builder, self._day = log, builder, day
        self._users = pl.read_parquet(log.root / "users.parquet")
        self._counts = builder.user_features(day)
        spec = log.spec
        self._context = [f.name for f in spec.features if f.entity == "context"]
        self._user = [f.name for f in spec.of("user", "categorical") if f.name != "user_id"]
        self._item = [f.name for f in spec.features if f.entity == "item" and f.name != "item_id"]

    def requests(self, rows: pl.DataFrame) -> Iterator[tuple[Request, pl.DataFrame]]:
        """Each request of the day's rows, with its own rows, candidates in the same order."""
        for _, own in rows.group_by("request_id", maintain_order=True):
            yield self._request(own), own

    def whole(self, per_day: int | None) -> tuple[list[Request], pl.DataFrame]:
        """The day's first `per_day` requests (all: None), and all their rows in the same order."""
        lists = self._log.full_lists([self._day], per_day)
        pairs = list(self.requests(lists))
        rows = [own for _, own in pairs]
        return [request for request, _ in pairs], pl.concat(rows) if rows else lists

    def _request(self, own: pl.DataFrame) -> Request:
        user_id = own["user_id"][0]
        row = int(self._log.users.rows(own["user_id"].head(1).to_numpy())[0])
        past = self._builder.past(row, self._day)
        known: dict[str, Value] = {name: self._users[name][row] for name in self._user}
        counts = {name: float(column[row]) for name, column in self._counts.items()}
        features = {**known, **counts}
        return Request(
            user_id=user_id,
            item_ids=own["item_id"].to_list(),
            user_features={k: v for k, v in features.items() if v is not None},
            context={name: own[name][0] for name in self._context if own[name][0] is not None},
            item_features={n: own[n].to_list() for n in self._item if n in own.columns},
            history_items=self._log.items.ids[past.item_rows].tolist(),
            history_age_days=past.age_days.tolist(),
            history_count=past.count.tolist(),
        )
