"""The short way from the bytes of a usual request to its columns.

simdjson parses it, and columns of numbers become arrays without a Python object for each number.
What is out of the ordinary in any way is left to pydantic, which accepts it or says what is wrong:
so this has to be strict, not complete.
"""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
import numpy.typing as npt
import simdjson

from bundle.ids import Id
from service.schemas import (
    MAX_ID_LENGTH,
    MAX_VALUE_LENGTH,
    Candidates,
    History,
    ScoreRequest,
    User,
)

_Fields = dict[str, Any]
_NUMBERS = frozenset({int, float})
_INT64 = np.iinfo(np.int64)
_LARGEST = 2.0**63
_MOST_NAMES = 256


class _UnusualError(Exception):
    """Something that the short way does not decide."""


def usual(body: bytes) -> ScoreRequest | None:
    """The request, if it is a usual one, with int64 and float64 arrays for columns of numbers;
    None if something else has to decide."""
    try:
        return _request(body)
    except _UnusualError:
        return None


def _request(body: bytes) -> ScoreRequest:
    # `model_construct` checks nothing, so all is checked here.
    top = _object(_parsed(body), {"user", "candidates"}, {"context", "request_id", "deadline_ms"})
    user = _object(top["user"], {"id"}, {"features", "history"})
    candidates = _object(top["candidates"], {"id"}, {"features"})
    columns = _named(candidates["features"]) if "features" in candidates else {}
    history = user.get("history")
    steps = {} if history is None else _object(history, {"items", "age_days", "count"}, set())
    _check_flat(body, [candidates["id"], *columns.values(), *steps.values()])
    _check_about(top.get("request_id"), top.get("deadline_ms"))
    return ScoreRequest.model_construct(
        user=User.model_construct(
            id=_id(user["id"]),
            features=_values(user["features"]) if "features" in user else {},
            history=_history(steps) if steps else None,
        ),
        context=_values(top["context"]) if "context" in top else {},
        candidates=Candidates.model_construct(
            id=_ids(candidates["id"]),
            features={name: _column(column) for name, column in columns.items()},
        ),
        request_id=top.get("request_id"),
        deadline_ms=top.get("deadline_ms"),
    )


def _parsed(body: bytes) -> object:
    _must(not body.startswith(BOM_UTF8))
    try:
        # One parser each: it refuses to parse while anything of the document before is alive.
        return simdjson.Parser().parse(body)
    except (RuntimeError, ValueError):  # too deep, a number too large; no JSON, not UTF-8
        raise _UnusualError from None


def _object(raw: object, needed: set[str], allowed: set[str]) -> _Fields:
    fields = _named(raw)
    _must(needed <= fields.keys() <= needed | allowed)
    return fields


def _named(raw: object) -> _Fields:
    """What is in an object, by name; arrays and objects in it as simdjson's."""
    if not isinstance(raw, simdjson.Object):
        raise _UnusualError
    # Each name is looked for from the beginning.
    _must(len(raw) <= _MOST_NAMES)
    names = list(raw)
    # simdjson would look for a name up to its first zero, and give the first of equal ones.
    _must(len(set(names)) == len(names) and not any("\0" in name for name in names))
    return {name: raw[name] for name in names}


def _check_flat(body: bytes, arrays: Sequence[object]) -> None:
    """simdjson makes one buffer of an array of arrays: there may be none."""
    if body.count(b"[") != len(arrays):  # there are, or texts have brackets
        for array in arrays:
            _must(isinstance(array, simdjson.Array) and list not in map(type, array.as_list()))


def _check_about(request_id: object, deadline_ms: object) -> None:
    _must(request_id is None or (type(request_id) is str and len(request_id) <= MAX_ID_LENGTH))
    _must(deadline_ms is None or type(deadline_ms) in _NUMBERS)


def _history(steps: _Fields) -> History:
    ages, counts = (_numbers(_array(steps[name])) for name in ("age_days", "count"))
    return History.model_construct(items=_ids(steps["items"]), age_days=ages, count=counts)


def _array(raw: object) -> simdjson.Array:
    if not isinstance(raw, simdjson.Array):
        raise _UnusualError
    return raw


def _id(raw: Any) -> Id:
    if type(raw) is int:
        _must(raw <= _INT64.max)
    else:
        _check_texts([raw])
    value: Id = raw
    return value


def _ids(raw: object) -> Sequence[Id]:
    column = _array(raw)
    if _kind(column) is int:
        return _integers(column)  # type: ignore[return-value]
    texts = column.as_list()
    _check_texts(texts)
    return texts  # type: ignore[return-value]


def _check_texts(ids: Sequence[Any]) -> None:
    _must(set(map(type, ids)) <= {str})
    _must(all(0 < length <= MAX_ID_LENGTH for length in set(map(len, ids))))


def _numbers(column: simdjson.Array) -> Sequence[float]:
    """int64 or float64 [n] of numbers without null."""
    if _kind(column) is int:
        try:
            return _integers(column)  # type: ignore[return-value]
        except _UnusualError:
            pass  # not all of them are
    return _floats(column)  # type: ignore[return-value]


def _integers(column: simdjson.Array) -> npt.NDArray[np.int64]:
    try:
        return np.frombuffer(column.as_buffer(of_type="i"), np.int64)
    except (TypeError, ValueError):
        raise _UnusualError from None


def _floats(column: simdjson.Array) -> npt.NDArray[np.float64]:
    try:
        numbers = np.frombuffer(column.as_buffer(of_type="d"), np.float64)
    except (TypeError, ValueError):
        raise _UnusualError from None
    # Integers of 64 bits without a sign are no integers here.
    _must(bool((np.abs(numbers) < _LARGEST).all()))
    return numbers


def _kind(column: simdjson.Array) -> type:
    """Of its first value."""
    first: object = column[0] if len(column) else None
    return type(first)


def _column(raw: object) -> Sequence[Any]:
    """A column of values: an array where all are numbers."""
    column = _array(raw)
    if _kind(column) in _NUMBERS:
        try:
            return _numbers(column)
        except _UnusualError:
            pass  # a null or a text among them
    values = column.as_list()
    _check_values(values)
    return values


def _values(raw: object) -> dict[str, Any]:
    """Values by feature."""
    if not isinstance(raw, simdjson.Object):
        raise _UnusualError
    values = raw.as_dict()
    _must(len(values) == len(raw))
    _check_values(list(values.values()))
    return values


def _check_values(values: Sequence[Any]) -> None:
    types = set(map(type, values))
    _must(types <= _NUMBERS | {str, NoneType})
    if str in types:
        texts = values if len(types) == 1 else [v for v in values if type(v) is str]
        _must(max(map(len, texts)) <= MAX_VALUE_LENGTH)
    if types & _NUMBERS:
        _must(all(abs(v) < _LARGEST for v in values if type(v) in _NUMBERS))


def _must(is_usual: bool) -> None:
    if not is_usual:
        raise _UnusualError
