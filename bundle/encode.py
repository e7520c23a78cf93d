"""The one encoder: raw feature values to the arrays that the network reads, offline and online.

Training encodes whole columns, serving encodes requests; both go through `Encoder.categorical`
and `Encoder.numeric`. Unknown and absent values become *missing* (index 0, presence 0); values of
the wrong type or out of range are errors that name the field.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt

from bundle.ids import Id, Keys, hash_ids
from bundle.items import ItemTable
from bundle.known import UNKNOWN, KnownRows
from bundle.match import History
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
    `item_features` columns with `item_ids`. Columns may be arrays: int64 of ids, int64 or float64
    of numbers."""

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


@dataclass(frozen=True, eq=False)
class Encoded:
    """What the network reads of a request (but for the TPM windows and what belongs to the items
    alone), and what the store is asked for.

    inputs: user_cat int32 [1, Fu], user_num float32 [1, 2 Gu], context_cat int32 [1, Fc],
    context_num float32 [1, 2 Gc]; history_item int64 [1, A], history_cat int32 [1, A, M] and
    history_num float32 [1, A, 2] (age in days, count) of the newest A = `attend` steps, padded with
    zeros; match float32 [N, W], see `bundle.match`; given_cat int32 [N, Fg] and given_num float32
    [N, 2 Gg] of the features that only a request knows.
    missing: by feature name, in how many of the N candidates (1 for user and context) it is absent.
    """

    inputs: Arrays
    user_key: Keys
    """uint64 [1]"""
    item_keys: Keys
    """uint64 [N]"""
    item_rows: npt.NDArray[np.int64]
    """[N], of the item table; unknown items have its row of missing values."""
    item_cat: npt.NDArray[np.int32] | None
    """int32 [N, Fi], where the request has other values than the item table; else None, and
    `Encoder.item_inputs` gives them. item_num, float32 [N, 2 Gi], likewise."""
    item_num: npt.NDArray[np.float32] | None
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
        self._given = _given(self._item)
        item_cat = [f.name for f in self._item.categorical]
        self._match_columns = [item_cat.index(name) for name in spec.history.match]
        self._rows = KnownRows()

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
        # take() is twice as fast as indexing.
        whole = self.items.categorical.take(rows, axis=0)
        columns: npt.NDArray[np.int32] = whole.take(self._match_columns, axis=-1)
        return columns

    def request(self, request: Request) -> Encoded:
        """Encodes one request.

        Raises:
            FeatureError: an unknown feature name, a value of the wrong type, a wrong length.
        """
        self._check(request)
        missing: dict[str, int] = {}
        inputs: Arrays = {}
        keys, rows = self._look_up(request.item_ids)
        user = {**request.user_features, "user_id": request.user_id}
        self._single(inputs, missing, self._user, user, "user.features")
        self._single(inputs, missing, self._context, request.context, "context")
        categorical, numeric = self._items(missing, request, rows)
        self._given_columns(inputs, missing, request)
        self._history(inputs, missing, request, keys, self._matched(rows, categorical))
        user_key = hash_ids([request.user_id])
        return Encoded(inputs, user_key, keys, rows, categorical, numeric, missing)

    def item_inputs(self, encoded: Encoded, places: npt.NDArray[np.int64]) -> Arrays:
        """item_cat int32 [m, Fi] and item_num float32 [m, 2 Gi] of the candidates at m places."""
        rows = encoded.item_rows[places]
        categorical, numeric = encoded.item_cat, encoded.item_num
        return {
            "item_cat": self.items.categorical.take(rows, axis=0)
            if categorical is None
            else categorical[places],
            "item_num": self.items.numeric.take(rows, axis=0)
            if numeric is None
            else numeric[places],
        }

    def _look_up(self, ids: Sequence[Id]) -> tuple[Keys, npt.NDArray[np.int64]]:
        """Keys and rows of items. Those that are in the table are remembered; unknown ones are
        not, for they have no bound."""
        ids, table = _as_integers(ids), self.items.keys
        rows = self._rows.find(ids)
        keys = table.take(rows, mode="clip") if len(table) else np.zeros(len(ids), np.uint64)
        new = np.flatnonzero(rows == UNKNOWN)
        if new.size:
            asked = _at_places(ids, new)
            keys[new] = hash_ids(asked)
            rows[new] = found = self.items.rows(keys[new])
            is_known = np.flatnonzero(found < self.items.missing_row)
            self._rows.learn(_at_places(asked, is_known), found[is_known])
        return keys, rows

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

        indices = [
            self._index(feature, values.get(feature.name), field) for feature in columns.categorical
        ]
        # The numbers of all features are encoded as one column.
        numbers = [values.get(feature.name) for feature in columns.numeric]
        pairs = _pairs(
            columns.is_log, numbers, lambda place: f"{field}.{columns.numeric[place].name}"
        )
        inputs[f"{columns.entity}_cat"] = np.array([indices], np.int32)
        inputs[f"{columns.entity}_num"] = pairs.reshape(1, -1)
        present = *indices, *pairs[:, 1].tolist()
        for feature, there in zip(columns.all, present, strict=True):
            if not there:
                missing[feature.name] = 1

    def _history(
        self,
        inputs: Arrays,
        missing: dict[str, int],
        request: Request,
        item_keys: Keys,
        item_matched: npt.NDArray[np.int32],
    ) -> None:
        keys, matched, ages, counts = self._steps(request)
        if not keys.size:
            missing[self.spec.history.name] = 1
        columns = range(len(self._match_columns))
        levels = [(keys, item_keys.astype(np.int64))]
        levels += [(matched[:, i], item_matched[:, i]) for i in columns]  # type: ignore[misc]
        inputs["match"] = History(ages, counts).match(levels)  # type: ignore[arg-type]
        numbers = np.stack([ages, counts], axis=1).astype(np.float32)
        inputs["history_item"] = self._newest(keys)
        inputs["history_cat"], inputs["history_num"] = self._newest(matched), self._newest(numbers)

    def whole_history(self, request: Request) -> Arrays:
        """history_item int64 [1, L], history_cat int32 [1, L, M] and history_num float32 [1, L, 2]
        of all steps that `match` counts; at least one, of zeros."""
        keys, matched, ages, counts = self._steps(request)
        length = max(len(keys), 1)
        numbers = np.stack([ages, counts], axis=1).astype(np.float32)
        return {
            "history_item": _padded(keys, length),
            "history_cat": _padded(matched, length),
            "history_num": _padded(numbers, length),
        }

    def _steps(
        self, request: Request
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.int32],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
    ]:
        """Keys [L], matched features [L, M], ages in days [L] and counts [L] of the history, newest
        first, at most `max_length` steps."""
        ages = self._history_column(request.history_age_days, "user.history.age_days")
        counts = self._history_column(request.history_count, "user.history.count")
        keys, rows = self._look_up(request.history_items)
        newest = np.argsort(ages, kind="stable")[: self.spec.history.max_length]
        matched = self.history_categorical(rows[newest])
        return keys[newest].astype(np.int64), matched, ages[newest], counts[newest]

    def _newest(self, steps: npt.NDArray[np.generic]) -> npt.NDArray[np.generic]:
        """[1, A, ...] of steps [L, ...], newest first."""
        return _padded(steps[: self.spec.history.attend], self.spec.history.attend)

    def _matched(
        self, rows: npt.NDArray[np.int64], categorical: npt.NDArray[np.int32] | None
    ) -> npt.NDArray[np.int32]:
        """The matched features int32 [N, M] of the candidates."""
        if categorical is None:
            return self.history_categorical(rows)
        return categorical.take(self._match_columns, axis=1)

    def _history_column(self, values: Sequence[float], field: str) -> npt.NDArray[np.float64]:
        at = _in_column(field)
        numbers, present = _numbers(values, at)
        _refuse(
            ~present | (numbers < 0) | (numbers > 1e6), values, at, "a number in 0 .. 1,000,000"
        )
        return numbers

    def _items(
        self, missing: dict[str, int], request: Request, rows: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int32] | None, npt.NDArray[np.float32] | None]:
        """Columns in which the request's values have replaced the item table's; None without."""
        table, given = self.items, request.item_features
        categorical = numeric = None
        if any(f.name in given and not f.given for f in self._item.categorical):
            categorical = table.categorical.take(rows, axis=0)
            for i, feature in enumerate(self._item.categorical):
                if feature.name in given and not feature.given:
                    values = self._column(feature, request)
                    categorical[:, i] = np.where(values > 0, values, categorical[:, i])
        if any(f.name in given and not f.given for f in self._item.numeric):
            numeric = table.numeric.take(rows, axis=0)
            for i, feature in enumerate(self._item.numeric):
                if feature.name in given and not feature.given:
                    pairs, pair = self._pair(feature, request), slice(2 * i, 2 * i + 2)
                    numeric[:, pair] = np.where(pairs[:, 1:] > 0, pairs, numeric[:, pair])
        self._count_absent(missing, rows, categorical, numeric)
        return categorical, numeric

    def _given_columns(self, inputs: Arrays, missing: dict[str, int], request: Request) -> None:
        """What only the request knows of its candidates."""
        num, given = len(request.item_ids), request.item_features
        columns = [
            self._column(f, request) if f.name in given else np.zeros(num, np.int32)
            for f in self._given.categorical
        ]
        inputs["given_cat"] = np.stack(columns, 1) if columns else np.zeros((num, 0), np.int32)
        inputs["given_num"] = self._given_numbers(request)
        _count_missing(missing, self._given, inputs["given_cat"], inputs["given_num"])

    def _given_numbers(self, request: Request) -> npt.NDArray[np.float32]:
        """float32 [N, 2 Gg]. All columns are encoded as one."""
        features, num = self._given.numeric, len(request.item_ids)
        places = [i for i, f in enumerate(features) if f.name in request.item_features]
        pairs = np.zeros((num, len(features), 2), np.float32)
        if places and num:
            names = [features[place].name for place in places]
            is_log = np.array([features[place].encoding == "log" for place in places])
            found = _pairs(
                np.repeat(is_log, num),
                _joined([request.item_features[name] for name in names]),
                lambda row: f"candidates.features.{names[row // num]}[{row % num}]",
            )
            pairs[:, places] = found.reshape(len(places), num, 2).transpose(1, 0, 2)
        return pairs.reshape(num, 2 * len(features))

    def _column(self, feature: Feature, request: Request) -> npt.NDArray[np.int32]:
        field = f"candidates.features.{feature.name}"
        return self.categorical(feature, request.item_features[feature.name], field)

    def _pair(self, feature: Feature, request: Request) -> npt.NDArray[np.float32]:
        field = f"candidates.features.{feature.name}"
        return self.numeric(feature, request.item_features[feature.name], field)

    def _count_absent(
        self,
        missing: dict[str, int],
        rows: npt.NDArray[np.int64],
        categorical: npt.NDArray[np.int32] | None,
        numeric: npt.NDArray[np.float32] | None,
    ) -> None:
        """Notes in how many candidates each feature of the item table is absent."""
        features = (*self._item.categorical, *self._item.numeric)
        marks = self.items.absent.take(rows, axis=0)
        counts = np.zeros(len(features), np.int64)
        if marks.any():
            counts += np.unpackbits(marks, axis=1, count=len(features)).sum(axis=0, dtype=np.int64)
        num_categorical = len(self._item.categorical)
        if categorical is not None:
            counts[:num_categorical] = (categorical == 0).sum(axis=0)
        if numeric is not None:
            counts[num_categorical:] = (numeric[:, 1::2] == 0).sum(axis=0)
        for feature, num in zip(features, counts.tolist(), strict=True):
            if num and not feature.given:
                missing[feature.name] = num

    def _index(self, feature: Feature, value: Value, field: str) -> int:
        """Like `_indices`, of one value, for which numpy's calls would take ten times as long.
        `field`: where it stands, but for its name."""
        if value is None:
            return 0
        if feature.encoding == "vocabulary" and type(value) is str:
            return self._known.get(feature.table, {}).get(value, 0)

        def at(_: int) -> str:
            return f"{field}.{feature.name}"

        if feature.encoding == "bucketise":
            (number,), _ = _numbers([value], at)
            return 1 + bisect_right(feature.boundaries, number)
        (text,) = _texts([value], at)
        if feature.encoding == "vocabulary":
            return self._known.get(feature.table, {}).get(text, 0)
        return 1 + int(hash_ids([str(text)])[0]) % (feature.buckets - 1)

    def _indices(self, feature: Feature, values: Sequence[Value], at: _At) -> npt.NDArray[np.int32]:
        if feature.encoding == "bucketise":
            numbers, present = _numbers(values, at)
            bucket = 1 + np.searchsorted(np.array(feature.boundaries), numbers, side="right")
            return np.where(present, bucket, 0).astype(np.int32)
        texts = _texts(values, at)
        if feature.encoding == "vocabulary":
            known = self._known.get(feature.table, {})
            return np.fromiter(map(known.get, texts, repeat(0)), np.int32, len(texts))
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
        self.all = self.categorical + self.numeric
        self.is_log = np.array([f.encoding == "log" for f in self.numeric], np.bool_)
        # What a request may name: ids and the history stand elsewhere in it.
        self.names = {f.name for f in self.all} - {"user_id", "item_id"}


