"""What a score is: the model's own, for exactly that user and that ad, whatever else is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bundles import (
    DIM,
    ITEMS,
    Place,
    add_bundle,
    add_live_bundle,
    body,
    make_place,
    nan_below_minus_one,
    run_by_hand,
    serving,
    settings_of,
)
from runclock import run_s
from servers import running_server

from bundle.encode import Request
from bundle.golden import request_of
from bundle.ids import hash_ids
from embeddings_store import RequestWindows
from service.scorer import absent_windows


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[httpx.Client]:
    with serving(settings_of(place)) as client:
        yield client


def ask(client: httpx.Client, document: dict[str, Any]) -> dict[str, Any]:
    response = client.post("/v1/score", json=document)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def by_hand(
    place: Place, document: dict[str, Any], windows: RequestWindows | None = None
) -> list[float]:
    """Scores of the current bundle, from onnxruntime alone, with the store's windows or others."""
    current = place.registry.current()
    assert current is not None
    request = as_request(document)
    if windows is None:
        windows = asyncio.run(look_up(place, request))
    scores = run_by_hand(place.registry.path(current.current), request, windows)
    return [float(score) for score in scores]


async def look_up(place: Place, request: Request) -> RequestWindows:
    reader = await place.store.reader(place.window.ref)
    user = int(hash_ids([request.user_id])[0])
    return await reader.lookup_request(user, hash_ids(request.item_ids), deadline_ms=1000)


def as_request(document: dict[str, Any]) -> Request:
    empty = {"items": [], "age_days": [], "count": []}
    user = {"features": {}, "history": empty, **document["user"]}
    candidates = {"features": {}, **document["candidates"]}
    return request_of({"context": {}, **document, "user": user, "candidates": candidates})


def test_scores_are_those_of_the_model_run_by_hand(client: httpx.Client, place: Place) -> None:
    document = body(num=20)
    answer = ask(client, document)
    assert np.float32(answer["scores"]).tolist() == by_hand(place, document)
    assert answer["degraded"] == []
    assert len(set(answer["scores"])) == 20


def test_the_window_of_the_store_reaches_the_model(client: httpx.Client, place: Place) -> None:
    document = body(num=5)
    without = by_hand(place, document, absent_windows(5, DIM))
    assert ask(client, document)["scores"] != pytest.approx(without, abs=1e-4)


def test_a_request_with_ids_alone_is_scored(client: httpx.Client, place: Place) -> None:
    document = {"user": {"id": 17}, "candidates": {"id": ITEMS[:4]}}
    assert ask(client, document)["scores"] == pytest.approx(by_hand(place, document), abs=1e-7)


def test_given_features_replace_those_of_the_item_table(client: httpx.Client, place: Place) -> None:
    document = body(num=3)
    from_table = ask(client, document)["scores"]
    document["candidates"]["features"] = {"price": [7.5, None, 2], "category": ["food"] * 3}
    scores = ask(client, document)["scores"]
    assert scores == pytest.approx(by_hand(place, document), abs=1e-7)
    assert scores != pytest.approx(from_table, abs=1e-4)


def test_scores_come_in_the_order_asked_with_duplicates_in_place(client: httpx.Client) -> None:
    order = [3, 1, 3, 2, 1]
    alone = [ask(client, body(candidates={"id": [ITEMS[i]]}))["scores"][0] for i in order]
    together = ask(client, body(candidates={"id": [ITEMS[i] for i in order]}))["scores"]
    assert together == pytest.approx(alone, abs=1e-6)
    assert together[0] == together[2]
    assert together[1] == together[4]
    assert len(set(together)) == 3


@pytest.mark.parametrize("num", [7, 1000])
def test_a_score_does_not_depend_on_the_other_candidates(client: httpx.Client, num: int) -> None:
    alone = ask(client, body(num=1))["scores"][0]
    among = ask(client, body(candidates={"id": [f"other-{i}" for i in range(num - 1)] + ITEMS[:1]}))
    assert len(among["scores"]) == num
    assert among["scores"][-1] == pytest.approx(alone, abs=1e-6)


