"""Clicks that callers report, against what was predicted."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from bundles import ITEMS, Place, body, serving, settings_of
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from test_service_metrics import value

from service.feedback import SEEN_SLOTS, Feedback, Seen, auc
from service.recent import Recent
from service.schemas import Event


@pytest.fixture
def client(place: Place) -> Iterator[httpx.Client]:
    with serving(settings_of(place)) as client:
        yield client


def events(client: httpx.Client, clicked: set[int], num: int = 10) -> list[dict[str, Any]]:
    """What a caller reports of one page, on which these places were clicked."""
    answer = client.post("/v1/score", json=body(num=num))
    scored = answer.json()
    return [
        {
            "request_id": answer.headers["x-request-id"],
            "item": item,
            "clicked": place in clicked,
            "score": score,
            "model": scored["model"],
        }
        for place, (item, score) in enumerate(zip(ITEMS, scored["scores"], strict=False))
    ]


def test_clicks_give_ctr_calibration_and_auc_of_the_model_that_scored(
    client: httpx.Client,
) -> None:
    batch = events(client, clicked={1, 7}) + events(client, clicked={3})
    for place, event in enumerate(batch):  # as far apart as a real model's
        event["score"] = 0.0001 * 1.3 ** (place * 7 % 20)
    answer = client.post("/v1/feedback", json=batch)
    assert answer.json() == {"counted": 20, "duplicate": 0, "unknown_model": 0}
    model = batch[0]["model"]
    scores, labels = [e["score"] for e in batch], [e["clicked"] for e in batch]
    assert value(client, "ecdctr_feedback_events", model=model) == 20
    assert value(client, "ecdctr_feedback_ctr", model=model) == pytest.approx(3 / 20)
    assert value(client, "ecdctr_feedback_pcoc", model=model) == pytest.approx(sum(scores) / 3)
    found = value(client, "ecdctr_feedback_auc", model=model)
    assert found == pytest.approx(roc_auc_score(labels, scores))


def test_an_event_alone_is_taken_and_counts_once_however_often_it_comes(
    client: httpx.Client,
) -> None:
    event, other = events(client, clicked={0}, num=2)
    for outcome in ("counted", "duplicate", "duplicate"):
        assert client.post("/v1/feedback", json=event).json()[outcome] == 1
    again = client.post("/v1/feedback", json=[event, other, other]).json()
    assert again == {"counted": 1, "duplicate": 2, "unknown_model": 0}
    assert value(client, "ecdctr_feedback_events", model=event["model"]) == 2
    assert value(client, "ecdctr_feedback_total", outcome="duplicate") == 4


def test_a_model_that_does_not_exist_is_counted_and_makes_no_label(client: httpx.Client) -> None:
    event = {**events(client, set())[0], "model": "made-up"}
    assert client.post("/v1/feedback", json=event).json()["unknown_model"] == 1
    assert value(client, "ecdctr_feedback_total", outcome="unknown_model") == 1
    assert "made-up" not in client.get("/metrics").text


def test_no_feedback_at_all_gives_no_figures(client: httpx.Client, place: Place) -> None:
    (model,) = place.registry.ids()
    assert value(client, "ecdctr_feedback_ctr", model=model) is None
    assert client.post("/v1/feedback", json=[]).json()["counted"] == 0


GOOD = {"request_id": "r", "item": "i", "clicked": True, "score": 0.5, "model": "m"}


@pytest.mark.parametrize(
    ("content", "status", "field"),
    [
        ("[", 400, None),
        ("{}", 422, "request_id"),
        (json.dumps({**GOOD, "clicked": 1}), 422, "clicked"),
        (json.dumps({**GOOD, "score": 1.5}), 422, "score"),
        (json.dumps({**GOOD, "score": "0.5"}), 422, "score"),
        (json.dumps([GOOD, {**GOOD, "user": 1}]), 422, "[1].user"),
        (json.dumps([GOOD] * 501), 422, "body"),
    ],
)
def test_wrong_feedback_is_answered_with_the_field(
    client: httpx.Client, content: str, status: int, field: str | None
) -> None:
    answer = client.post("/v1/feedback", content=content)
    assert answer.status_code == status
    assert field is None or answer.json()["errors"][0]["field"] == field


def test_processes_share_what_they_have_seen(tmp_path: Path) -> None:
    one, other = Seen(tmp_path), Seen(tmp_path)
    assert one.add([("r", "item")]).tolist() == [True]
    assert other.add([("r", "item"), ("r", "other item")]).tolist() == [False, True]
    assert (tmp_path / "feedback-seen.bin").stat().st_size == SEEN_SLOTS * 8


def test_a_hundred_thousand_different_events_are_not_taken_for_duplicates() -> None:
    seen, pairs = Seen(), list(itertools.product(map(str, range(1000)), range(100)))
    assert all(seen.add(pairs[start : start + 500]).all() for start in range(0, len(pairs), 500))


def test_an_item_is_the_same_as_a_number_and_as_text_and_a_batch_repeats_itself() -> None:
    assert Seen().add([("r", 17), ("r", "17"), ("r", 18)]).tolist() == [True, False, True]


@pytest.mark.parametrize("mean", [-7.0, -3.0, 0.0, 3.0])
def test_auc_of_bins_is_near_that_of_the_scores_however_rare_clicks_are(mean: float) -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(mean, 1, 20_000)
    scores = 1 / (1 + np.exp(-logits))
    labels = rng.random(len(scores)) < 1 / (1 + np.exp(-2 * (logits - mean)))
    recent = Recent("x", 60, 10)
    feedback = Feedback(recent)
    feedback.known = {"m"}
    for start in range(0, len(scores), 500):
        part = slice(start, start + 500)
        rows = enumerate(zip(scores[part].tolist(), labels[part].tolist(), strict=True), start)
        feedback.take([an_event(str(n), score, clicked) for n, (score, clicked) in rows])
    ((_, observed),) = feedback.observed()
    assert observed.num == len(scores)
    assert observed.pcoc == pytest.approx(scores.sum() / labels.sum())
    assert observed.auc == pytest.approx(roc_auc_score(labels, scores), abs=0.002)


def an_event(item: str, score: float, clicked: bool) -> Event:
    return Event(request_id="r", item=item, clicked=clicked, score=score, model="m")


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=60))
def test_auc_of_bins_is_that_of_the_rows_in_them(rows: list[tuple[int, bool]]) -> None:
    bins, labels = np.array([b for b, _ in rows]), np.array([y for _, y in rows])
    spread = [np.bincount(bins[labels == y], minlength=10).astype(float) for y in (False, True)]
    if labels.all() or not labels.any():
        assert np.isnan(auc(*spread))
    else:
        assert auc(*spread) == pytest.approx(roc_auc_score(labels, bins))