@dataclass(frozen=True)
class _Given:
    """The features of items that only a request knows, by kind."""

    categorical: tuple[Feature, ...]
    numeric: tuple[Feature, ...]


def _given(items: _Columns) -> _Given:
    return _Given(
        tuple(f for f in items.categorical if f.given), tuple(f for f in items.numeric if f.given)
    )


def _places(table: str, values: Sequence[str]) -> dict[str | None, int]:
    places: dict[str | None, int] = {str(value): i for i, value in enumerate(values, 1)}
    if len(places) < len(values):
        raise ValueError(f"the vocabulary of {table!r} names a value twice")
    return places


def _texts(values: Sequence[Value], at: _At) -> Sequence[str | None]:
    """Categorical values as strings: 17 and "17" are the same."""
    if isinstance(values, np.ndarray):
        values = values.tolist()
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
        value = values[place]
        raise FeatureError(
            at(place), value.item() if isinstance(value, np.generic) else value, expected
        )


def _in_column(field: str) -> _At:
    return lambda place: f"{field}[{place}]"


def _check_ids(ids: Sequence[object], at: _At) -> None:
    if not isinstance(ids, np.ndarray) and not set(map(type, ids)) <= {str, int}:
        for place, value in enumerate(ids):
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise FeatureError(at(place), value, "a string or an integer")


