"""Log lines can be read by machines, name their request, and give nobody and nothing away."""

from __future__ import annotations

import json
import logging
import logging.config
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import (
    Place,
    add_bundle,
    body,
    eventually,
    make_place,
    nan_below_minus_one,
    serving,
    settings_of,
)
from servers import free_port

from service import logs
from service.logs import BURST, BURST_S, Flood, JsonLines, TextLines, facts

ROOT = Path(__file__).parent.parent
SLOW = {"ECDCTR_SLOW_MS": "0.001", "ECDCTR_LOG_FORMAT": "json"}
"""Every request is slow."""


@contextmanager
def running(place: Place, log: Path, **environ: str) -> Iterator[httpx.Client]:
    """A service in a process of its own, whose stderr goes to `log`; ended by SIGTERM."""
    port = free_port()
    code = (
        "import os; from service.app import serve; from service.settings import Settings;"
        f" serve(Settings.from_env(os.environ), '127.0.0.1', {port}, 1)"
    )
    needed = {"ECDCTR_REGISTRY": str(place.registry.root), "ECDCTR_STORE": place.store_url}
    everything = {**os.environ, "PYTHONPATH": str(ROOT), **needed, **environ}
    with log.open("wb") as stderr:
        server = subprocess.Popen([sys.executable, "-c", code], env=everything, stderr=stderr)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            eventually(lambda: answers(client))
            yield client
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    finally:
        server.kill()
        server.wait()


def answers(client: httpx.Client) -> bool:
    try:
        return client.get("/readyz").status_code == 200
    except httpx.TransportError:
        return False


def lines(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.read_text().splitlines()]


def slow_ones(log: Path) -> list[dict[str, Any]]:
    return [line for line in lines(log) if line["message"] == "slow request"]


def test_every_line_of_a_service_is_an_object_those_of_the_server_too(
    place: Place, tmp_path: Path
) -> None:
    with running(place, tmp_path / "log", **SLOW) as client:
        client.post("/v1/score", json=body(request_id="auction-1"))
    found = lines(tmp_path / "log")
    assert {"time", "level", "logger", "process", "message"} <= set.intersection(*map(set, found))
    assert {"uvicorn.error", "service.live", "service.endpoints"} <= {f["logger"] for f in found}


def test_a_slow_request_is_told_with_its_stages_and_what_it_was(
    place: Place, tmp_path: Path
) -> None:
    with running(place, tmp_path / "log", **SLOW) as client:
        client.post("/v1/score", json=body(num=7, request_id="auction-1"))
        client.post("/v1/score", json=body(), headers={"x-request-id": "from-header"})
    first, second = slow_ones(tmp_path / "log")
    assert (first["request_id"], second["request_id"]) == ("auction-1", "from-header")
    assert first["model"] == place.registry.ids()[0]
    assert (first["candidates"], first["degraded"], first["level"]) == (7, {}, "warning")
    assert {"decode", "lookup", "run", "total"} <= set(first["stage_ms"])


def test_a_request_that_is_not_slow_leaves_no_line(place: Place, tmp_path: Path) -> None:
    environ = {"ECDCTR_SLOW_MS": "60000", "ECDCTR_LOG_FORMAT": "json"}
    with running(place, tmp_path / "log", **environ) as client:
        client.post("/v1/score", json=body())
    assert not slow_ones(tmp_path / "log")


@pytest.mark.parametrize("share", ["0", "1"])
def test_users_are_named_only_where_that_is_asked_for(
    place: Place, tmp_path: Path, share: str
) -> None:
    user = {"id": "somebody-in-particular"}
    with running(place, tmp_path / "log", **SLOW, ECDCTR_LOG_USER_SAMPLE=share) as client:
        client.post("/v1/score", json=body(user=user))
        client.post("/v1/score", json=body(user={**user, "age": 17}))
    assert ("somebody-in-particular" in (tmp_path / "log").read_text()) == (share == "1")


def test_text_is_for_a_terminal_and_holds_the_same(place: Place, tmp_path: Path) -> None:
    environ = {**SLOW, "ECDCTR_LOG_FORMAT": "text"}
    with running(place, tmp_path / "log", **environ) as client:
        client.post("/v1/score", json=body(request_id="two\nlines"))
    (line,) = [x for x in (tmp_path / "log").read_text().splitlines() if "slow request" in x]
    assert r"request_id='two\nlines'" in line
    assert "candidates=3" in line


