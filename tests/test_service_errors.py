"""Every error is problem+json, names what is wrong, and leaves the service alive."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import ITEMS, add_live_bundle, body, make_place, serving, settings_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from embeddings_store import Reader, RequestWindows, Store, WindowRef
from service.schemas import ScoreRequest

MAX_BODY_BYTES = 100_000


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    place = make_place(tmp_path_factory.mktemp("errors"))
    add_live_bundle(place)
    limits = {"max_body_bytes": MAX_BODY_BYTES, "max_candidates": 100, "max_history": 10}
    with serving(settings_of(place, **limits)) as client:
        yield client


def problem_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert problem["type"]
    assert problem["title"]
    assert problem["detail"]
    return problem


def with_value(path: str, value: str) -> str:
    """A request as JSON text in which the value at `path` ("user.id") is the literal `value`."""
    document = body()
    document["candidates"]["features"] = {"price": [1, 2, 3], "category": ["food"] * 3}
    place: Any = document
    *steps, last = [int(step) if step.isdecimal() else step for step in path.split(".")]
    for step in steps:
        place = place[step]
    place[last] = "PLACE"
    return json.dumps(document).replace('"PLACE"', value)


HUGE = "9" * 30


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("user.id", "true", "user.id"),
        ("user.id", "1.5", "user.id"),
        ("user.id", '""', "user.id"),
        ("user.id", "null", "user.id"),
        ("user.id", HUGE, "user.id"),
        ("user.id", f'"{"x" * 129}"', "user.id"),
        ("user.features.age", "true", "user.features.age"),
        ("user.features.age", "1.5", "user.features.age"),
        ("user.features.income", '"12"', "user.features.income"),
        ("user.features.income", "-1", "user.features.income"),
        ("user.features.income", "NaN", "user.features.income"),
        ("user.features.income", "1e999", "user.features.income"),
        ("user.features.income", f'"{"x" * 300}"', "user.features.income"),
        ("user.features", '{"no_such": 1}', "user.features"),
        ("user.features", "[]", "user.features"),
        ("user.history.items.1", "false", "user.history.items[1]"),
        ("user.history.items", '["a"]', "user.history.age_days"),
        ("user.history.age_days.0", '"3"', "user.history.age_days[0]"),
        ("user.history.age_days.1", "-1", "user.history.age_days[1]"),
        ("user.history.age_days.0", "Infinity", "user.history.age_days[0]"),
        ("user.history.count.0", "null", "user.history.count[0]"),
        ("user.history.count.0", "true", "user.history.count[0]"),
        ("context.hour", '"9"', "context.hour"),
        ("context.slot", "-Infinity", "context.slot"),
        ("context.slot", "[1]", "context.slot"),
        ("context.moon", "1", "context"),
        ("candidates.id.2", "true", "candidates.id[2]"),
        ("candidates.id.2", "null", "candidates.id[2]"),
        ("candidates.id.0", "2.0", "candidates.id[0]"),
        ("candidates.id", '"item-1"', "candidates.id"),
        ("candidates.id", json.dumps(["x"] * 101), "candidates.id"),
        ("candidates.features.price.1", '"12"', "candidates.features.price[1]"),
        ("candidates.features.price.1", "true", "candidates.features.price[1]"),
        ("candidates.features.price.2", "NaN", "candidates.features.price[2]"),
        ("candidates.features.price.2", '"NaN"', "candidates.features.price[2]"),
        ("candidates.features.price.0", "-2", "candidates.features.price[0]"),
        ("candidates.features.price.0", "{}", "candidates.features.price[0]"),
        ("candidates.features.price", "[1, 2]", "candidates.features.price"),
        ("candidates.features.price", "3", "candidates.features.price"),
        ("candidates.features.category.1", "1.5", "candidates.features.category[1]"),
        ("candidates.features.colour", '["red", "red", "red"]', "candidates.features"),
        ("candidates.extra", "1", "candidates.extra"),
        ("request_id", "7", "request_id"),
        ("request_id", f'"{"x" * 129}"', "request_id"),
        ("deadline_ms", '"40"', "deadline_ms"),
        ("deadline_ms", "true", "deadline_ms"),
        ("deadline_ms", "NaN", "deadline_ms"),
        ("extra", "1", "extra"),
    ],
)
def test_a_wrong_value_is_a_422_that_names_its_field(
    client: httpx.Client, path: str, value: str, field: str
) -> None:
    response = client.post("/v1/score", content=with_value(path, value))
    problem = problem_of(response, 422)
    assert problem["errors"][0]["field"] == field
    assert problem["errors"][0]["expected"]
    assert len(problem["errors"][0]["value"]) <= 100


def test_of_numbers_in_a_column_of_categories_the_wrong_one_is_named(client: httpx.Client) -> None:
    features = {"category": [1, 2.5, 3]}
    document = body(candidates={"id": ITEMS[:3], "features": features})
    (error,) = problem_of(client.post("/v1/score", json=document), 422)["errors"]
    assert (error["field"], error["value"]) == ("candidates.features.category[1]", "2.5")


@pytest.mark.parametrize("field", ["user", "user.id", "candidates", "candidates.id"])
def test_a_missing_field_is_a_422_that_names_it(client: httpx.Client, field: str) -> None:
    document = body()
    *steps, last = field.split(".")
    del (document[steps[0]] if steps else document)[last]
    problem = problem_of(client.post("/v1/score", json=document), 422)
    assert [error["field"] for error in problem["errors"]] == [field]


def test_too_long_a_history_is_a_422(client: httpx.Client) -> None:
    document = body()
    numbers = [1] * 11
    document["user"]["history"] = {"items": numbers, "age_days": numbers, "count": numbers}
    problem = problem_of(client.post("/v1/score", json=document), 422)
    assert problem["errors"][0]["field"] == "user.history.items"
    assert problem["errors"][0]["expected"] == "a column of at most 10 values"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"not json",
        b"\xff\xfe",
        b'{"user": }',
        b'{"user": {"id": "\\ud800"}}',
        b"[" * 9999,
    ],
)
def test_what_is_not_json_is_a_400(client: httpx.Client, content: bytes) -> None:
    problem = problem_of(client.post("/v1/score", content=content), 400)
    assert problem["type"] == "urn:ecdctr:problem:malformed-json"


@pytest.mark.parametrize("content", [b"[]", b"null", b"3", b'"x"'])
def test_json_that_is_no_object_is_a_422(client: httpx.Client, content: bytes) -> None:
    problem = problem_of(client.post("/v1/score", content=content), 422)
    assert problem["errors"][0]["field"] == "body"


def test_a_form_is_a_415(client: httpx.Client) -> None:
    problem_of(client.post("/v1/score", data={"user": "1"}), 415)
    headers = {"content-type": "application/json; charset=utf-8"}
    assert client.post("/v1/score", content=json.dumps(body()), headers=headers).status_code == 200


def test_unknown_paths_and_wrong_methods_are_problems_too(client: httpx.Client) -> None:
    problem_of(client.get("/no/such/path"), 404)
    problem_of(client.post("/v1/score/", json=body()), 404)
    wrong = client.get("/v1/score")
    problem_of(wrong, 405)
    assert wrong.headers["allow"] == "POST"
    problem_of(client.delete("/livez"), 405)


def test_a_body_that_announces_too_many_bytes_is_a_413(client: httpx.Client) -> None:
    content = b" " * (MAX_BODY_BYTES + 1)
    problem = problem_of(client.post("/v1/score", content=content), 413)
    assert str(MAX_BODY_BYTES) in problem["detail"]
    problem_of(client.request("GET", "/livez", content=content), 413)
    fits = json.dumps(body()).encode().ljust(MAX_BODY_BYTES)
    assert client.post("/v1/score", content=fits).status_code == 200


def test_a_chunked_body_is_cut_off_at_the_limit(client: httpx.Client) -> None:
    def chunks(num: int) -> Iterator[bytes]:
        for _ in range(num):
            yield b" " * 10_000

    problem_of(client.post("/v1/score", content=chunks(2000)), 413)
    problem_of(client.post("/v1/score", content=chunks(10)), 400)
    assert client.get("/livez").status_code == 200


class FaultyReader:
    """A reader with a fault of its own, which is no `StoreError`."""

    def __init__(self, inner: Reader) -> None:
        self._inner, self.dim, self.close = inner, inner.dim, inner.close

    async def lookup_request(self, *_: Any, **__: Any) -> RequestWindows:
        raise ZeroDivisionError("secret detail")


class FaultyStore:
    def __init__(self, inner: Store) -> None:
        self._inner, self.close = inner, inner.close

    async def reader(self, ref: WindowRef) -> FaultyReader:
        return FaultyReader(await self._inner.reader(ref))


def test_a_fault_of_the_service_is_a_500_that_tells_nothing(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    store: Any = FaultyStore(place.store)
    with serving(settings_of(place, item_cache_mb=0), store) as client:
        response = client.post("/v1/score", json=body())
        problem_of(response, 500)
        assert "secret" not in response.text
        assert client.get("/livez").status_code == 200
        assert 'route="/v1/score",status="500"} 1.0' in client.get("/metrics").text


def test_a_body_that_is_broken_off_harms_nobody(client: httpx.Client) -> None:
    def broken() -> Iterator[bytes]:
        yield b'{"user":'
        raise ConnectionAbortedError

    with pytest.raises(ConnectionAbortedError):
        client.post("/v1/score", content=broken())
    assert client.post("/v1/score", json=body()).status_code == 200


def test_the_documented_example_is_a_valid_request() -> None:
    (example,) = ScoreRequest.model_json_schema()["examples"]
    assert ScoreRequest.model_validate_json(json.dumps(example)).candidates.id


_scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from([*ITEMS[:3], "food", 1e308, -1e308, 2**63, -(2**63), "\x00", "\ud800"])
)
_json = st.recursive(
    _scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


def _mostly(strategy: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda dice: _json if dice == 0 else strategy)


_column = _mostly(st.lists(_scalars, min_size=2, max_size=2))
_features = st.fixed_dictionaries(
    {}, optional={"age": _scalars, "income": _scalars, "user_id": _scalars, "nope": _scalars}
)
_history = st.fixed_dictionaries({"items": _column, "age_days": _column, "count": _column})
_user = st.fixed_dictionaries(
    {"id": _scalars}, optional={"features": _mostly(_features), "history": _mostly(_history)}
)
_candidates = st.fixed_dictionaries(
    {"id": _column},
    optional={
        "features": st.fixed_dictionaries({}, optional={"price": _column, "category": _column})
    },
)
_requests = st.fixed_dictionaries(
    {"user": _mostly(_user), "candidates": _mostly(_candidates)},
    optional={"context": _json, "request_id": _scalars, "deadline_ms": _scalars, "x": _json},
)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(document=_mostly(_requests))
def test_no_json_makes_the_service_fail(client: httpx.Client, document: Any) -> None:
    response = client.post("/v1/score", content=json.dumps(document))
    if response.status_code == 200:
        assert len(response.json()["scores"]) == len(document["candidates"]["id"])
        assert all(0 <= score <= 1 for score in response.json()["scores"])
    elif response.status_code != 504:  # a generated deadline may well have passed
        assert response.status_code in (400, 422), response.text
        problem_of(response, response.status_code)


@settings(max_examples=100, deadline=None)
@given(content=st.binary(max_size=200))
def test_no_bytes_make_the_service_fail(client: httpx.Client, content: bytes) -> None:
    response = client.post("/v1/score", content=content)
    problem_of(response, 422 if response.status_code == 422 else 400)