def _as_integers(ids: Sequence[Id]) -> Sequence[Id]:
    """int64 [n] where all are integers; else the ids."""
    if isinstance(ids, np.ndarray) or set(map(type, ids)) != {int}:
        return ids
    try:
        return np.array(ids, np.int64)  # type: ignore[return-value]
    except OverflowError:
        return ids


def _at_places(ids: Sequence[Id], places: npt.NDArray[np.int64]) -> Sequence[Id]:
    if isinstance(ids, np.ndarray):
        return ids[places]
    return [ids[place] for place in places.tolist()]


def _check_names(given: Mapping[str, object], known: set[str], field: str) -> None:
    for name in given:
        if name not in known:
            expected = f"one of: {', '.join(sorted(known))}"
            raise FeatureError(field, name, expected)


def _check_length(column: Sequence[object], length: int, field: str) -> None:
    if len(column) != length:
        raise FeatureError(field, f"{len(column)} values", f"a column of {length} values")


def _joined(columns: Sequence[Sequence[Value]]) -> Sequence[Value]:
    """One column of several, one after the other: an array if they are arrays."""
    if all(isinstance(column, np.ndarray) for column in columns):
        return np.concatenate(columns)  # type: ignore[arg-type, return-value]
    return [value for column in columns for value in column]


def _padded(steps: npt.NDArray[np.generic], length: int) -> npt.NDArray[np.generic]:
    """[1, length, ...] of steps [L, ...], with zeros behind."""
    padded = np.zeros((1, length, *steps.shape[1:]), steps.dtype)
    padded[0, : len(steps)] = steps
    return padded


def _count_missing(
    missing: dict[str, int],
    given: _Given,
    categorical: npt.NDArray[np.generic],
    numeric: npt.NDArray[np.generic],
) -> None:
    """Notes in how many of N rows each feature is absent: int32 [N, Fg], float32 [N, 2 Gg]."""
    absent = (categorical == 0, numeric[:, 1::2] == 0)
    for features, marks in zip((given.categorical, given.numeric), absent, strict=True):
        if marks.any():
            for feature, num in zip(features, marks.sum(axis=0).tolist(), strict=True):
                if num:
                    missing[feature.name] = num
