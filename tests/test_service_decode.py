"""Two ways to decode a request, which never disagree."""

from __future__ import annotations

import copy
import json
from typing import Any

import numpy as np
import pytest
from bundles import ITEMS, add_bundle, body, make_place
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.artifact import open_artifact
from bundle.encode import Encoder, FeatureError
from service.decode import decode, validated
from service.errors import InvalidRequestError, MalformedJsonError
from service.schemas import ScoreRequest
from service.settings import Settings
from service.usual import usual

LIMITS = Settings("/", "unused", max_candidates=20, max_history=10)
ODD = [None, True, "", "x" * 129, 1.5, -1, 0, 2**63, 2**64, -(2**63) - 1, [], {}, [[]], "7", 1e300]

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
scalars |= st.sampled_from(ODD)
columns = st.lists(scalars, max_size=4) | st.lists(st.integers(-5, 5), max_size=4)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    place = make_place(tmp_path_factory.mktemp("place"))
    return open_artifact(place.registry.path(add_bundle(place))).encoder


def encoded(encoder: Encoder, request: ScoreRequest) -> Any:
    """All that becomes of a request; what is wrong with it, the long way says in the end."""
    try:
        found = encoder.request(request.to_encode())
    except FeatureError:
        return "wrong"
    items = encoder.item_inputs(found, np.arange(len(found.item_keys)))
    arrays = {name: array.tolist() for name, array in {**found.inputs, **items}.items()}
    return arrays, found.user_key.tolist(), found.item_keys.tolist(), found.missing


def by_pydantic(text: bytes) -> ScoreRequest | None:
    try:
        return validated(text)
    except (InvalidRequestError, MalformedJsonError):
        return None


def check(encoder: Encoder, text: bytes) -> bool:
    """Whether the short way took it, in which case pydantic does too, and means the same."""
    quick = usual(text)
    if quick is None:
        return False
    right = by_pydantic(text)
    assert right is not None, text
    assert (quick.request_id, quick.deadline_ms) == (right.request_id, right.deadline_ms)
    assert encoded(encoder, quick) == encoded(encoder, right)
    return True


def written(document: Any) -> bytes:
    return json.dumps(document).encode("utf-8", "surrogatepass")


@settings(max_examples=400, deadline=None)
@given(
    ids=columns,
    prices=columns,
    categories=columns,
    history=st.tuples(columns, columns, columns),
    income=scalars,
    hour=scalars,
    user=scalars,
    request_id=scalars,
    deadline_ms=scalars,
)
def test_what_the_short_way_takes_pydantic_takes_and_it_means_the_same(
    encoder: Encoder, **parts: Any
) -> None:
    items, ages, counts = parts["history"]
    document = {
        "user": {
            "id": parts["user"],
            "features": {"income": parts["income"], "age": "18-24"},
            "history": {"items": items, "age_days": ages, "count": counts},
        },
        "context": {"hour": parts["hour"], "slot": 2},
        "candidates": {
            "id": parts["ids"],
            "features": {"price": parts["prices"], "category": parts["categories"]},
        },
        "request_id": parts["request_id"],
        "deadline_ms": parts["deadline_ms"],
    }
    check(encoder, written(document))


