"""What can go wrong in a request, and the one table that says which HTTP status each error has.

    ServiceError
    ├── BodyTooLargeError          the body is larger than the service reads
    ├── SlowBodyError              the body does not arrive in time
    ├── UnsupportedMediaTypeError  the body is not sent as JSON
    ├── MalformedJsonError         the body is not JSON
    ├── InvalidRequestError        the JSON is not a request
    ├── NotReadyError              no bundle is live
    ├── ImpossibleScoreError       the model gave something that is no probability
    ├── OverloadedError            too much work waits for this to be done in time
    └── DeadlineExceededError      the caller's deadline passed before the scores were there

Every error answer is application/problem+json (RFC 9457).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus

import orjson
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_core import ErrorDetails
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from bundle.encode import FeatureError
from service.answers import Watched

log = logging.getLogger(__name__)

MEDIA_TYPE = "application/problem+json"
MAX_ERRORS = 20
_MAX_REPORTED = 1000
_MAX_TEXT = 100


class ServiceError(Exception):
    """Base of the service's own errors; the text is the `detail` of the answer."""


class BodyTooLargeError(ServiceError):
    pass


class SlowBodyError(ServiceError):
    pass


class UnsupportedMediaTypeError(ServiceError):
    pass


class MalformedJsonError(ServiceError):
    pass


@dataclass(frozen=True)
class FieldError:
    """One wrong value: its path in the body, what was there (shortened) and what would be right."""

    field: str
    value: str
    expected: str


class InvalidRequestError(ServiceError):
    def __init__(self, errors: Sequence[FieldError]) -> None:
        super().__init__("; ".join(f"{e.field}: {e.value} is not {e.expected}" for e in errors[:3]))
        self.errors = tuple(errors)


class NotReadyError(ServiceError):
    pass


class ImpossibleScoreError(ServiceError):
    pass


class OverloadedError(ServiceError):
    pass


class DeadlineExceededError(ServiceError):
    pass


@dataclass(frozen=True)
class Kind:
    """How a kind of error is answered; `slug` is the end of the problem's `type`."""

    status: int
    slug: str
    title: str
    retry_after_s: int = 0
    """When to try again; 0: nothing is said."""


TABLE: Mapping[type[Exception], Kind] = {
    BodyTooLargeError: Kind(413, "body-too-large", "Body too large"),
    SlowBodyError: Kind(408, "slow-body", "The body came too slowly"),
    UnsupportedMediaTypeError: Kind(415, "unsupported-media-type", "The body must be JSON"),
    MalformedJsonError: Kind(400, "malformed-json", "Malformed JSON"),
    ClientDisconnect: Kind(400, "disconnected", "The body was broken off"),
    InvalidRequestError: Kind(422, "invalid-request", "Invalid request"),
    FeatureError: Kind(422, "invalid-request", "Invalid request"),
    NotReadyError: Kind(503, "not-ready", "No model is live"),
    ImpossibleScoreError: Kind(503, "impossible-score", "The model gave no probability"),
    OverloadedError: Kind(503, "overloaded", "Overloaded", retry_after_s=1),
    DeadlineExceededError: Kind(504, "deadline-exceeded", "Deadline exceeded"),
}
_BROKEN_OFF = (408, 413)
"""Answered before the whole body was read: what comes of it would be taken for another request."""
_UNEXPECTED = Kind(500, "internal", "Internal error")


def problem(error: Exception) -> Response:
    """The answer to any exception; what `TABLE` does not know stays in the log."""
    if isinstance(error, HTTPException):
        return _http_problem(error)
    kind = TABLE.get(type(error), _UNEXPECTED)
    detail = "The error was logged." if kind is _UNEXPECTED else _shorten(str(error), 1000)
    document: dict[str, object] = {
        "type": f"urn:ecdctr:problem:{kind.slug}",
        "title": kind.title,
        "status": kind.status,
        "detail": detail,
    }
    if fields := _field_errors(error):
        document["errors"] = fields[:MAX_ERRORS]
    headers = {"retry-after": str(kind.retry_after_s)} if kind.retry_after_s else {}
    if kind.status in _BROKEN_OFF:
        headers["connection"] = "close"
    return Response(orjson.dumps(document), kind.status, headers, media_type=MEDIA_TYPE)


def install(app: FastAPI) -> None:
    """Makes `problem` the answer to every error of `app`, unknown paths and methods included."""

    async def answer(request: Request, error: Exception) -> Response:
        return problem(error)

    kinds: tuple[type[Exception], ...] = (HTTPException, *TABLE, Exception)
    for kind in kinds:
        app.add_exception_handler(kind, answer)


class AnswerFaults:
    """ASGI middleware that logs and answers what no handler knows.

    starlette's own raises it again after answering, upon which uvicorn closes the connection, and
    with it fails a request that has nothing to do with the fault.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watched = Watched(send)
        try:
            await self._app(scope, receive, watched)
        except Exception as error:
            if watched.status is not None or scope["type"] != "http":
                raise
            log.exception("%s %s failed", scope["method"], getattr(scope.get("route"), "path", ""))
            await problem(error)(scope, receive, send)


def invalid(error: ValidationError) -> ServiceError:
    """pydantic's findings as one of our errors, with paths: ("candidates", "id", 3) becomes
    "candidates.id[3]"."""
    if error.error_count() > _MAX_REPORTED:
        # Describing each one would hold up everybody else.
        text = f"{error.error_count()} wrong values"
        return InvalidRequestError([FieldError("body", text, "a request")])
    found = error.errors(include_url=False, include_context=False)
    if found[0]["type"] == "json_invalid":
        return MalformedJsonError(found[0]["msg"])
    return InvalidRequestError([_field_error(entry) for entry in found[:MAX_ERRORS]])


def _field_error(found: ErrorDetails) -> FieldError:
    value = "nothing" if found["type"] == "missing" else shown(found["input"])
    expected = _EXPECTED.get(found["type"], found["msg"].removeprefix("Input should be "))
    return FieldError(_shorten(_path(found["loc"])), value, expected)


def shown(value: object) -> str:
    """A value as it stands in an error, cut to a readable length."""
    return _shorten(repr(value))


_EXPECTED: Mapping[str, str] = {
    "missing": "a value; the field is required",
    "extra_forbidden": "a field of a request",
}


def _field_errors(error: Exception) -> list[dict[str, str]]:
    if isinstance(error, FeatureError):
        error = InvalidRequestError([FieldError(error.field, shown(error.value), error.expected)])
    if not isinstance(error, InvalidRequestError):
        return []
    return [{"field": e.field, "value": e.value, "expected": e.expected} for e in error.errors]


def _http_problem(error: HTTPException) -> Response:
    """Errors of the framework itself: unknown paths, wrong methods."""
    document = {
        "type": "about:blank",
        "title": HTTPStatus(error.status_code).phrase,
        "status": error.status_code,
        "detail": str(error.detail),
    }
    return Response(
        orjson.dumps(document), error.status_code, headers=error.headers, media_type=MEDIA_TYPE
    )


def _path(location: Sequence[str | int]) -> str:
    steps = [f"[{step}]" if isinstance(step, int) else f".{step}" for step in location]
    return "".join(steps).removeprefix(".") or "body"


def _shorten(text: str, limit: int = _MAX_TEXT) -> str:
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
