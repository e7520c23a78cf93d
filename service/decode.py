"""From the bytes of a request to its columns.

A usual request goes by a short way, which takes a third of the time: orjson parses it, columns are
checked as a whole, and numbers become arrays. What is out of the ordinary in any way goes to
pydantic, which accepts it or says what is wrong: so the short way has to be strict, not complete.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import Annotated, Any

import numpy as np
import orjson
from pydantic import FailFast, TypeAdapter, ValidationError

from service.errors import FieldError, InvalidRequestError, invalid
from service.schemas import (
    MAX_EVENTS,
    MAX_ID_LENGTH,
    MAX_VALUE_LENGTH,
    Candidates,
    Event,
    History,
    ScoreRequest,
    User,
)
from service.settings import Settings

_NUMBERS = frozenset({int, float})
_INT64 = np.iinfo(np.int64)
_LARGEST = 2.0**63


class _UnusualError(Exception):
    """Something that the short way does not decide."""


def decode(body: bytes, settings: Settings) -> ScoreRequest:
    """A request from the bytes of its JSON, parsed and validated.

    Raises:
        MalformedJsonError: not JSON.
        InvalidRequestError: JSON, but not a request, or longer than `settings` allow.
    """
    try:
        request = _usual(orjson.loads(body))
    except (orjson.JSONDecodeError, _UnusualError):
        request = _validated(body)
    _check_length(request.candidates.id, settings.max_candidates, "candidates.id")
    if request.user.history:
        _check_length(request.user.history.items, settings.max_history, "user.history.items")
    return request


_EVENTS: TypeAdapter[Annotated[list[Event], FailFast()]] = TypeAdapter(
    Annotated[list[Event], FailFast()]
)


def decode_events(body: bytes) -> list[Event]:
    """Events from the bytes of their JSON: a list of them, or one alone.

    Raises:
        MalformedJsonError: not JSON.
        InvalidRequestError: JSON, but not events, or more than `MAX_EVENTS`.
    """
    try:
        if not body.lstrip().startswith(b"["):
            return [Event.model_validate_json(body)]
        events = _EVENTS.validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None
    _check_length(events, MAX_EVENTS, "body")
    return events


def _validated(body: bytes) -> ScoreRequest:
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


def _usual(raw: Any) -> ScoreRequest:
    """The request, if it is a usual one; `model_construct` checks nothing, so all is checked here.

    Raises:
        _UnusualError: it is not.
    """
    top = _object(raw, {"user", "candidates"}, {"context", "request_id", "deadline_ms"})
    user = _object(top["user"], {"id"}, {"features", "history"})
    candidates = _object(top["candidates"], {"id"}, {"features"})
    _ids([user["id"]])
    _ids(candidates["id"])
    columns = candidates.get("features", {})
    _must(type(columns) is dict)
    columns = {name: _column(column) for name, column in columns.items()}
    context, features = top.get("context", {}), user.get("features", {})
    for values in (context, features):
        _must(type(values) is dict)
        _column(list(values.values()))
    request_id, deadline_ms = top.get("request_id"), top.get("deadline_ms")
    _must(request_id is None or (type(request_id) is str and len(request_id) <= MAX_ID_LENGTH))
    _must(deadline_ms is None or type(deadline_ms) in _NUMBERS)
    return ScoreRequest.model_construct(
        user=User.model_construct(
            id=user["id"], features=features, history=_history(user.get("history"))
        ),
        context=context,
        candidates=Candidates.model_construct(id=candidates["id"], features=columns),
        request_id=request_id,
        deadline_ms=deadline_ms,
    )


def _history(raw: Any) -> History | None:
    if raw is None:
        return None
    columns = _object(raw, {"items", "age_days", "count"}, set())
    _ids(columns["items"])
    ages, counts = (_numbers(columns[name]) for name in ("age_days", "count"))
    return History.model_construct(items=columns["items"], age_days=ages, count=counts)


def _object(raw: Any, needed: set[str], allowed: set[str]) -> dict[str, Any]:
    _must(type(raw) is dict and needed <= raw.keys() and raw.keys() <= needed | allowed)
    fields: dict[str, Any] = raw
    return fields


def _ids(column: Any) -> None:
    _must(type(column) is list)
    types = set(map(type, column))
    if types == {int}:
        _must(max(column) <= _INT64.max)
    else:
        _must(types <= {str})
        _must(all(0 < length <= MAX_ID_LENGTH for length in set(map(len, column))))


def _numbers(column: Any) -> Sequence[float]:
    """int64 or float64 [n] of a column of numbers without null."""
    _must(type(column) is list)
    types = set(map(type, column))
    if types == {int}:
        try:
            return np.array(column, np.int64)  # type: ignore[return-value]
        except OverflowError:
            raise _UnusualError from None
    _must(types <= _NUMBERS)
    numbers = np.array(column, np.float64)
    # orjson reads integers of more than 64 bits as floats.
    _must(bool((np.abs(numbers) < _LARGEST).all()))
    return numbers  # type: ignore[return-value]


def _column(column: Any) -> Sequence[Any]:
    """A column of values: an array where all are numbers."""
    _must(type(column) is list)
    values: list[Any] = column
    types = set(map(type, values))
    if types and types <= _NUMBERS:
        return _numbers(values)
    _must(types <= _NUMBERS | {str, NoneType})
    if str in types:
        texts = values if len(types) == 1 else [v for v in values if type(v) is str]
        _must(max(map(len, texts)) <= MAX_VALUE_LENGTH)
    if types & _NUMBERS:
        _numbers([value for value in values if type(value) in _NUMBERS])
    return values


def _must(usual: bool) -> None:
    if not usual:
        raise _UnusualError


def _check_length(column: list[Any], limit: int, field: str) -> None:
    if len(column) > limit:
        raise InvalidRequestError(
            [FieldError(field, f"{len(column)} values", f"a column of at most {limit} values")]
        )
