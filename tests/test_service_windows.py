"""Where a service reads windows from when its store is away: its cache, a copy, nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import (
    DIM,
    ITEMS,
    Place,
    add_bundle,
    add_live_bundle,
    body,
    eventually,
    make_place,
    make_window,
    serving,
    settings_of,
)
from servers import Server, free_port, running_server
from test_service_score import by_hand

from embeddings_store import open_store
from service.scorer import absent_windows


def ask(client: httpx.Client, asked: dict[str, Any] | None = None) -> dict[str, Any]:
    response = client.post("/v1/score", json=asked or body())
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def changed() -> dict[str, Any]:
    """A request with a price of its own, so that what the bundle knows of its items does not hold
    and their windows are needed."""
    return body(candidates={"id": ITEMS[:3], "features": {"price": [7, None, 9.5]}})


def reasons(client: httpx.Client) -> dict[str, str]:
    return {one["what"]: one["reason"] for one in ask(client)["degraded"]}


def published(server: Server, tmp_path: Path) -> Place:
    place = make_place(tmp_path, server.url)
    add_live_bundle(place)
    place.store.close()
    return place


@contextmanager
def served_again(place: Place, port: int) -> Iterator[None]:
    """A server at the port where the place's store was, with its window, while the block runs."""
    with running_server(port=port) as server:
        store = open_store(server.url)
        store.publish(place.window)
        store.close()
        yield


def with_copy(place: Place, tmp_path: Path, **changes: Any) -> Any:
    copy = tmp_path / "copy"
    open_store(str(copy)).publish(place.window)
    return settings_of(place, store_copy=str(copy), store_deadline_ms=200, **changes)


def test_an_outage_is_read_from_the_copy_with_equal_scores_and_says_so(tmp_path: Path) -> None:
    with running_server() as server:
        place = published(server, tmp_path)
        with serving(with_copy(place, tmp_path, item_cache_mb=0)) as client:
            whole = ask(client)
            assert whole["degraded"] == []
            server.freeze()
            during = ask(client)
            metrics = client.get("/metrics").text
            server.thaw()
            eventually(lambda: reasons(client) == {}, timeout_s=2)
    assert during["scores"] == whole["scores"]
    assert during["degraded"] == [{"what": "store", "reason": "timeout"}]
    assert 'ecdctr_degraded_total{reason="timeout",what="store"} 1.0' in metrics


def test_it_starts_from_the_copy_and_goes_over_to_the_store_once_that_is_there(
    tmp_path: Path,
) -> None:
    port = free_port()
    with running_server(port=port) as server:
        place = published(server, tmp_path)
    with serving(with_copy(place, tmp_path)) as client:
        assert client.get("/readyz").status_code == 200
        assert reasons(client) == {"store": "unavailable"}
        with served_again(place, port):
            eventually(lambda: reasons(client) == {})


def test_a_copy_without_the_window_keeps_no_bundle_from_going_live(tmp_path: Path) -> None:
    with running_server() as server:
        place = published(server, tmp_path)
        settings = settings_of(place, store_copy=str(tmp_path / "empty"), store_deadline_ms=200)
        with serving(settings) as client:
            assert reasons(client) == {}


def test_without_a_copy_it_waits_for_its_store_and_then_goes_live_without_windows(
    tmp_path: Path,
) -> None:
    port = free_port()
    with running_server(port=port) as server:
        place = published(server, tmp_path)
    settings = settings_of(place, store_wait_s=0.3, store_deadline_ms=200)
    with serving(settings) as client:
        assert client.get("/readyz").status_code == 503
        eventually(lambda: client.get("/readyz").status_code == 200)
        answer = ask(client)
        assert answer["scores"] == pytest.approx(
            by_hand(place, body(), absent_windows(3, DIM)), abs=1e-7
        )
        assert reasons(client) == {"user_window": "unavailable"}
        with served_again(place, port):
            eventually(lambda: reasons(client) == {})


def test_a_live_bundle_is_not_replaced_by_one_of_another_window_whose_store_is_away(
    tmp_path: Path,
) -> None:
    with running_server() as server:
        place = published(server, tmp_path)
        with serving(settings_of(place, store_wait_s=0.01, store_deadline_ms=200)) as client:
            first = ask(client)["model"]
            server.kill()
            place.registry.promote(add_bundle(place, window=make_window(seed=1)))
            eventually(lambda: bool(client.get("/v1/models").json()["refusals"]))
            refusal = client.get("/v1/models").json()["refusals"][0]
            assert refusal["kind"] == "store"
            assert ask(client)["model"] == first


def test_items_come_from_the_cache_which_was_warmed_and_counts(tmp_path: Path) -> None:
    def counted(name: str) -> float:
        for line in client.get("/metrics").text.splitlines():
            if line.startswith(name):
                return float(line.split()[-1])
        return 0.0

    with running_server() as server:
        place = published(server, tmp_path)
        with serving(settings_of(place, store_deadline_ms=200)) as client:
            whole = ask(client, changed())
            eventually(lambda: counted('ecdctr_item_cache_rows_total{result="hit"}') == 3)
            assert counted('ecdctr_item_cache_rows_total{result="miss"}') == 0
            assert counted("ecdctr_item_cache_bytes") > 0
            assert counted("ecdctr_item_cache_evictions_total") == 0
            server.kill()
            during = ask(client, changed())
            assert [one["what"] for one in during["degraded"]] == ["user_window"]
            expected = by_hand(place, changed(), absent_windows(3, DIM))
            assert during["scores"] != pytest.approx(expected, abs=1e-4)
            assert during["scores"] != pytest.approx(whole["scores"], abs=1e-7)


def test_without_room_for_it_there_is_no_cache(tmp_path: Path) -> None:
    with running_server() as server:
        place = published(server, tmp_path)
        with serving(settings_of(place, item_cache_mb=0, store_deadline_ms=200)) as client:
            ask(client, changed())
            server.kill()
            found = ask(client, changed())["degraded"]
            assert [one["what"] for one in found] == ["user_window", "item_windows"]
