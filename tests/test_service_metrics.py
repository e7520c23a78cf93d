"""What /metrics says of the live bundle, its scores and its inputs."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
import numpy as np
import pytest
from bundles import (
    Place,
    add_bundle,
    add_live_bundle,
    body,
    eventually,
    make_place,
    serving,
    settings_of,
)
from conftest import Exported
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bundle.reference import EDGES, histogram, read_histogram, write_reference
from service.drift import MIN_SCORES, stability_index
from service.metrics import MOST_WAITING, Metrics
from service.recent import Recent
from service.scorer import Scored
from service.tally import observe_all

ROOT = Path(__file__).parent.parent


def value(client: httpx.Client, name: str, **labels: str) -> float | None:
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            if sample.name == name and sample.labels == labels:
                return sample.value
    return None


@pytest.fixture
def client(place: Place) -> Iterator[httpx.Client]:
    with serving(settings_of(place)) as client:
        yield client


def test_scores_are_counted_by_bin_and_summed(client: httpx.Client) -> None:
    scores = np.array(client.post("/v1/score", json=body(num=50)).json()["scores"])
    found = [value(client, "ecdctr_scores_total", up_to=f"{edge:g}") for edge in EDGES]
    assert found == histogram(scores).tolist()
    assert value(client, "ecdctr_predicted_clicks_total") == pytest.approx(scores.sum())


def test_a_bin_holds_the_scores_up_to_its_label() -> None:
    scores = np.array([0.0, EDGES[0], EDGES[0] * 1.01, 0.1, 0.11, 1.0], np.float32)
    counts = histogram(scores)
    assert counts.sum() == len(scores)
    assert (counts[0], counts[1], counts[EDGES.index(0.1)], counts[-1]) == (2, 1, 1, 1)


def test_a_request_is_in_progress_from_its_first_byte_to_its_answer(client: httpx.Client) -> None:
    name = "ecdctr_score_requests_in_progress"
    assert value(client, name) == 0
    content = json.dumps(body()).encode()
    with socket.create_connection((client.base_url.host, client.base_url.port or 0)) as half:
        head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
        half.sendall(head.encode() + content[:10])
        eventually(lambda: value(client, name) == 1)
        half.sendall(content[10:])
        assert half.recv(12) == b"HTTP/1.1 200"
    assert value(client, name) == 0


def test_metrics_say_of_when_the_live_bundle_is(client: httpx.Client) -> None:
    made = datetime(2017, 7, 1, tzinfo=UTC).timestamp()
    assert value(client, "ecdctr_model_created_timestamp_seconds") == made
    assert value(client, "ecdctr_model_asof_timestamp_seconds") == made


def test_a_manifest_with_another_kind_of_date_costs_that_metric_only(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    place.registry.promote(add_bundle(place, asof="someday"))
    with serving(settings_of(place)) as client:
        assert math.isnan(value(client, "ecdctr_model_asof_timestamp_seconds") or 0)
        assert value(client, "ecdctr_score_requests_in_progress") == 0


def test_the_share_of_what_is_missing_counts_items_by_candidates_and_users_by_requests(
    client: httpx.Client,
) -> None:
    assert value(client, "ecdctr_missing_share", feature="price") is None
    client.post("/v1/score", json=body(candidates={"id": ["item-1", "never-seen"]}))
    client.post("/v1/score", json=body(candidates={"id": ["item-1", "item-2"]}, context={}))
    assert value(client, "ecdctr_missing_share", feature="price") == 0.25
    assert value(client, "ecdctr_missing_share", feature="hour") == 0.5
    assert value(client, "ecdctr_missing_share", feature="age") == 0
    assert value(client, "ecdctr_missing_share", feature="user_id") is None


def score_enough(client: httpx.Client) -> list[float]:
    scores: list[float] = []
    while len(scores) < MIN_SCORES:
        scores += client.post("/v1/score", json=body(num=50)).json()["scores"]
    return scores


def test_a_bundle_without_a_reference_serves_and_has_no_index_of_drift(
    client: httpx.Client,
) -> None:
    score_enough(client)
    assert value(client, "ecdctr_score_psi") is None
    assert "# TYPE ecdctr_score_psi gauge" in client.get("/metrics").text


def test_scores_like_the_reference_are_stable_and_others_are_drift(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    with serving(settings_of(place)) as client:
        usual = np.array(score_enough(client))

    def promote(scores: np.ndarray, asof: str) -> None:
        def refer(draft: Path) -> None:
            write_reference(draft / "reference.json", scores, scores)

        place.registry.promote(add_bundle(place, spoil=refer, asof=asof))

    promote(usual, "2017-07-02")
    with serving(settings_of(place)) as client:
        client.post("/v1/score", json=body(num=50))
        assert value(client, "ecdctr_score_psi") is None, "too few scores say nothing"
        score_enough(client)
        stable = value(client, "ecdctr_score_psi")
    promote(usual / 10, "2017-07-03")
    with serving(settings_of(place)) as client:
        score_enough(client)
        drifted = value(client, "ecdctr_score_psi")
    assert stable is not None
    assert drifted is not None
    assert stable < 0.01 < 0.25 < drifted


def test_the_stability_index_is_that_of_the_textbook() -> None:
    p, q = np.array([200_000, 800_000]), np.array([500_000, 500_000])
    by_hand = (0.2 - 0.5) * np.log(0.2 / 0.5) + (0.8 - 0.5) * np.log(0.8 / 0.5)
    assert stability_index(p, q) == pytest.approx(by_hand, rel=1e-4)
    assert stability_index(p, 3 * p) == pytest.approx(0, abs=1e-9)
    assert np.isfinite(stability_index([10, 0], [0, 10]))


def test_an_exported_bundle_is_compared_with_whole_requests(tiny_exported: Exported) -> None:
    counts = read_histogram(tiny_exported.bundle)
    assert counts is not None
    golden = json.loads((tiny_exported.bundle / "reference.json").read_text())["count"]
    assert counts.sum() > golden


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        "[]",
        "not JSON",
        json.dumps({"edges": EDGES, "histogram": [1, 2]}),
        json.dumps({"edges": [0.5, 1], "histogram": [1] * len(EDGES)}),
        json.dumps({"edges": EDGES, "histogram": [0] * len(EDGES)}),
    ],
)
def test_a_reference_of_another_kind_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "reference.json").write_text(content)
    assert read_histogram(tmp_path) is None


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_what_is_older_than_the_window_no_longer_counts() -> None:
    clock = Clock()
    recent = Recent("x", window_s=60, slice_s=10, clock=clock)
    for _ in range(20):
        recent.add("a", 1)
        clock.now_s += 10
        recent.tick()
    assert recent.total()["a"] == 6
    clock.now_s += 100
    recent.tick()
    assert "a" not in recent.total()


def in_another_process(folder: Path, code: str) -> None:
    script = (
        "from pathlib import Path; from service.recent import Recent;"
        f" r = Recent('x', 60, 10, Path({str(folder)!r})); {code}"
    )
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", script], env=environ, check=True)


def age(path: Path, seconds: float) -> None:
    at = path.stat().st_mtime - seconds
    os.utime(path, (at, at))


@pytest.mark.parametrize(
    ("code", "change", "wanted"),
    [
        ("r.add('a', 2); r.share(r.content())", lambda path: None, 5),
        ("r.add('a', 2); r.share(r.content())", lambda path: age(path, 3600), 3),
        ("r.add('a', 2); r.share(r.content()); r.close()", None, 3),
    ],
    ids=["it is alive", "it died", "it ended"],
)
def test_processes_see_each_others_counts_while_they_live(
    tmp_path: Path, code: str, change: Callable[[Path], None] | None, wanted: float
) -> None:
    recent = Recent("x", 60, 10, tmp_path)
    recent.add("a", 3)
    recent.share(recent.content())
    own = set(tmp_path.iterdir())
    in_another_process(tmp_path, code)
    others = set(tmp_path.iterdir()) - own
    assert len(others) == (change is not None)
    for path in others:
        assert change is not None
        change(path)
    assert recent.total()["a"] == wanted


@given(st.lists(st.floats(0, 2) | st.sampled_from([0.1, 0.25, 1.0])))
def test_observing_many_values_at_once_is_the_same_as_one_after_the_other(
    values: list[float],
) -> None:
    def rendered(observe: Callable[[Histogram], None]) -> list[float]:
        registry = CollectorRegistry()
        observe(Histogram("x", "x", buckets=(0.1, 0.25, 1.0), registry=registry))
        text = generate_latest(registry).decode()
        lines = [line for line in text.splitlines() if "#" not in line and "created" not in line]
        return [float(line.split()[-1]) for line in lines]

    def each(histogram: Histogram) -> None:
        for value in values:
            histogram.observe(value)

    expected = pytest.approx(rendered(each))
    assert rendered(lambda histogram: observe_all(histogram, values)) == expected


def test_what_requests_add_is_handed_on_before_the_next_tick_where_it_is_much() -> None:
    metrics, model = Metrics(CollectorRegistry()), "m"
    scored = Scored(model, np.array([0.5, 0.25], np.float32), {"user_window": "busy"}, {"age": 1})

    def count() -> float:
        line = next(
            line
            for line in metrics.render().decode().splitlines()
            if line.startswith(f'ecdctr_scored_requests_total{{model="{model}"}}')
        )
        return float(line.split()[-1])

    for _ in range(MOST_WAITING):
        metrics.scored(scored, {"total": 0.001})
    assert count() == MOST_WAITING
    metrics.scored(scored, {"total": 0.001})
    assert count() == MOST_WAITING
    metrics.tick(None)
    assert count() == MOST_WAITING + 1
    text = metrics.render().decode()
    assert f'ecdctr_missing_total{{feature="age"}} {MOST_WAITING + 1}.0' in text
    assert f'ecdctr_stage_seconds_count{{stage="total"}} {MOST_WAITING + 1}.0' in text
    assert f'ecdctr_degraded_total{{reason="busy",what="user_window"}} {MOST_WAITING + 1}.0' in text
    assert f"ecdctr_predicted_clicks_total {0.75 * (MOST_WAITING + 1)}" in text
