"""From the bytes of a request to its columns.

A usual request goes by the short way of `service.usual`, which takes a fraction of the time;
pydantic accepts all others, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import FailFast, TypeAdapter, ValidationError

from service.errors import FieldError, InvalidRequestError, invalid
from service.schemas import MAX_EVENTS, Event, ScoreRequest
from service.settings import Settings
from service.usual import usual


def decode(body: bytes, settings: Settings) -> ScoreRequest:
    """A request from the bytes of its JSON, parsed and validated.

    Raises:
        MalformedJsonError: not JSON.
        InvalidRequestError: JSON, but not a request, or longer than `settings` allow.
    """
    request = usual(body) or validated(body)
    _check_length(request.candidates.id, settings.max_candidates, "candidates.id")
    if request.user.history:
        _check_length(request.user.history.items, settings.max_history, "user.history.items")
    return request


def validated(body: bytes) -> ScoreRequest:
    """The long way: each value as it was sent, none of them in an array.

    Raises:
        MalformedJsonError, InvalidRequestError: as `decode` does; but lengths are not looked at.
    """
    try:
        return ScoreRequest.model_validate_json(body)
    except ValidationError as error:
        raise invalid(error) from None


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


def _check_length(column: Sequence[Any], limit: int, field: str) -> None:
    if len(column) > limit:
        raise InvalidRequestError(
            [FieldError(field, f"{len(column)} values", f"a column of at most {limit} values")]
        )
