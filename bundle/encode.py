"""The one encoder: raw feature values to the arrays that the network reads, offline and online.

Training encodes whole columns, serving encodes requests; both go through `Encoder.categorical`
and `Encoder.numeric`. Unknown and absent values become *missing* (index 0, presence 0); values of
the wrong type or out of range are errors that name the field.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType
from typing import Any

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
        """
        Raises:
            ValueError: a vocabulary names a value twice.
        """
        self.spec, self.items = spec, items
        self._known = {table: _places(table, values) for table, values in vocabulary.items()}
        self._user, self._context = _Columns(spec, "user"), _Columns(spec, "context")
        self._item = _Columns(spec, "item")
        item_cat = [f.name for f in self._item.categorical]
        self._match_columns = [item_cat.index(name) for name in spec.history.match]

    def categorical(
        self, feature: Feature, values: Sequence[Value], field: str
    ) -> npt.NDArray[np.int32]:
        """Indices int32 [n] into the feature's table, 0 where the value is None or unknown."""
        return self._indices(feature, values, _in_column(field))

    def numeric(
        self, feature: Feature, values: Sequence[Value], field: str
    ) -> npt.NDArray[np.float32]:
        """float32 [n, 2]: the encoded value (0 where None) and 1 where present."""
        return _pairs(np.bool_(feature.encoding == "log"), values, _in_column(field))

    def table_size(self, feature: Feature) -> int:
        """Rows of the feature's embedding table, row 0 (missing) included."""
        if feature.encoding == "hash":
            return feature.buckets
        if feature.encoding == "bucketise":
            return len(feature.boundaries) + 2
        return 1 + len(self._known.get(feature.table, {}))

    def history_categorical(self, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
        """The matched features int32 [..., M] of history items, given their item table rows."""
        columns: npt.NDArray[np.int32] = self.items.categorical[rows][..., self._match_columns]
        return columns

    def request(self, request: Request) -> Encoded:
        """Encodes one request.

        Raises:
            FeatureError: an unknown feature name, a value of the wrong type, a wrong length.
        """
        self._check(request)
        missing: dict[str, int] = {}
        inputs: Arrays = {}
        num_history = len(request.history_items)
        # In one go: a call costs as much as a hundred ids.
        keys = hash_ids([*request.history_items, *request.item_ids])
        history_keys, item_keys = keys[:num_history], keys[num_history:]
        user = {**request.user_features, "user_id": request.user_id}
        self._single(inputs, missing, self._user, user, "user.features")
        self._single(inputs, missing, self._context, request.context, "context")
        self._history(inputs, missing, request, history_keys)
        self._candidates(inputs, missing, request, item_keys)
        return Encoded(inputs, hash_ids([request.user_id]), item_keys, missing)

    def _check(self, request: Request) -> None:
        _check_names(request.user_features, self._user.names, "user.features")
        _check_names(request.context, self._context.names, "context")
        _check_names(request.item_features, self._item.names, "candidates.features")
        _check_ids([request.user_id], lambda _: "user.id")
        _check_ids(request.history_items, _in_column("user.history.items"))
        _check_ids(request.item_ids, _in_column("candidates.id"))
        for name, column in request.item_features.items():
            _check_length(column, len(request.item_ids), f"candidates.features.{name}")
        _check_length(request.history_age_days, len(request.history_items), "user.history.age_days")
        _check_length(request.history_count, len(request.history_items), "user.history.count")

    def _single(
        self,
        inputs: Arrays,
        missing: dict[str, int],
        columns: _Columns,
        values: Mapping[str, Value],
        field: str,
    ) -> None:
        """User or context: one value of each feature."""

        def at(feature: Feature) -> _At:
            return lambda _: f"{field}.{feature.name}"

        indices = [
            int(self._indices(feature, [values.get(feature.name)], at(feature))[0])
            for feature in columns.categorical
        ]
        # The numbers of all features are encoded as one column.
        numbers = [values.get(feature.name) for feature in columns.numeric]
        pairs = _pairs(columns.is_log, numbers, lambda place: at(columns.numeric[place])(0))
        inputs[f"{columns.entity}_cat"] = np.array([indices], np.int32)
        inputs[f"{columns.entity}_num"] = pairs.reshape(1, -1)
        _count_missing(missing, columns, inputs)

    def _history(
        self, inputs: Arrays, missing: dict[str, int], request: Request, keys: Keys
    ) -> None:
        ages = self._history_column(request.history_age_days, "user.history.age_days")
        counts = self._history_column(request.history_count, "user.history.count")
        if not keys.size:
            missing[self.spec.history.name] = 1
            keys, ages, counts = np.zeros(1, np.uint64), np.zeros(1), np.zeros(1)
        newest = np.argsort(ages, kind="stable")[: self.spec.history.max_length]
        columns = np.stack([ages[newest], counts[newest]], axis=1)
        inputs["history_item"] = keys[newest].astype(np.int64)[None]
        inputs["history_cat"] = self.history_categorical(self.items.rows(keys[newest]))[None]
        inputs["history_num"] = columns.astype(np.float32)[None]

    def _history_column(self, values: Sequence[float], field: str) -> npt.NDArray[np.float64]:
        at = _in_column(field)
        numbers, present = _numbers(values, at)
        _refuse(
            ~present | (numbers < 0) | (numbers > 1e6), values, at, "a number in 0 .. 1,000,000"
        )
        return numbers

    def _candidates(
        self, inputs: Arrays, missing: dict[str, int], request: Request, keys: Keys
    ) -> None:
        rows = self.items.rows(keys)
        # take() is twice as fast as indexing and copies too.
        categorical = self.items.categorical.take(rows, axis=0)
        numeric = self.items.numeric.take(rows, axis=0)
        for i, feature in enumerate(self._item.categorical):
            if feature.name in request.item_features:
                field = f"candidates.features.{feature.name}"
                given = self.categorical(feature, request.item_features[feature.name], field)
                categorical[:, i] = np.where(given > 0, given, categorical[:, i])
        for i, feature in enumerate(self._item.numeric):
            if feature.name in request.item_features:
                field = f"candidates.features.{feature.name}"
                filled = self.numeric(feature, request.item_features[feature.name], field)
                pair = slice(2 * i, 2 * i + 2)
                numeric[:, pair] = np.where(filled[:, 1:] > 0, filled, numeric[:, pair])
        inputs["item_key"] = keys.astype(np.int64)
        inputs["item_cat"], inputs["item_num"] = categorical, numeric
        _count_missing(missing, self._item, inputs)

    def _indices(self, feature: Feature, values: Sequence[Value], at: _At) -> npt.NDArray[np.int32]:
        if feature.encoding == "bucketise":
            numbers, present = _numbers(values, at)
            bucket = 1 + np.searchsorted(np.array(feature.boundaries), numbers, side="right")
            return np.where(present, bucket, 0).astype(np.int32)
        texts = _texts(values, at)
        if feature.encoding == "vocabulary":
            known = self._known.get(feature.table, {})
            return np.array([known.get(text, 0) for text in texts], np.int32)
        keys = hash_ids(["" if text is None else text for text in texts])
        index = 1 + keys % np.uint64(feature.buckets - 1)
        return np.where([text is None for text in texts], 0, index).astype(np.int32)


_At = Callable[[int], str]
"""The path in a request of the value at a place of a column."""


class _Columns:
    """The features of one entity, by kind."""

    def __init__(self, spec: Spec, entity: Entity) -> None:
        self.entity = entity
        self.categorical = spec.of(entity, "categorical")
        self.numeric = spec.of(entity, "numeric")
        self.is_log = np.array([f.encoding == "log" for f in self.numeric], np.bool_)
        # What a request may name: ids and the history stand elsewhere in it.
        self.names = {f.name for f in self.categorical + self.numeric} - {"user_id", "item_id"}


def _places(table: str, values: Sequence[str]) -> dict[str | None, int]:
    places: dict[str | None, int] = {str(value): i for i, value in enumerate(values, 1)}
    if len(places) < len(values):
        raise ValueError(f"the vocabulary of {table!r} names a value twice")
    return places


def _texts(values: Sequence[Value], at: _At) -> Sequence[str | None]:
    """Categorical values as strings: 17 and "17" are the same."""
    if set(map(type, values)) <= {str, NoneType}:
        return values  # type: ignore[return-value]
    for place, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, str | int)):
            raise FeatureError(at(place), value, "a string, an integer or null")
    return [None if value is None else str(value) for value in values]