def places(document: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a document, of the inner ones too."""
    if isinstance(document, dict):
        inner = list(document.items())
    else:
        inner = list(enumerate(document)) if isinstance(document, list) else []
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


WHOLE = body(num=3, request_id="r", deadline_ms=100)
WHOLE["candidates"]["features"] = {"price": [1, 2.5, None], "category": ["food", None, "games"]}


@pytest.mark.parametrize("value", ODD, ids=lambda value: repr(value)[:12])
@pytest.mark.parametrize("place", places(WHOLE)[1:], ids=lambda path: ".".join(map(str, path)))
def test_one_odd_value_in_any_place_is_decided_alike(
    encoder: Encoder, place: tuple[Any, ...], value: Any
) -> None:
    document = copy.deepcopy(WHOLE)
    inner = document
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    check(encoder, written(document))


@pytest.mark.parametrize("num", [0, 1, 20])
def test_usual_requests_go_the_short_way(encoder: Encoder, num: int) -> None:
    assert check(encoder, written(body(num=num)))
    integers = body(candidates={"id": list(range(num)), "features": {"price": [1.5] * num}})
    integers["user"]["id"] = 7
    assert check(encoder, written(integers))
    assert check(encoder, written({"user": {"id": "x"}, "candidates": {"id": ITEMS[:num]}}))


@pytest.mark.parametrize("key", ["more", "user.more", "candidates.more", "user.history.more"])
def test_unknown_fields_are_refused_by_both(encoder: Encoder, key: str) -> None:
    document: dict[str, Any] = body()
    *path, last = key.split(".")
    inner = document
    for part in path:
        inner = inner[part]
    inner[last] = 1
    assert not check(encoder, written(document))
    with pytest.raises(InvalidRequestError):
        decode(written(document), LIMITS)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[]", b"null", b'{"user": NaN}', b"\xff", b'"\\ud800"']
)
def test_what_is_no_request_is_an_error_whichever_way(text: bytes) -> None:
    with pytest.raises((InvalidRequestError, MalformedJsonError)):
        decode(text, LIMITS)


def test_limits_hold_on_the_short_way_too() -> None:
    decode(written(body(candidates={"id": list(range(20))})), LIMITS)
    with pytest.raises(InvalidRequestError, match=r"candidates\.id"):
        decode(written(body(candidates={"id": list(range(21))})), LIMITS)


USER, ADS = b'"user": {"id": 1}', b'"candidates": {"id": [1, 2]}'


@pytest.mark.parametrize(
    "text",
    [
        b"\xef\xbb\xbf{" + USER + b", " + ADS + b"}",
        b"{" + USER + b", " + USER + b", " + ADS + b"}",
        b'{"user": {"id": 1, "features": {"income": 1, "income": 2}}, ' + ADS + b"}",
        b"{" + USER + b', "candidates": {"id": [1], "features": {"price": [1], "price": [2]}}}',
        b"{" + USER + b', "candidates": {"id": [1], "features": {"price\\u0000": [1]}}}',
        b"{" + USER + b', "context": {"hour\\u0000": 1, "hour": 2}, ' + ADS + b"}",
        b"{" + USER + b', "candidates": {"id": [[1], [2]]}}',
        b"{" + USER + b', "candidates": {"id": [1, [2]]}}',
        b"{" + USER + b', "candidates": {"id": [1, 2], "features": {"price": [[1, 2], []]}}}',
        b"{" + USER + b", " + ADS + b"} {}",
        b"{" + USER + b', "candidates": {"id": [1, 12345678901234567890]}}',
        b"{" + USER + b', "candidates": {"id": [1], "features": {"price": [1e999]}}}',
        b'{"user": {"id": "\\ud800"}, ' + ADS + b"}",
        b'{"user": {"id": "\xff"}, ' + ADS + b"}",
        b"{" + USER + b', "context": ' + b"[" * 2000 + b"]" * 2000 + b", " + ADS + b"}",
    ],
    ids=range(15),
)
def test_texts_that_parsers_read_differently_mean_what_pydantic_says(
    encoder: Encoder, text: bytes
) -> None:
    check(encoder, text)


def test_brackets_in_texts_are_no_arrays(encoder: Encoder) -> None:
    document = body(num=2)
    document["candidates"]["features"] = {"category": ["[food]", "games"], "price": [1, 2.5]}
    assert check(encoder, written(document))


def test_thousands_of_names_are_left_to_pydantic_which_looks_at_each_once(
    encoder: Encoder,
) -> None:
    names = {f"name{number}": 1 for number in range(3000)}
    assert not check(encoder, written(names))
    features = {name: [1] for name in names}
    assert not check(encoder, written(body(candidates={"id": [1], "features": features})))


def test_ids_that_are_integers_are_found_again_and_again(encoder: Encoder) -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        ids = random.integers(-50_000, 50_000, 500).tolist()
        assert check(encoder, written(body(candidates={"id": ids})))


def test_integers_and_floats_in_one_column_are_numbers(encoder: Encoder) -> None:
    document = body(num=3)
    document["candidates"]["features"] = {"price": [1, 2.5, 3]}
    assert check(encoder, written(document))


@pytest.mark.parametrize("largest", [2**63 - 1, 2**63, -(2**63), -(2**63) - 1])
def test_integers_end_where_64_bits_end(encoder: Encoder, largest: int) -> None:
    document = body(candidates={"id": [1, largest]})
    is_one = -(2**63) <= largest < 2**63
    assert check(encoder, written(document)) == is_one
    assert (by_pydantic(written(document)) is not None) == is_one
