"""The one encoder: raw feature values to the arrays that the network reads, offline and online.

Training encodes whole columns, serving encodes requests; both go through `Encoder.categorical`
and `Encoder.numeric`. Unknown and absent values become *missing* (index 0, presence 0); values of
the wrong type or out of range are errors that name the field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from bundle.ids import Id, Keys, hash_ids
from bundle.items import ItemTable
from bundle.spec import Entity, Feature, Spec

Value = str | int | float | None
Vocabulary = Mapping[str, Sequence[str]]
"""Known values by table name; a value's index is its place, from 1. Only ever appended to."""
Arrays = dict[str, npt.NDArray[np.generic]]

AGE, COUNT = 0, 1
"""Columns of `history_num`."""


class FeatureError(ValueError):
    """A value can't be encoded: `field` is its path in a request; `expected` says what is right."""

    def __init__(self, field: str, value: object, expected: str) -> None:
        super().__init__(f"{field}: {value!r} is not {expected}")
        self.field, self.value, self.expected = field, value, expected


@dataclass(frozen=True)
class Request:
    """One user and N candidates. Column lengths must agree: history columns with each other,
    `item_features` columns with `item_ids`."""

    user_id: Id
    item_ids: Sequence[Id]
    user_features: Mapping[str, Value]
    context: Mapping[str, Value]
    item_features: Mapping[str, Sequence[Value]]
    history_items: Sequence[Id]
    history_age_days: Sequence[float]
    """Days since the last time, one per history item."""
    history_count: Sequence[float]
    """Number of times, one per history item."""


@dataclass(frozen=True)
class Encoded:
    """What the network reads (but for the TPM windows), and what the store is asked for.

    inputs: user_cat int32 [1, Fu], user_num float32 [1, 2 Gu], context_cat int32 [1, Fc],
    context_num float32 [1, 2 Gc], history_item int64 [1, L], history_cat int32 [1, L, M],
    history_num float32 [1, L, 2] (age in days, count), item_key int64 [N], item_cat int32 [N, Fi],
    item_num float32 [N, 2 Gi]; L is at least 1, padding has item 0.
    missing: by feature name, in how many of the N candidates (1 for user and context) it is absent.
    """

    inputs: Arrays
    user_key: Keys
    """uint64 [1]"""
    item_keys: Keys
    """uint64 [N]"""
    missing: dict[str, int]


