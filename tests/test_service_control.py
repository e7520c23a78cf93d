"""Promotions over HTTP: for whoever knows the token, truthful, and never of a bad bundle."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from bundles import (
    Place,
    add_bundle,
    add_live_bundle,
    body,
    constant,
    eventually,
    make_place,
    serving,
    settings_of,
)
from servers import free_port
from test_monitoring import total
from test_service_app import is_ready, process, samples

from benchmarks.processes import resident_bytes

TOKEN = {"authorization": "Bearer s3cret"}


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


@contextmanager
def controlled(place: Place) -> Iterator[httpx.Client]:
    """A service with a token that by itself would notice promotions only after a minute."""
    with serving(settings_of(place, control_token="s3cret", poll_s=60)) as client:
        yield client


def promote(client: httpx.Client, bundle_id: str) -> httpx.Response:
    return client.post(f"/v1/models/{bundle_id}/promote", headers=TOKEN)


def live(client: httpx.Client) -> str:
    return str(client.get("/v1/models").json()["live"]["id"])


def test_a_promotion_and_a_rollback_are_live_when_they_are_answered(place: Place) -> None:
    first = add_live_bundle(place)
    second = add_bundle(place, bias=1.0)
    with controlled(place) as client:
        answer = promote(client, second).json()
        assert (answer["current"], answer["previous"]) == (second, first)
        assert (answer["live"], answer["taken"]) == (second, True)
        assert client.post("/v1/score", json=body()).json()["model"] == second
        answer = client.post("/v1/models/rollback", headers=TOKEN).json()
        assert (answer["current"], answer["live"], answer["taken"]) == (first, first, True)
        assert place.registry.current().current == first  # type: ignore[union-attr]
        counts = samples(client)
        assert counts["ecdctr_control_total{action=promote,outcome=done}"] == 1
        assert counts["ecdctr_control_total{action=rollback,outcome=done}"] == 1


def test_without_the_token_nothing_happens(place: Place) -> None:
    first, second = add_live_bundle(place), add_bundle(place, bias=1.0)
    with controlled(place) as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "s3cret"}):
            for path in (f"/v1/models/{second}/promote", "/v1/models/rollback"):
                answer = client.post(path, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["content-type"] == "application/problem+json"
        assert live(client) == first
        name = "ecdctr_control_total{action=promote,outcome=unauthorised}"
        assert samples(client)[name] == 3


def test_without_a_token_in_the_settings_there_is_no_such_path(place: Place) -> None:
    first = add_live_bundle(place)
    with serving(settings_of(place)) as client:
        for headers in (TOKEN, {"authorization": "Bearer x"}):
            path = f"/v1/models/{first}/promote"
            assert client.post(path, headers=headers).status_code == 404


def test_a_bad_bundle_is_refused_each_time_and_never_becomes_current(place: Place) -> None:
    first = add_live_bundle(place)
    bad = add_bundle(place, change_graph=constant)
    with controlled(place) as client:
        for _ in range(2):
            answer = promote(client, bad)
            assert answer.status_code == 409
            assert "all golden scores are" in answer.json()["detail"]
        assert place.registry.current().current == first  # type: ignore[union-attr]
        good = add_bundle(place, bias=1.0)
        assert promote(client, good).json()["taken"]


@pytest.mark.parametrize("name", ["no-such", "..", "%2e%2e%2fcurrent", "http:%2f%2fx", "-"])
def test_what_is_no_bundle_of_the_registry_is_not_found(place: Place, name: str) -> None:
    first = add_live_bundle(place)
    with controlled(place) as client:
        assert promote(client, name).status_code == 404
        assert live(client) == first


def test_a_rollback_without_a_previous_bundle_is_a_conflict(place: Place) -> None:
    add_live_bundle(place)
    with controlled(place) as client:
        answer = client.post("/v1/models/rollback", headers=TOKEN)
        assert answer.status_code == 409
        assert "no previous bundle" in answer.json()["detail"]


def test_many_callers_at_once_swap_once(place: Place) -> None:
    first, second = add_live_bundle(place), add_bundle(place, bias=1.0)
    with controlled(place) as client, ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: promote(client, second).json(), range(8)))
        assert all(answer["taken"] for answer in answers)
        assert len({answer["changed_at"] for answer in answers}) == 1
        assert {answer["previous"] for answer in answers} == {first}
        assert samples(client)["ecdctr_swaps_total{}"] == 2


def test_on_a_port_of_its_own_it_works_with_two_workers_and_is_not_beside_the_scores(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, port = add_live_bundle(place), add_bundle(place, bias=1.0), free_port()
    monkeypatch.setenv("ECDCTR_CONTROL_TOKEN", "s3cret")
    monkeypatch.setenv("ECDCTR_CONTROL_PORT", str(port))
    monkeypatch.setenv("ECDCTR_DRAIN_S", "0")
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url) and total(url, "ecdctr_swaps_total") == 2)
        path = f"/v1/models/{second}/promote"
        assert httpx.post(f"{url}{path}", headers=TOKEN).status_code == 404
        assert httpx.post(f"http://127.0.0.1:{port}{path}").status_code == 401
        answer = httpx.post(f"http://127.0.0.1:{port}{path}", headers=TOKEN).json()
        assert (answer["live"], answer["previous"], answer["taken"]) == (second, first, True)
        eventually(lambda: total(url, "ecdctr_swaps_total") == 4)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0


def test_memory_stays_where_it_is_over_many_swaps(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [add_live_bundle(place), add_bundle(place, bias=1.0)]
    monkeypatch.setenv("ECDCTR_CONTROL_TOKEN", "s3cret")
    assert memory_growth(place, names, num_swaps=15, num_first=5) < 0.2


def memory_growth(place: Place, names: list[str], num_swaps: int, num_first: int) -> float:
    """Share by which the process has grown since its first swaps, with traffic of all sizes."""
    random, resident = np.random.default_rng(0), []
    with process(place, workers=1) as (server, url):
        eventually(lambda: is_ready(url))
        with httpx.Client(base_url=url, timeout=20) as client:
            for number in range(num_swaps):
                assert promote(client, names[(number + 1) % len(names)]).json()["taken"]
                for size in random.integers(1, 20, 20).tolist():
                    assert client.post("/v1/score", json=body(num=size)).status_code == 200
                resident.append(resident_bytes(server.pid))
    return max(resident[num_first:]) / resident[num_first - 1] - 1
