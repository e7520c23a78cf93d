"""The feature spec: which features exist and how each one is encoded (`features.toml`).

A data set brings its spec; every bundle carries a copy. Categorical features become indices into
an embedding table, numeric ones a value and a presence mark, and the one history becomes columns.
Index 0 is *missing* in every table.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

Entity = Literal["user", "item", "context"]
Kind = Literal["categorical", "numeric", "history"]
Encoding = Literal["hash", "vocabulary", "bucketise", "log", "linear"]
Domain = Literal["natural", "ad"]
Counted = Literal["impression", "positive"]
Source = Literal["natural", "ad", "behaviour"]
"""What is counted: one domain's events, or all behaviour, of either domain or of none."""

_ENCODINGS: dict[Kind, tuple[Encoding, ...]] = {
    "categorical": ("hash", "vocabulary", "bucketise"),
    "numeric": ("log", "linear"),
    "history": (),
}


class SpecError(ValueError):
    """The feature spec is not usable; the message names the feature and what would be right."""


@dataclass(frozen=True)
class Count:
    """How a numeric feature is counted: events of `source` in the `days` days before the row's day,
    grouped by `by`: "user_id", "item_id" or a categorical feature of the item."""

    source: Source
    of: Counted
    by: str
    days: int
    per: Counted | None = None
    """Makes it a rate: the logarithm of (of + strength * prior) / (per + strength), so that few
    events say little."""
    prior: float = 0.0
    strength: float = 0.0


@dataclass(frozen=True)
class Feature:
    """One feature. Which fields apply follows from `kind` and `encoding`."""

    name: str
    entity: Entity
    kind: Kind
    encoding: Encoding | None = None
    dim: int = 0
    """Width of the embedding of a categorical feature; 0 where only TPM uses it."""
    buckets: int = 0
    """Rows of a hashed table, row 0 (missing) included."""
    boundaries: tuple[float, ...] = ()
    """Rising upper bounds (exclusive) of a bucketised value."""
    table: str = ""
    """Name of the embedding table; features that name the same table share it."""
    basic: bool = False
    """TPM uses it."""
    given: bool = False
    """Item: only a request knows its value, so the item table has none."""
    count: Count | None = None
    """Set for point-in-time counts, which are derived from the event log."""
    max_length: int = 0
    """History: how many distinct items are kept, newest first."""
    attend: int = 0
    """History: how many of the newest take part in target attention."""
    match: tuple[str, ...] = ()
    """History: the item features that are matched with the candidate's, besides the item itself."""


@dataclass(frozen=True)
class Spec:
    """All features, in the order in which their columns stand in the encoded arrays."""

    features: tuple[Feature, ...]

    def of(self, entity: Entity, kind: Kind) -> tuple[Feature, ...]:
        return self._groups.get((entity, kind), ())

    @cached_property
    def _groups(self) -> dict[tuple[Entity, Kind], tuple[Feature, ...]]:
        groups: dict[tuple[Entity, Kind], tuple[Feature, ...]] = {}
        for feature in self.features:
            key = (feature.entity, feature.kind)
            groups[key] = (*groups.get(key, ()), feature)
        return groups

    def names(self, entity: Entity) -> frozenset[str]:
        return frozenset(f.name for f in self.features if f.entity == entity)

    def __getitem__(self, name: str) -> Feature:
        for feature in self.features:
            if feature.name == name:
                return feature
        raise SpecError(f"no feature {name!r}; there are: {', '.join(self._all_names())}")

    @property
    def history(self) -> Feature:
        """The one history feature."""
        return next(f for f in self.features if f.kind == "history")

    def _all_names(self) -> list[str]:
        return [f.name for f in self.features]


def read_spec(path: Path) -> Spec:
    """Reads `features.toml`.

    Raises:
        SpecError: unreadable TOML, an unknown key, or a feature that contradicts itself.
    """
    try:
        with path.open("rb") as file:
            document = tomllib.load(file)
    except tomllib.TOMLDecodeError as error:
        raise SpecError(f"{path}: not TOML: {error}") from error
    return parse_spec(document, str(path))