def test_unknown_ids_are_scored_and_counted_as_missing(client: httpx.Client) -> None:
    document = body(candidates={"id": ["never-seen", -1, ITEMS[0]]})
    document["user"] = {"id": "nobody"}
    answer = ask(client, document)
    assert all(0 < score < 1 for score in answer["scores"])
    assert answer["missing"]["category"] == 2
    assert answer["missing"]["price"] == 2
    assert answer["missing"]["item_windows"] >= 2
    assert answer["missing"]["user_window"] == 1
    assert answer["missing"]["history"] == 1
    assert answer["missing"]["age"] == 1


def test_no_candidates_give_no_scores(client: httpx.Client) -> None:
    answer = ask(client, body(num=0))
    assert answer["scores"] == []
    assert answer["model"]


def test_the_request_id_comes_back_and_the_stages_are_timed(client: httpx.Client) -> None:
    response = client.post("/v1/score", json=body(request_id="auction-7"))
    assert response.json()["request_id"] == "auction-7"
    stages = [entry.split(";")[0] for entry in response.headers["server-timing"].split(", ")]
    expected = ["receive", "queue", "decode", "encode", "lookup", "run", "serialise", "total"]
    assert stages == expected


@pytest.mark.parametrize("deadline_ms", [0, -5, 0.0001])
def test_a_deadline_that_has_passed_is_a_504(client: httpx.Client, deadline_ms: float) -> None:
    response = client.post("/v1/score", json=body(deadline_ms=deadline_ms))
    assert response.status_code == 504
    assert response.json()["type"] == "urn:ecdctr:problem:deadline-exceeded"
    assert ask(client, body(deadline_ms=5000))["scores"]


def test_a_store_that_went_away_costs_the_windows_and_says_so(tmp_path: Path) -> None:
    with running_server() as server:
        place = make_place(tmp_path, server.url)
        add_live_bundle(place)
        with serving(settings_of(place, store_deadline_ms=200, item_cache_mb=0)) as client:
            whole = ask(client, body())
            assert whole["degraded"] == []
            server.process.kill()
            server.process.wait()
            answer = ask(client, body())
            assert client.get("/readyz").status_code == 200
        expected = by_hand(place, body(), absent_windows(3, DIM))
        place.store.close()
    reason = "unavailable"
    assert answer["degraded"] == [{"what": "user_window", "reason": reason}]
    assert answer["scores"] == pytest.approx(expected, abs=1e-7)
    assert answer["scores"] != pytest.approx(whole["scores"], abs=1e-4)
    assert "user_window" not in answer["missing"]


def test_a_frozen_store_leaves_the_model_half_of_the_deadline(tmp_path: Path) -> None:
    with running_server() as server:
        place = make_place(tmp_path, server.url)
        add_live_bundle(place)
        with serving(settings_of(place, store_deadline_ms=5000)) as client:
            server.freeze()
            started_s = run_s()
            response = client.post("/v1/score", json=body(deadline_ms=400))
            elapsed_s = run_s() - started_s
            server.thaw()
        place.store.close()
    assert response.json()["degraded"][0] == {"what": "user_window", "reason": "timeout"}
    assert elapsed_s < 0.4


def test_a_model_that_gives_nan_is_a_503_and_is_counted(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.registry.promote(add_bundle(place, change_graph=nan_below_minus_one))
    with serving(settings_of(place)) as client:
        assert ask(client, body(context={"slot": 3}))["scores"]
        response = client.post("/v1/score", json=body(context={"slot": -90}))
        assert response.status_code == 503
        assert response.json()["type"] == "urn:ecdctr:problem:impossible-score"
        assert "ecdctr_impossible_scores_total 1.0" in client.get("/metrics").text
