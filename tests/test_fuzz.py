"""Malformed and hostile requests: each has one documented answer, and none disturbs the others.

ECDCTR_FUZZ says how many hostile bodies are sent: 2,000 unless set, 100,000 in `make test-load`.
"""

from __future__ import annotations

import copy
import gzip
import json
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis
from bundles import ITEMS, add_live_bundle, body, make_place, serving, settings_of
from hypothesis import HealthCheck, given, settings
from runclock import run_s
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

NUM_HOSTILE = int(os.environ.get("ECDCTR_FUZZ", "2000"))
CHECKS = [status_code_conformance, content_type_conformance, response_schema_conformance]
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = make_place(tmp_path_factory.mktemp("fuzz"))
    add_live_bundle(place)
    limits = {"max_body_bytes": 200_000, "max_candidates": 500, "body_timeout_s": 0.5}
    with serving(settings_of(place, **limits)) as running:
        yield running


@pytest.mark.filterwarnings("ignore")  # of schemathesis' own
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_generated_requests_are_answered_as_the_api_documents(
    client: httpx.Client, mode: GenerationMode
) -> None:
    schema = schemathesis.openapi.from_url(f"{client.base_url}/openapi.json")
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {"/v1/score", "/v1/models", "/livez"} <= {operation.path for operation in operations}
    for operation in operations:
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue  # nothing to spoil
        strategy = operation.as_strategy(generation_mode=mode)

        @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
        @given(case=strategy)
        def check(case: Any) -> None:
            response = case.call(timeout=20)
            # A deadline that has passed; while a model is live there is no other 5xx.
            assert response.status_code < 500 or (
                response.status_code == 504 and case.body["deadline_ms"] is not None
            )
            case.validate_response(response, checks=CHECKS)

        check()


# Hostile bodies

ODD = [None, True, 0, -1, 1e308, -1e308, 2**63, 2**64, 10**400, "", "\x00", "é" * 300, "x" * 10_000]
ODD += [[], {}, [None], {"a": 1}, [[[]]], "NaN", "1e999", "18446744073709551616"]
RAW = [
    b"NaN",
    b"Infinity",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"01",
    b"+1",
    b".5",
    b"'x'",
    b"\xff",
]
RAW += [b"[" * 3000, b'{"a":' * 3000, b"9" * 5000, b'"' + b"\\u0041" * 2000 + b'"', b"", b"\x00"]


