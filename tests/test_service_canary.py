"""A canary scores a share of the users, always the same ones, and never in place of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from bundles import (
    Place,
    add_bundle,
    add_live_bundle,
    body,
    constant,
    eventually,
    make_place,
    make_window,
    serving,
    settings_of,
)
from test_service_app import is_beside, samples

from bundle.registry import Registry, RegistryError
from embeddings_store import Reader, Store, StoreUnavailable, WindowRef
from service.routing import is_chosen

USERS = [f"user-{number}" for number in range(200)]


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def model_of(client: httpx.Client, user: str) -> str:
    answer = client.post("/v1/score", json=body(user={"id": user}))
    assert answer.status_code == 200, answer.text
    return str(answer.json()["model"])


def models(client: httpx.Client) -> dict[str, str]:
    return {user: model_of(client, user) for user in USERS}


def refused(client: httpx.Client, kind: str) -> float:
    return samples(client).get(f"ecdctr_refusals_total{{kind={kind}}}", 0.0)


def test_the_share_is_kept_and_each_canary_has_users_of_its_own() -> None:
    users = range(20_000)
    first = {user for user in users if is_chosen(user, "first", 0.05)}
    second = {user for user in users if is_chosen(user, "second", 0.05)}
    assert len(first) == pytest.approx(1000, rel=0.15)
    assert len(first & second) == pytest.approx(50, rel=0.6)
    assert first <= {user for user in users if is_chosen(user, "first", 0.1)}
    assert {user for user in users if is_chosen(str(user), "first", 0.05)} == first
    assert all(is_chosen(user, "first", 1.0) for user in users)


def test_users_stay_with_their_model_until_the_canary_is_stopped(place: Place) -> None:
    current, canary = add_live_bundle(place), add_bundle(place, bias=1.0)
    with serving(settings_of(place)) as client:
        place.registry.start("canary", canary, 0.3)
        eventually(lambda: is_beside(client, "canary", canary))
        before = models(client)
        assert set(before.values()) == {current, canary}
        assert 30 <= sum(model == canary for model in before.values()) <= 90
        assert models(client) == before
        place.registry.start("canary", canary, 0.6)
        eventually(lambda: sum(model == canary for model in models(client).values()) > 90)
        assert all(models(client)[user] == canary for user in USERS if before[user] == canary)
        counts = samples(client)
        assert counts[f"ecdctr_scored_requests_total{{model={canary}}}"] > 0
        place.registry.stop("canary")
        eventually(lambda: not is_beside(client, "canary", canary))
        assert set(models(client).values()) == {current}


def test_a_canary_that_is_refused_leaves_all_users_with_the_current_bundle(place: Place) -> None:
    current, bad = add_live_bundle(place), add_bundle(place, change_graph=constant)
    with serving(settings_of(place)) as client:
        place.registry.start("canary", bad, 1.0)
        eventually(lambda: bool(client.get("/v1/models").json()["refusals"]))
        (refusal,) = client.get("/v1/models").json()["refusals"]
        assert (refusal["bundle"], refusal["kind"]) == (bad, "constant")
        assert set(models(client).values()) == {current}
        good = add_bundle(place, bias=1.0)
        place.registry.start("canary", good, 1.0)
        eventually(lambda: is_beside(client, "canary", good))
        assert set(models(client).values()) == {good}


class PartlyAwayStore:
    """Gives no answer about one window while it is away."""

    def __init__(self, inner: Store, lacking: WindowRef) -> None:
        self._inner, self.close = inner, inner.close
        self._lacking, self.is_away = lacking, True

    async def reader(self, ref: WindowRef) -> Reader:
        if self.is_away and ref == self._lacking:
            raise StoreUnavailable("planted")
        return await self._inner.reader(ref)


def test_a_canary_that_waits_for_its_store_has_nothing_else_tried_again(place: Place) -> None:
    live, bad = add_live_bundle(place), add_bundle(place, change_graph=constant)
    window = make_window(seed=1)
    canary = add_bundle(place, window=window)
    store: Any = PartlyAwayStore(place.store, place.store.publish(window))
    with serving(settings_of(place), store) as client:
        place.registry.promote(bad)
        place.registry.start("canary", canary, 1.0)
        eventually(lambda: refused(client, "store") >= 5)
        # When it was promoted, and once more where the canary came after that was seen.
        assert refused(client, "constant") <= 2
        assert set(models(client).values()) == {live}
        store.is_away = False
        eventually(lambda: is_beside(client, "canary", canary))
        assert set(models(client).values()) == {canary}


def test_a_promoted_canary_is_the_current_bundle_for_all(place: Place) -> None:
    current, canary = add_live_bundle(place), add_bundle(place, bias=1.0)
    with serving(settings_of(place)) as client:
        place.registry.start("canary", canary, 0.3)
        eventually(lambda: is_beside(client, "canary", canary))
        changed = place.registry.promote(canary)
        assert (changed.current, changed.previous, changed.canary) == (canary, current, None)
        eventually(lambda: set(models(client).values()) == {canary})
        eventually(lambda: not is_beside(client, "canary", canary))


def test_the_registry_keeps_the_canary_and_what_it_needs(place: Place) -> None:
    first, canary = add_live_bundle(place), add_bundle(place, bias=1.0)
    started = place.registry.start("canary", canary, 0.1)
    second = add_live_bundle(place, bias=2.0)
    kept = Registry(place.registry.root).current()
    assert kept is not None
    assert (kept.current, kept.previous, kept.canary) == (second, first, started.canary)
    assert canary in {manifest.id for manifest in place.registry.servable()}
    place.registry.stop("canary")
    assert "canary" not in json.loads((place.registry.root / "current.json").read_text())


def test_a_window_that_only_the_canary_needs_is_kept(place: Place) -> None:
    old = add_bundle(place, asof="2017-06-15")
    for bias in (1.0, 2.0):
        add_live_bundle(place, bias=bias)
    assert old not in {manifest.id for manifest in place.registry.servable()}
    place.registry.start("canary", old, 0.1)
    assert old in {manifest.id for manifest in place.registry.servable()}


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(place: Place, share: float) -> None:
    add_live_bundle(place)
    with pytest.raises(RegistryError, match="above 0 and at most 1"):
        place.registry.start("canary", add_bundle(place, bias=1.0), share)


def test_the_current_bundle_can_be_no_canary_and_none_can_be_stopped_that_is_not_there(
    place: Place,
) -> None:
    current = add_live_bundle(place)
    with pytest.raises(RegistryError, match="can't be a canary"):
        place.registry.start("canary", current, 0.5)
    with pytest.raises(RegistryError, match="no canary to stop"):
        place.registry.stop("canary")
