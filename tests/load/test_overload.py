"""Long forms of the load tests: figures of one machine, so not part of `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest
from bundles import add_bundle, add_live_bundle, eventually, make_place
from test_service_app import is_ready, process
from test_service_control import memory_growth
from test_service_overload import Flood, capacity, flood, requests_of

from loadtest import loop
from loadtest.client import Target

RATES = (0.5, 1.0, 2.0, 4.0, 0.5)
"""Of the capacity, one after the other."""


def floods(place_root: Path, seconds: float) -> tuple[float, list[Flood]]:
    """Capacity in requests a second, and what came of each of `RATES`."""
    place = make_place(place_root)
    add_live_bundle(place)
    with process(place, workers=1) as (_, url):
        eventually(lambda: is_ready(url))
        target = Target("127.0.0.1", int(url.rpartition(":")[2]), timeout_s=2.0)
        requests = requests_of(2000)

        async def run() -> tuple[float, list[Flood]]:
            await capacity(target, requests, 2.0)
            most = await capacity(target, requests, 5.0)
            return most, [await flood(target, requests, rate * most, seconds) for rate in RATES]

        most, found = loop.run(run())
    for rate, one in zip(RATES, found, strict=True):
        shed = one.outcomes.count("http_503")
        print(f"{rate:g} x {most:.0f}/s: {one.goodput / most:.2f} in time, {shed} of", end=" ")
        print(f"{len(one.outcomes)} turned away")
    return most, found


def test_at_twice_the_capacity_most_of_it_is_answered_in_time_and_all_afterwards(
    tmp_path: Path,
) -> None:
    most, (_, _, twice, _, after) = floods(tmp_path, seconds=10.0)
    # The aim is nine tenths, which a quiet machine reaches.
    assert twice.goodput >= 0.75 * most
    assert after.share_good(from_s=2.0) >= 0.99


def test_without_admission_the_same_flood_leaves_hardly_any_answer_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDCTR_MAX_WAIT_MS", "1e9")
    most, (_, _, twice, _, _) = floods(tmp_path, seconds=10.0)
    assert twice.goodput < 0.5 * most


def test_memory_stays_within_a_tenth_over_sixty_swaps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    names = [add_live_bundle(place), add_bundle(place, bias=1.0)]
    monkeypatch.setenv("ECDCTR_CONTROL_TOKEN", "s3cret")
    growth = memory_growth(place, names, num_swaps=60, num_first=10)
    print(f"grown by {growth:.1%}")
    assert growth <= 0.1