class Hostile:
    """Bodies that are wrong in one or in a few places, the same for the same seed."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def body(self) -> bytes:
        kind = self._random.randrange(5)
        document = self._document()
        if kind == 0:
            return self._mutated(json.dumps(document).encode())
        if kind == 1:
            return self._with_raw(json.dumps(document).encode())
        for _ in range(self._random.randrange(1, 4)):
            self._spoil(document)
        return json.dumps(document).encode()

    def _document(self) -> dict[str, Any]:
        num = self._random.choice([0, 1, 3, 30])
        ids = [self._random.choice(ITEMS) for _ in range(num)]
        columns = {"price": [1.5] * num, "category": ["food"] * num}
        return copy.deepcopy(body(candidates={"id": ids, "features": columns}))

    def _spoil(self, document: Any) -> None:
        """Replaces, removes, repeats or adds something in a random place."""
        while True:
            keys = list(document) if isinstance(document, dict) else list(range(len(document)))
            if not keys:
                return
            key = self._random.choice(keys)
            inner = document[key]
            if not isinstance(inner, dict | list) or self._random.random() < 0.3:
                break
            document = inner
        action = self._random.randrange(4)
        if action == 0:
            del document[key]
        elif action == 1 and isinstance(document, dict):
            document[self._random.choice(["id", "more", "", "features"])] = self._odd()
        elif action == 1:
            document.append(self._odd())
        else:
            document[key] = self._odd()

    def _odd(self) -> Any:
        return copy.deepcopy(self._random.choice(ODD))

    def _mutated(self, content: bytes) -> bytes:
        changed = bytearray(content)
        for _ in range(self._random.randrange(1, 8)):
            place = self._random.randrange(len(changed))
            changed[place : place + self._random.randrange(3)] = self._random.randbytes(
                self._random.randrange(3)
            )
        return bytes(changed[: self._random.choice([len(changed), len(changed) // 2])])

    def _with_raw(self, content: bytes) -> bytes:
        numbers = [place for place in range(len(content)) if content[place : place + 1].isdigit()]
        place = self._random.choice(numbers)
        return content[:place] + self._random.choice(RAW) + content[place + 1 :]


def test_hostile_bodies_are_never_a_fault_of_the_service_and_disturb_nobody(
    client: httpx.Client,
) -> None:
    good = body()
    right = client.post("/v1/score", json=good).json()["scores"]
    slowest_s, is_over = 0.0, threading.Event()

    def probe() -> None:
        nonlocal slowest_s
        with httpx.Client(base_url=client.base_url, timeout=20) as other:
            while not is_over.is_set():
                started_s = run_s()
                assert other.post("/v1/score", json=good).json()["scores"] == right
                slowest_s = max(slowest_s, run_s() - started_s)
                time.sleep(0.005)

    neighbour = threading.Thread(target=probe)
    neighbour.start()
    hostile, statuses = Hostile(seed=1), dict[int, int]()
    try:
        for _ in range(NUM_HOSTILE):
            content = hostile.body()
            response = client.post("/v1/score", content=content, headers=JSON)
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1
            assert response.status_code in (200, 400, 413, 422), (content, response.text)
            if response.status_code != 200:
                assert response.headers["content-type"] == "application/problem+json"
                assert response.json()["status"] == response.status_code
    finally:
        is_over.set()
        neighbour.join()
    assert {200, 400, 422} <= statuses.keys()
    assert slowest_s < 2.0
    assert client.post("/v1/score", json=good).json()["scores"] == right


# One documented answer each

LONG = {"id": ITEMS[:3], "features": {"price": [1.0, 2.0]}}
MANY = {"id": ["item-1"] * 501}
DEEP = b'{"user": ' + b"[" * 100_000 + b"]" * 100_000 + b', "candidates": {"id": []}}'


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"x" * 300_000, JSON, 413),
        (DEEP, JSON, 413),
        (DEEP[:150_000], JSON, 400),
        (json.dumps(body(candidates=LONG)).encode(), JSON, 422),
        (json.dumps(body(candidates=MANY)).encode(), JSON, 422),
        (b'{"user": {"id": NaN}, "candidates": {"id": []}}', JSON, 422),
        (b'{"user": {"id": 1' + b"0" * 400 + b'}, "candidates": {"id": []}}', JSON, 422),
        (b'{"user": {"id": "\\ud800"}, "candidates": {"id": []}}', JSON, 400),
        (b'{"user": {"id": 1}, "candidates": {"id": [1.5]}}', JSON, 422),
        (gzip.compress(b" " * 10_000_000), {**JSON, "content-encoding": "gzip"}, 415),
        (json.dumps(body()).encode(), {"content-type": "text/csv"}, 415),
        (b"\xff\xfe" + json.dumps(body()).encode("utf-16-le"), JSON, 400),
    ],
    ids=[
        "too large",
        "deep and too large",
        "deep",
        "columns of two lengths",
        "too many candidates",
        "NaN",
        "a huge integer",
        "half a surrogate pair",
        "an id of the wrong type",
        "compressed",
        "another media type",
        "UTF-16",
    ],
)
def test_what_is_wrong_has_one_answer(
    client: httpx.Client, content: bytes, headers: dict[str, str], status: int
) -> None:
    response = client.post("/v1/score", content=content, headers=headers)
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert client.get("/readyz").status_code == 200


def test_of_a_key_that_is_there_twice_the_last_counts(client: httpx.Client) -> None:
    text = json.dumps(body())
    twice = text.replace('{"user":', '{"user": {"id": "nobody"}, "user":', 1).encode()
    assert twice != text.encode()
    answers = [
        client.post("/v1/score", content=content, headers=JSON).json()["scores"]
        for content in (text.encode(), twice)
    ]
    assert answers[0] == answers[1]


def test_a_body_that_comes_too_slowly_is_given_up_and_its_connection_closed(
    client: httpx.Client,
) -> None:
    started_s = time.monotonic()
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as slow:
        slow.sendall(
            b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 1000\r\n\r\n{"
        )
        answer = b""
        while chunk := slow.recv(65_536):
            answer += chunk
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"the body must arrive within 0.5 s" in answer
    assert time.monotonic() - started_s < 10
    assert client.get("/readyz").status_code == 200


def test_a_body_that_is_broken_off_harms_nobody(client: httpx.Client) -> None:
    for _ in range(20):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as broken:
            broken.sendall(b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n{")
    assert client.post("/v1/score", json=body()).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        b"GET /v1/score HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 20_000 + b"\r\n",
        b"GET /" + b"x" * 200_000 + b" HTTP/1.1\r\n\r\n",
        b"\x00" * 1000 + b"\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: 5, 6\r\n\r\n",
        b"POST /v1/score HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nZZ\r\n",
    ],
    ids=["many headers", "a long path", "no HTTP", "two lengths", "a chunk of no size"],
)
def test_what_is_no_http_ends_its_own_connection_only(client: httpx.Client, text: bytes) -> None:
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as raw:
        raw.settimeout(5)
        try:
            raw.sendall(text)
            answer = raw.recv(65_536)
        except ConnectionError:
            answer = b""
    assert not answer.startswith(b"HTTP/1.1 5")
    assert client.post("/v1/score", json=body()).status_code == 200


def test_the_long_form_sends_a_hundred_thousand() -> None:
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    assert "ECDCTR_FUZZ=100000" in makefile