def parse_spec(document: dict[str, Any], where: str = "features.toml") -> Spec:
    """The spec in an already parsed TOML document; see `read_spec`."""
    entries = document.get("feature")
    if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
        raise SpecError(f"{where}: needs at least one [[feature]]")
    features = tuple(_feature(entry, where) for entry in entries)
    _check_together(features, where)
    return Spec(features)


def _feature(entry: dict[str, Any], where: str) -> Feature:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise SpecError(f"{where}: a [[feature]] has no name: {entry!r}")
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()}
    try:
        if "count" in values:
            values["count"] = Count(**values["count"])
        values.setdefault("table", name)
        feature = Feature(**values)
        _check(feature, where)
    except TypeError as error:
        raise SpecError(f"{where}: feature {name!r}: {error}") from error
    return feature


def _check(feature: Feature, where: str) -> None:
    def refuse(what: str) -> SpecError:
        return SpecError(f"{where}: feature {feature.name!r}: {what}")

    if feature.entity not in get_args(Entity):
        raise refuse(f"entity is {feature.entity!r}, must be one of {get_args(Entity)}")
    if feature.kind not in get_args(Kind):
        raise refuse(f"kind is {feature.kind!r}, must be one of {get_args(Kind)}")
    if feature.kind == "history":
        if feature.entity != "user":
            raise refuse(f"entity is {feature.entity!r}, a history is the user's")
        if not 0 < feature.attend <= feature.max_length or feature.given:
            raise refuse("needs 0 < attend <= max_length, and is not given")
        return
    if feature.encoding not in _ENCODINGS[feature.kind]:
        raise refuse(f"encoding is {feature.encoding!r}, must be one of {_ENCODINGS[feature.kind]}")
    if feature.kind == "categorical" and feature.dim < (0 if feature.basic else 1):
        raise refuse(f"dim is {feature.dim}, must be at least 1 (0 if only TPM uses it)")
    if feature.encoding == "hash" and feature.buckets < 2:
        raise refuse(f"buckets is {feature.buckets}, must be at least 2")
    if feature.encoding == "bucketise" and list(feature.boundaries) != sorted(
        set(feature.boundaries)
    ):
        raise refuse(f"boundaries {feature.boundaries} must rise strictly")
    if feature.count:
        _check_count(feature, feature.count, refuse)
    if feature.given and (feature.entity != "item" or feature.count or feature.basic):
        raise refuse("only an item's feature can be given, and none that is counted or basic")


def _check_count(feature: Feature, count: Count, refuse: Callable[[str], SpecError]) -> None:
    if feature.kind != "numeric" or count.days < 1:
        raise refuse("a count must be numeric and span at least 1 day")
    if count.source not in get_args(Source):
        raise refuse(f"source is {count.source!r}, must be one of {get_args(Source)}")
    for counted in (count.of, count.per or count.of):
        if counted not in get_args(Counted):
            raise refuse(f"counts {counted!r}, must be one of {get_args(Counted)}")
    if count.per and min(count.prior, count.strength) <= 0:
        raise refuse("a rate needs a prior and a strength above 0")


def _check_together(features: tuple[Feature, ...], where: str) -> None:
    names = [f.name for f in features]
    if len(set(names)) < len(names):
        raise SpecError(f"{where}: feature names repeat: {sorted(names)}")
    histories = [f for f in features if f.kind == "history"]
    if len(histories) != 1:
        raise SpecError(f"{where}: needs exactly one history feature, has {len(histories)}")
    item_categorical = {f.name for f in features if (f.entity, f.kind) == ("item", "categorical")}
    for match in histories[0].match:
        if match not in item_categorical:
            raise SpecError(f"{where}: history matches {match!r}, no categorical item feature")
        if any(f.name == match and f.given for f in features):
            raise SpecError(f"{where}: history matches {match!r}, which the item table has not")
    for first in features:
        for second in features:
            if first.table == second.table and _shape(first) != _shape(second):
                raise SpecError(
                    f"{where}: {first.name!r} and {second.name!r} share the table"
                    f" {first.table!r} but differ in dim, buckets, boundaries or encoding"
                )


def _shape(feature: Feature) -> tuple[object, ...]:
    """What features that share an embedding table must agree on."""
    return feature.dim, feature.buckets, feature.boundaries, feature.encoding