class Encoder:
    """Encodes by one spec, one set of vocabularies and one item table."""

    def __init__(self, spec: Spec, vocabulary: Vocabulary, items: ItemTable) -> None:
        self.spec, self.items = spec, items
        self._known = {table: _sorted_keys(values) for table, values in vocabulary.items()}
        item_cat = [f.name for f in spec.of("item", "categorical")]
        self._match_columns = [item_cat.index(name) for name in spec.history.match]

    def categorical(
        self, feature: Feature, values: Sequence[Value], field: str
    ) -> npt.NDArray[np.int32]:
        """Indices int32 [n] into the feature's table, 0 where the value is None or unknown."""
        if feature.encoding == "bucketise":
            numbers, present = _numbers(values, field)
            bucket = 1 + np.searchsorted(np.array(feature.boundaries), numbers, side="right")
            return np.where(present, bucket, 0).astype(np.int32)
        keys = _keys(values, field)
        if feature.encoding == "hash":
            index = (1 + keys % np.uint64(feature.buckets - 1)).astype(np.int64)
        else:
            index = _look_up(self._known.get(feature.table, _NOTHING), keys)
        return np.where(keys > 0, index, 0).astype(np.int32)

    def numeric(
        self, feature: Feature, values: Sequence[Value], field: str
    ) -> npt.NDArray[np.float32]:
        """float32 [n, 2]: the encoded value (0 where None) and 1 where present."""
        numbers, present = _numbers(values, field)
        if feature.encoding == "log":
            if (numbers < 0).any():
                place = int(np.argmax(numbers < 0))
                raise FeatureError(_at(field, place, values), values[place], "a number >= 0")
            numbers = np.log1p(numbers)
        # Large enough for any count, small enough that no product in the network overflows.
        numbers = np.clip(numbers, -1e6, 1e6)
        return np.stack([numbers, present], axis=1).astype(np.float32)

    def table_size(self, feature: Feature) -> int:
        """Rows of the feature's embedding table, row 0 (missing) included."""
        if feature.encoding == "hash":
            return feature.buckets
        if feature.encoding == "bucketise":
            return len(feature.boundaries) + 2
        return 1 + len(self._known.get(feature.table, _NOTHING)[0])

    def request(self, request: Request) -> Encoded:
        """Encodes one request.

        Raises:
            FeatureError: an unknown feature name, a value of the wrong type, a wrong length.
        """
        self._check(request)
        missing: dict[str, int] = {}
        inputs: Arrays = {}
        user = {**request.user_features, "user_id": request.user_id}
        self._single(inputs, missing, "user", user, "user.features")
        self._single(inputs, missing, "context", request.context, "context")
        self._history(inputs, missing, request)
        item_keys = self._candidates(inputs, missing, request)
        return Encoded(inputs, hash_ids([request.user_id]), item_keys, missing)

    def _check(self, request: Request) -> None:
        _check_names(request.user_features, self.spec.names("user") - {"user_id"}, "user.features")
        _check_names(request.context, self.spec.names("context"), "context")
        known = self.spec.names("item") - {"item_id"}
        _check_names(request.item_features, known, "candidates.features")
        for name, column in request.item_features.items():
            _check_length(column, len(request.item_ids), f"candidates.features.{name}")
        _check_length(request.history_age_days, len(request.history_items), "user.history.age_days")
        _check_length(request.history_count, len(request.history_items), "user.history.count")

    def _single(
        self,
        inputs: Arrays,
        missing: dict[str, int],
        entity: Entity,
        values: Mapping[str, Value],
        field: str,
    ) -> None:
        categorical = np.zeros((1, len(self.spec.of(entity, "categorical"))), np.int32)
        numeric = np.zeros((1, 2 * len(self.spec.of(entity, "numeric"))), np.float32)
        for i, feature in enumerate(self.spec.of(entity, "categorical")):
            value = [values.get(feature.name)]
            categorical[0, i] = self.categorical(feature, value, f"{field}.{feature.name}")[0]
            if not categorical[0, i]:
                missing[feature.name] = 1
        for i, feature in enumerate(self.spec.of(entity, "numeric")):
            value = [values.get(feature.name)]
            pair = self.numeric(feature, value, f"{field}.{feature.name}")[0]
            numeric[0, 2 * i : 2 * i + 2] = pair
            if not pair[1]:
                missing[feature.name] = 1
        inputs[f"{entity}_cat"], inputs[f"{entity}_num"] = categorical, numeric

    def _history(self, inputs: Arrays, missing: dict[str, int], request: Request) -> None:
        ages = self._history_column(request.history_age_days, "user.history.age_days")
        counts = self._history_column(request.history_count, "user.history.count")
        keys = hash_ids(request.history_items)
        if not keys.size:
            missing[self.spec.history.name] = 1
            keys, ages, counts = np.zeros(1, np.uint64), np.zeros(1), np.zeros(1)
        newest = np.argsort(ages, kind="stable")[: self.spec.history.max_length]
        columns = np.stack([ages[newest], counts[newest]], axis=1)
        inputs["history_item"] = keys[newest].astype(np.int64)[None]
        inputs["history_cat"] = self.history_categorical(self.items.rows(keys[newest]))[None]
        inputs["history_num"] = columns.astype(np.float32)[None]

    def _history_column(self, values: Sequence[float], field: str) -> npt.NDArray[np.float64]:
        numbers, present = _numbers(values, field)
        bad = ~present | (numbers < 0) | (numbers > 1e6)
        if bad.any():
            place = int(np.argmax(bad))
            raise FeatureError(f"{field}[{place}]", values[place], "a number in 0 .. 1,000,000")
        return numbers

    def history_categorical(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The matched features int32 [..., M] of history items, given their item table rows."""
        columns: npt.NDArray[np.int32] = self.items.categorical[rows][..., self._match_columns]
        return columns

    def _candidates(self, inputs: Arrays, missing: dict[str, int], request: Request) -> Keys:
        keys = hash_ids(request.item_ids)
        rows = self.items.rows(keys)
        categorical, numeric = self.items.categorical[rows], self.items.numeric[rows]
        for i, feature in enumerate(self.spec.of("item", "categorical")):
            if feature.name in request.item_features:
                field = f"candidates.features.{feature.name}"
                given = self.categorical(feature, request.item_features[feature.name], field)
                categorical[:, i] = np.where(given > 0, given, categorical[:, i])
            _count_missing(missing, feature.name, categorical[:, i])
        for i, feature in enumerate(self.spec.of("item", "numeric")):
            pair = slice(2 * i, 2 * i + 2)
            if feature.name in request.item_features:
                field = f"candidates.features.{feature.name}"
                filled = self.numeric(feature, request.item_features[feature.name], field)
                numeric[:, pair] = np.where(filled[:, 1:] > 0, filled, numeric[:, pair])
            _count_missing(missing, feature.name, numeric[:, 2 * i + 1])
        inputs["item_key"] = keys.astype(np.int64)
        inputs["item_cat"], inputs["item_num"] = categorical, numeric
        return keys


_NOTHING = (np.empty(0, np.uint64), np.empty(0, np.int64))


def _sorted_keys(values: Sequence[str]) -> tuple[Keys, npt.NDArray[np.int64]]:
    keys = hash_ids(values)
    order = np.argsort(keys)
    return keys[order], order + 1


def _look_up(known: tuple[Keys, npt.NDArray[np.int64]], keys: Keys) -> npt.NDArray[np.int64]:
    sorted_keys, index = known
    if not sorted_keys.size:
        return np.zeros(len(keys), np.int64)
    place = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
    return np.where(sorted_keys[place] == keys, index[place], 0)


def _keys(values: Sequence[Value], field: str) -> Keys:
    """Keys of categorical values, 0 for None."""
    for place, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise FeatureError(_at(field, place, values), value, "a string, an integer or null")
    present = [v is not None for v in values]
    keys = hash_ids(["" if v is None else v for v in values])  # type: ignore[misc]
    return np.where(present, keys, np.uint64(0))


def _numbers(
    values: Sequence[Value], field: str
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Finite float64 values [n], 0 for None, and where they are present."""
    if isinstance(values, np.ndarray):
        numbers = values.astype(np.float64)
        if not np.isfinite(numbers).all():
            place = int(np.argmax(~np.isfinite(numbers)))
            raise FeatureError(_at(field, place, values), values[place], "a finite number")
        return numbers, np.ones(len(numbers), np.bool_)
    for place, value in enumerate(values):
        if value is None:
            continue
        if isinstance(value, bool | str) or not -1e300 < value < 1e300 or math.isnan(value):
            raise FeatureError(_at(field, place, values), value, "a finite number or null")
    present = np.array([v is not None for v in values], np.bool_)
    return np.array([0.0 if v is None else v for v in values], np.float64), present


def _at(field: str, place: int, values: Sequence[Value]) -> str:
    return field if len(values) == 1 else f"{field}[{place}]"


def _check_names(given: Mapping[str, object], known: frozenset[str], field: str) -> None:
    for name in given:
        if name not in known:
            expected = f"one of: {', '.join(sorted(known))}"
            raise FeatureError(field, name, expected)


def _check_length(column: Sequence[object], length: int, field: str) -> None:
    if len(column) != length:
        raise FeatureError(field, f"{len(column)} values", f"a column of {length} values")


def _count_missing(missing: dict[str, int], name: str, column: npt.NDArray[np.generic]) -> None:
    absent = len(column) - int(np.count_nonzero(column))
    if absent:
        missing[name] = absent
