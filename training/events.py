"""The event log on disk, and the parts of it that a training run reads.

A data set is a folder: `events/domain={natural,ad}/date=YYYY-MM-DD/*.parquet` (impressions with
labels), `behaviour/date=YYYY-MM-DD/*.parquet` (everything that a user took, in either domain or in
none: what histories are made of), `users.parquet`, `items.parquet`, `user_days.parquet` and
`item_days.parquet` (exact daily counts), `features.toml` and `vocabulary.json`. Where the log was
sampled, `requests.parquet` and `pages.parquet` keep each list of candidates whole.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl

from bundle.encode import Encoder, Vocabulary
from bundle.ids import Keys, hash_distinct
from bundle.items import ItemTable
from bundle.spec import Domain, Entity, Spec, read_spec

Ints = npt.NDArray[np.int64]


class DataError(ValueError):
    """The data set lacks something or contradicts itself; the message says what and where."""


@dataclass(frozen=True)
class Entities:
    """All users, or all items, in the order of their file.

    ids: as in the log. keys: uint64 [n]. categorical: int32 [n, F], columns as in the spec.
    """

    ids: npt.NDArray[np.generic]
    keys: Keys
    categorical: npt.NDArray[np.int32]

    def rows(self, ids: npt.NDArray[np.generic]) -> Ints:
        """Row numbers int64 [m] of ids [m] of the log.

        Raises:
            DataError: an id is not among the entities.
        """
        order = self._order
        place = np.minimum(np.searchsorted(self.ids, ids, sorter=order), len(self.ids) - 1)
        rows: Ints = order[place]
        unknown = self.ids[rows] != ids
        if unknown.any():
            raise DataError(f"id {ids[int(np.argmax(unknown))]!r} is in the log, not in its table")
        return rows

    @cached_property
    def _order(self) -> Ints:
        return np.argsort(self.ids)


class EventLog:
    """A data set folder, opened."""

    def __init__(self, root: Path) -> None:
        if not (root / "dataset.json").is_file():
            raise DataError(f"{root} holds no data set; run 'ecdctr import' first")
        self.root = root
        self.name: str = json.loads((root / "dataset.json").read_text())["name"]
        self.spec: Spec = read_spec(root / "features.toml")
        self.vocabulary: Vocabulary = json.loads((root / "vocabulary.json").read_text())
        # Encodes columns; it has no item table of its own, so it can't encode requests.
        self.encoder = Encoder(self.spec, self.vocabulary, _no_items(self.spec))

    @cached_property
    def users(self) -> Entities:
        return self._entities("user")

    @cached_property
    def items(self) -> Entities:
        return self._entities("item")

    def rows(self, domain: Domain, first: date, last: date) -> pl.DataFrame:
        """Impressions dated first .. last, both inclusive, with a column `date`.

        Raises:
            DataError: a day in between has no partition.
        """
        return self._partitions(self.root / "events" / f"domain={domain}", first, last)

    def behaviour(self, until: date) -> pl.DataFrame:
        """Everything that users took before the day `until`: date, user_id, item_id."""
        folder = self.root / "behaviour"
        days = sorted(path.name.removeprefix("date=") for path in folder.glob("date=*"))
        before = [date.fromisoformat(day) for day in days if day < until.isoformat()]
        if not before:
            raise DataError(f"{folder}: nothing before {until}")
        # An early day without any partition is no error: shops close.
        frames = [_read(folder, day, ["user_id", "item_id"]) for day in before]
        return pl.concat(frames)

    def full_lists(self, days: Sequence[date], per_day: int | None = None) -> pl.DataFrame:
        """Every candidate of the requests of `days`, labelled, nothing sampled; columns as in
        `rows`. Of each day the first `per_day` requests, in the order of
        (request_id * 2654435761) mod 2**32."""
        scrambled = (pl.col("request_id").cast(pl.UInt64) * 2654435761) % (1 << 32)
        requests = (
            pl.scan_parquet(self.root / "requests.parquet")
            .filter(pl.col("date").is_in(list(days)))
            .with_columns(order=scrambled.rank("ordinal").over("date"))
            .filter(pl.col("order") <= (per_day or 1 << 31))
            .drop("order")
            .sort("date", "timestamp", "request_id")
            .collect()
        )
        pages = pl.scan_parquet(self.root / "pages.parquet")
        taken = self.rows("ad", min(days), max(days)).filter(pl.col("label") == 1)
        labels = taken.select("request_id", "item_id", "label")
        return (
            requests.lazy()
            .join(pages, on="page_id", maintain_order="left_right")
            .join(labels.lazy(), on=["request_id", "item_id"], how="left", maintain_order="left")
            .with_columns(pl.col("label").fill_null(0), sample_weight=pl.lit(1.0, pl.Float32))
            .drop("page_id")
            .collect()
        )

    def days(self, entity: Entity) -> pl.DataFrame:
        """Exact daily counts: source, date, user_id or item_id, impressions, positives."""
        return pl.read_parquet(self.root / f"{entity}_days.parquet")

    def _partitions(self, folder: Path, first: date, last: date) -> pl.DataFrame:
        if first > last:
            raise DataError(f"no days between {first} and {last}: the first is after the last")
        return pl.concat([_read(folder, day) for day in days_between(first, last)])

    def _entities(self, entity: Entity) -> Entities:
        frame = pl.read_parquet(self.root / f"{entity}s.parquet")
        columns = []
        for feature in self.spec.of(entity, "categorical"):
            # A feature that only requests carry has no column here: missing, until a row has it.
            values = frame[feature.name].to_list() if feature.name in frame.columns else None
            field = f"{entity}s.parquet: {feature.name}"
            columns.append(
                self.encoder.categorical(feature, values, field)
                if values is not None
                else np.zeros(len(frame), np.int32)
            )
        ids = frame[f"{entity}_id"]
        return Entities(ids.to_numpy(), hash_distinct(ids.to_list()), np.stack(columns, axis=1))


def days_between(first: date, last: date) -> list[date]:
    """All days from first to last, both inclusive."""
    return [first + timedelta(days=i) for i in range((last - first).days + 1)]


def _read(folder: Path, day: date, columns: list[str] | None = None) -> pl.DataFrame:
    path = folder / f"date={day}"
    if not path.is_dir():
        raise DataError(f"{path}: no partition for this day")
    frame = pl.read_parquet(path / "*.parquet", columns=columns, hive_partitioning=False)
    return frame.with_columns(date=pl.lit(day))


def _no_items(spec: Spec) -> ItemTable:
    return ItemTable.build(
        np.empty(0, np.uint64),
        np.empty((0, len(spec.of("item", "categorical"))), np.int32),
        np.empty((0, 2 * len(spec.of("item", "numeric"))), np.float32),
    )