@pytest.mark.parametrize("status", [200, 404, 413, 422])
def test_every_answer_names_its_request(place: Place, status: int) -> None:
    asked = {
        200: ("/v1/score", json.dumps(body()).encode()),
        404: ("/nowhere", b""),
        413: ("/v1/score", b" " * 5_000_000),
        422: ("/v1/score", b"{}"),
    }[status]
    with serving(settings_of(place)) as client:
        given = client.post(asked[0], content=asked[1], headers={"x-request-id": "abc"})
        made = {client.post(asked[0], content=asked[1]).headers["x-request-id"] for _ in range(3)}
    assert given.status_code == status
    assert given.headers["x-request-id"] == "abc"
    assert len(made) == 3


def test_the_id_in_the_body_wins_and_any_letters_fit_into_the_header(place: Place) -> None:
    with serving(settings_of(place)) as client:
        asked = body(request_id="Ä\r\nset-cookie: x")
        answer = client.post("/v1/score", json=asked, headers={"x-request-id": "abc"})
    assert answer.headers["x-request-id"] == "%C3%84%0D%0Aset-cookie:%20x"
    assert "set-cookie" not in answer.headers
    assert answer.json()["request_id"] == asked["request_id"]


def test_a_line_about_an_error_names_the_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    place = make_place(tmp_path)
    place.registry.promote(add_bundle(place, change_graph=nan_below_minus_one))
    formatted: list[str] = []
    handler = Kept(formatted)
    handler.setFormatter(JsonLines())
    logging.getLogger("service").addHandler(handler)
    try:
        with serving(settings_of(place)) as client:
            wrong = body(context={"slot": -1e6}, request_id="auction-9")
            assert client.post("/v1/score", json=wrong).status_code == 503
    finally:
        logging.getLogger("service").removeHandler(handler)
    (line,) = [json.loads(x) for x in formatted if json.loads(x)["level"] == "error"]
    assert line["request_id"] == "auction-9"


class Kept(logging.Handler):
    def __init__(self, into: list[str]) -> None:
        super().__init__()
        self.into = into

    def emit(self, record: logging.LogRecord) -> None:
        self.into.append(self.format(record))


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def a_record(message: str, *values: object, **named: object) -> logging.LogRecord:
    record = logging.LogRecord("service.x", logging.ERROR, "", 0, message, values, None)
    record.__dict__.update(facts(**named))
    return record


def test_an_outage_does_not_flood_the_log_and_what_was_left_out_is_told() -> None:
    clock = Clock()
    flood = Flood(clock)
    passed = [flood.filter(a_record("store %s is away", n)) for n in range(1000)]
    assert passed == [True] * BURST + [False] * (1000 - BURST)
    assert flood.filter(a_record("something else")), "another kind of line is not held back"
    clock.now_s = BURST_S
    later = a_record("store %s is away", 1, model="m")
    assert flood.filter(later)
    line = json.loads(JsonLines().format(later))
    assert (line["left_out"], line["model"]) == (1000 - BURST, "m")


def test_kinds_of_lines_have_no_end_and_the_filter_has() -> None:
    flood = Flood(Clock())
    assert all(flood.filter(a_record(f"made up {n}")) for n in range(10_000))
    assert len(flood._kinds) <= 200


@pytest.mark.parametrize("formatter", [JsonLines(), TextLines()])
def test_no_password_of_a_url_gets_into_a_line(formatter: logging.Formatter) -> None:
    try:
        raise OSError("redis://training:secret@host:6379 is away")
    except OSError:
        record = a_record("asking %s", "rediss://:se@cret@host/0", url="redis://u:secret@h")
        record.exc_info = sys.exc_info()
    line = formatter.format(record)
    assert "secret" not in line
    assert "cret@" not in line
    assert "host:6379 is away" in line


def test_the_configuration_is_one_that_logging_takes() -> None:
    with keeping_root():
        logging.config.dictConfig(logs.config("info", "json"))
        (handler,) = logging.getLogger().handlers
        assert isinstance(handler.formatter, JsonLines)
        assert isinstance(handler.filters[0], Flood)


@contextmanager
def keeping_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
