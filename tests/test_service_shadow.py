"""A shadow scores again what was answered, and changes no answer."""

from __future__ import annotations

from pathlib import Path

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
    nan_below_minus_one,
    serving,
    settings_of,
)
from commands import Run
from test_service_app import is_beside, samples

from bundle.registry import RegistryError
from service.routing import is_chosen

USERS = [f"user-{number}" for number in range(200)]
REQUESTS = "ecdctr_shadow_requests_total"


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return make_place(tmp_path)


def num(client: httpx.Client, outcome: str) -> float:
    return samples(client).get(f"{REQUESTS}{{outcome={outcome}}}", 0.0)


def ask_all(client: httpx.Client) -> dict[str, list[float]]:
    answers = {}
    for user in USERS:
        answer = client.post("/v1/score", json=body(user={"id": user}))
        assert answer.status_code == 200
        answers[user] = answer.json()["scores"]
    return answers


def test_a_share_of_the_users_is_scored_again_and_all_are_answered_by_the_live_bundle(
    place: Place,
) -> None:
    live, shadow = add_live_bundle(place), add_bundle(place, bias=1.0)
    with serving(settings_of(place)) as client:
        before = ask_all(client)
        beside = place.registry.start("shadow", shadow, 0.3).shadow
        assert beside is not None
        again = sum(is_chosen(user, beside.salt, 0.3) for user in USERS)
        assert 30 <= again <= 90
        eventually(lambda: is_beside(client, "shadow", shadow))
        assert ask_all(client) == before
        eventually(lambda: num(client, "scored") == again)
        found = samples(client)
        assert found[f"ecdctr_scored_requests_total{{model={live}}}"] == 2 * len(USERS)
        assert f"ecdctr_scored_requests_total{{model={shadow}}}" not in found
        # The same but for a logit that is higher by 1 for all.
        assert found["ecdctr_shadow_same_first_total{}"] == again
        assert found["ecdctr_shadow_logit_difference_count{}"] == again
        assert found["ecdctr_shadow_logit_difference_sum{}"] == pytest.approx(again, rel=1e-3)
        clicks = {
            by: found[f"ecdctr_shadow_predicted_clicks_total{{by={by}}}"]
            for by in ("live", "shadow")
        }
        assert clicks["shadow"] > 1.05 * clicks["live"] > 0
        place.registry.stop("shadow")
        eventually(lambda: not is_beside(client, "shadow", shadow))
        ask_all(client)
        assert num(client, "scored") == again


def test_a_shadow_that_fails_on_a_request_is_counted_and_goes_on(place: Place) -> None:
    live = add_live_bundle(place)
    bad = add_bundle(place, change_graph=nan_below_minus_one)
    with serving(settings_of(place)) as client:
        place.registry.start("shadow", bad, 1.0)
        eventually(lambda: is_beside(client, "shadow", bad))
        odd = body(context={"slot": -90})
        assert client.post("/v1/score", json=odd).json()["model"] == live
        eventually(lambda: num(client, "failed") == 1)
        assert client.post("/v1/score", json=body()).json()["model"] == live
        eventually(lambda: num(client, "scored") == 1)


def test_requests_that_leave_no_time_are_dropped(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.shadow.MOST_WAITING", 0)
    add_live_bundle(place)
    shadow = add_bundle(place, bias=1.0)
    with serving(settings_of(place)) as client:
        place.registry.start("shadow", shadow, 1.0)
        eventually(lambda: is_beside(client, "shadow", shadow))
        ask_all(client)
        assert num(client, "dropped") == len(USERS)
        assert num(client, "scored") == 0


def test_a_shadow_that_is_refused_says_why(place: Place) -> None:
    add_live_bundle(place)
    bad = add_bundle(place, change_graph=constant)
    with serving(settings_of(place)) as client:
        place.registry.start("shadow", bad, 1.0)
        eventually(lambda: bool(client.get("/v1/models").json()["refusals"]))
        (refusal,) = client.get("/v1/models").json()["refusals"]
        assert (refusal["bundle"], refusal["kind"]) == (bad, "constant")
        assert not is_beside(client, "shadow", bad)


def test_a_shadow_stays_beside_a_canary_over_a_swap_until_it_is_current_itself(
    place: Place,
) -> None:
    registry, first = place.registry, add_live_bundle(place)
    second, shadow, canary = (add_bundle(place, bias=bias) for bias in (0.5, 1.0, 1.5))
    registry.start("shadow", shadow, 0.5)
    registry.start("canary", canary, 0.1)
    current = registry.promote(second)
    assert current.shadow is not None
    assert current.canary is not None
    assert (current.previous, current.shadow.id, current.canary.id) == (first, shadow, canary)
    assert shadow in {manifest.id for manifest in registry.servable()}
    promoted = registry.promote(shadow)
    assert promoted.shadow is None
    assert promoted.canary == current.canary
    assert registry.current() == promoted
    with pytest.raises(RegistryError, match="no shadow to stop"):
        registry.stop("shadow")
    with pytest.raises(RegistryError, match=r"a shadow's share is 1\.5"):
        registry.start("shadow", second, 1.5)


def test_the_command_line_starts_and_stops_it(place: Place, run: Run) -> None:
    add_live_bundle(place)
    shadow = add_bundle(place, bias=1.0)
    where = ("--registry", str(place.registry.root))
    assert run("promote", shadow, "--shadow-share", "0.2", *where).code == 0
    current = place.registry.current()
    assert current is not None
    assert current.shadow is not None
    assert (current.shadow.id, current.shadow.share) == (shadow, 0.2)
    assert run("stop-shadow", *where).code == 0
    current = place.registry.current()
    assert current is not None
    assert current.shadow is None