def _pairs(
    is_log: npt.NDArray[np.bool_] | np.bool_, values: Sequence[Value], at: _At
) -> npt.NDArray[np.float32]:
    """float32 [n, 2]: a value and 1 where present. is_log: for all, or for each of them [n]."""
    numbers, present = _numbers(values, at)
    _refuse(is_log & (numbers < 0), values, at, "a number >= 0")
    np.log1p(numbers, out=numbers, where=is_log)
    pairs = np.empty((len(numbers), 2), np.float32)
    # Large enough for any count, small enough that no product in the network overflows.
    pairs[:, 0] = numbers.clip(-1e6, 1e6)
    pairs[:, 1] = present
    return pairs


def _numbers(
    values: Sequence[Value], at: _At
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Finite float64 values [n], 0 for None, and where they are present."""
    expected = "a finite number or null"
    if isinstance(values, np.ndarray) and values.dtype.kind in "iuf":
        numbers, present = values.astype(np.float64), np.ones(len(values), np.bool_)
    else:
        types = set(map(type, values))
        if not types <= {int, float, NoneType}:
            _check_numbers(values, at, expected)
        if NoneType not in types:
            present, numbers = np.ones(len(values), np.bool_), _floats(values)
        else:
            present = np.array([v is not None for v in values], np.bool_)
            numbers = _floats([0.0 if v is None else v for v in values])
    _refuse(~(np.abs(numbers) < 1e300), values, at, expected)
    return numbers, present


def _check_numbers(values: Sequence[Value], at: _At, expected: str) -> None:
    numeric = (int, float, np.integer, np.floating)
    for place, value in enumerate(values):
        if value is not None and (isinstance(value, bool) or not isinstance(value, numeric)):
            raise FeatureError(at(place), value, expected)


def _floats(values: Sequence[Any]) -> npt.NDArray[np.float64]:
    try:
        return np.array(values, np.float64)
    except OverflowError:  # an integer of hundreds of digits
        return np.array([v if -1e300 < v < 1e300 else math.inf for v in values], np.float64)


def _refuse(bad: npt.NDArray[np.bool_], values: Sequence[object], at: _At, expected: str) -> None:
    if bad.any():
        place = int(np.argmax(bad))
        raise FeatureError(at(place), values[place], expected)


def _in_column(field: str) -> _At:
    return lambda place: f"{field}[{place}]"


def _check_ids(ids: Sequence[object], at: _At) -> None:
    if not set(map(type, ids)) <= {str, int}:
        for place, value in enumerate(ids):
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise FeatureError(at(place), value, "a string or an integer")


def _check_names(given: Mapping[str, object], known: set[str], field: str) -> None:
    for name in given:
        if name not in known:
            expected = f"one of: {', '.join(sorted(known))}"
            raise FeatureError(field, name, expected)


def _check_length(column: Sequence[object], length: int, field: str) -> None:
    if len(column) != length:
        raise FeatureError(field, f"{len(column)} values", f"a column of {length} values")


def _count_missing(missing: dict[str, int], columns: _Columns, inputs: Arrays) -> None:
    """Notes in how many rows each feature of an entity is absent."""
    present = inputs[f"{columns.entity}_cat"] != 0, inputs[f"{columns.entity}_num"][:, 1::2] != 0
    for features, there in zip((columns.categorical, columns.numeric), present, strict=True):
        for feature, num in zip(features, there.sum(axis=0).tolist(), strict=True):
            if num < len(there):
                missing[feature.name] = len(there) - num
