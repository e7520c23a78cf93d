"""Log lines: JSON for machines, text for a terminal, each with the request that it is about."""

from __future__ import annotations

import logging
import random
import re
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.answers import header

HEADER = b"x-request-id"
BURST = 20
"""Lines of one kind within `BURST_S` seconds; more are left out and counted."""
BURST_S = 10.0
_MAX_KINDS = 200
_MAX_LENGTH = 128
_PASSWORD = re.compile(r"(://)[^/\s]*@")
_FACTS = "facts"


@dataclass
class Trail:
    """What is known of one request so far, for its log lines, its trace and its answer."""

    request_id: str
    stages: Mapping[str, float] = field(default_factory=dict)
    """Seconds by stage, in the order in which the stages began."""
    facts: Mapping[str, object] = field(default_factory=dict)
    """What it was, in numbers: model, candidates, …"""


_trail: ContextVar[Trail | None] = ContextVar("trail", default=None)


def trail() -> Trail:
    """That of the request that is being answered; one of its own where there is none."""
    return _trail.get() or Trail("")


class FollowRequests:
    """ASGI middleware: each request has an id, from its header or made up, which its log lines and
    its answer carry."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        own = Trail((header(scope, HEADER) or "")[:_MAX_LENGTH] or f"{random.getrandbits(64):016x}")

        async def naming(message: Message) -> None:
            if message["type"] == "http.response.start":
                # Bodies may name a request in any letters, headers may not.
                named = quote(own.request_id, safe="!#$&+-.:=@_~").encode()
                message = {**message, "headers": [*message["headers"], (HEADER, named)]}
            await send(message)

        token = _trail.set(own)
        try:
            await self._app(scope, receive, naming)
        finally:
            _trail.reset(token)


class JsonLines(logging.Formatter):
    """One object per line, which is all that a collector of logs needs to know."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "process": record.process,
            "message": _redacted(record.getMessage()),
            **_facts(record),
        }
        if record.exc_info:
            line["exception"] = _redacted(self.formatException(record.exc_info))
        return orjson.dumps(line, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


class TextLines(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(process)d %(name)s: %(message)s")

    def format(self, record: logging.LogRecord) -> str:
        first, newline, rest = super().format(record).partition("\n")
        facts = "".join(f" {name}={value!r}" for name, value in _facts(record).items())
        return _redacted(f"{first}{facts}{newline}{rest}")


class Flood(logging.Filter):
    """Lets `BURST` lines of one kind through in `BURST_S` seconds; the next one after that says how
    many were left out. A kind is a message before its values are put in."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._kinds: dict[tuple[str, int, str], _Kind] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        now_s = self._clock()
        if len(self._kinds) >= _MAX_KINDS:
            self._kinds.clear()
        kind = self._kinds.setdefault(
            (record.name, record.levelno, str(record.msg)), _Kind(started_s=now_s)
        )
        if now_s - kind.started_s >= BURST_S:
            if kind.num > BURST:
                record.__dict__[_FACTS] = {**_given(record), "left_out": kind.num - BURST}
            kind.started_s, kind.num = now_s, 0
        kind.num += 1
        return kind.num <= BURST


@dataclass
class _Kind:
    started_s: float
    num: int = 0


def facts(**named: object) -> dict[str, object]:
    """For `extra=` of a log call: values that stand beside the message, by name."""
    return {_FACTS: named}


def config(level: str, form: str) -> dict[str, Any]:
    """For `logging.config.dictConfig`. `form`: json or text."""
    handler = {"class": "logging.StreamHandler", "formatter": "line", "filters": ["flood"]}
    return {
        "version": 1,
        "disable_existing_loggers": False,
        "formatters": {"line": {"()": JsonLines if form == "json" else TextLines}},
        "filters": {"flood": {"()": Flood}},
        "handlers": {"stderr": handler},
        "root": {"level": level.upper(), "handlers": ["stderr"]},
    }


def _facts(record: logging.LogRecord) -> dict[str, object]:
    own = _trail.get()
    request = {"request_id": own.request_id} if own else {}
    return {**request, **_given(record)}


def _given(record: logging.LogRecord) -> dict[str, object]:
    given: dict[str, object] = record.__dict__.get(_FACTS, {})
    return {k: _redacted(v) if isinstance(v, str) else v for k, v in given.items()}


def _redacted(text: str) -> str:
    """Without the user and the password of any URL in it."""
    return _PASSWORD.sub(r"\1…@", text)
