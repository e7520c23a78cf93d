"""The whole path, on real data: what is trained, what is exported and what is served say the same,
and the same training gives the same bundle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import pytest
import tiny
from conftest import Exported
from scipy.special import expit

from bundle.artifact import Artifact, open_artifact
from bundle.encode import Request
from bundle.golden import body_of
from embeddings_store import WindowRef
from training.actr import load_actr, train_actr
from training.client import ServiceError, score_over_http
from training.events import EventLog
from training.examples import builder_for
from training.export import export_actr
from training.fit import predict
from training.requests import RequestMaker
from training.scoring import BundleScorer
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]
NUM_REQUESTS = 8


@dataclass(frozen=True)
class Pages:
    """Real requests of the bundle's day, and what torch says of each, offline."""

    requests: list[Request]
    offline: list[Floats]


@pytest.fixture(scope="module")
def pages(journey_exported: Exported) -> Pages:
    workspace, asof = journey_exported.workspace, journey_exported.asof
    log = workspace.log()
    builder = builder_for(workspace, log, asof, asof)
    model = load_actr(workspace, asof, journey_exported.recipe.network)
    requests, offline = [], []
    for request, rows in RequestMaker(log, builder, asof).requests(
        log.full_lists([asof], NUM_REQUESTS)
    ):
        requests.append(request)
        offline.append(expit(predict(model.network, builder.build(rows)) + model.offset))
    return Pages(requests, offline)


@pytest.fixture(scope="module")
def artifact(journey_exported: Exported) -> Artifact:
    return open_artifact(journey_exported.bundle)


@pytest.fixture(scope="module")
def client(journey_url: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=journey_url, timeout=30) as client:
        yield client


def by_graph(workspace: Workspace, artifact: Artifact, requests: Sequence[Request]) -> list[Floats]:
    """Scores of the bundle's graph, encoded and looked up as the service does, without HTTP."""
    window = artifact.manifest.window
    reader = workspace.store.open_now(WindowRef(window.month, window.build))
    return BundleScorer(artifact.encoder, artifact.folder).score_all(reader, requests)


def ask(client: httpx.Client, request: Request) -> dict[str, Any]:
    response = client.post("/v1/score", json=body_of(request))
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["degraded"] == []
    return answer


def scores_of(client: httpx.Client, request: Request, places: Sequence[int]) -> Floats:
    """Scores of the candidates at some places of a request, in that order."""
    chosen = replace(
        request,
        item_ids=[request.item_ids[i] for i in places],
        item_features={n: [c[i] for i in places] for n, c in request.item_features.items()},
    )
    return np.array(ask(client, chosen)["scores"])


def test_torch_the_graph_and_the_service_agree_on_real_rows(
    journey_exported: Exported, artifact: Artifact, pages: Pages, client: httpx.Client
) -> None:
    graph = by_graph(journey_exported.workspace, artifact, pages.requests)
    assert sum(map(len, pages.offline)) >= 1000
    for request, torch_scores, graph_scores in zip(
        pages.requests, pages.offline, graph, strict=True
    ):
        answer = ask(client, request)
        assert answer["model"] == journey_exported.bundle_id
        served = np.array(answer["scores"])
        assert len(served) == len(torch_scores) == len(graph_scores)
        np.testing.assert_allclose(graph_scores, torch_scores, atol=1e-5, rtol=0)
        np.testing.assert_allclose(served, graph_scores, atol=1e-5, rtol=0)
        np.testing.assert_allclose(served, torch_scores, atol=1e-5, rtol=0)


def test_agreement_is_not_that_of_scores_that_are_all_alike(pages: Pages) -> None:
    """The tolerance would hide a wrong score if all of them were small and equal."""
    everything = np.concatenate(pages.offline)
    assert everything.max() > 1e-2
    assert np.unique(everything.round(5)).size > 100


def test_relative_differences_are_small_too(pages: Pages, client: httpx.Client) -> None:
    """An auction multiplies scores by bids."""
    for request, torch_scores in zip(pages.requests, pages.offline, strict=True):
        served = np.array(ask(client, request)["scores"])
        np.testing.assert_allclose(served, torch_scores, rtol=2e-3, atol=1e-8)


def test_an_ad_has_the_same_score_alone_and_among_others_in_any_order(
    pages: Pages, client: httpx.Client
) -> None:
    request = max(pages.requests, key=lambda r: len(r.history_items))
    whole = np.array(ask(client, request)["scores"])
    best = int(whole.argmax())
    num = len(request.item_ids)
    rng = np.random.default_rng(0)
    for places in (
        [best],
        [3, best, 5, 0, 1, 2, 4],
        [best, best],
        rng.permutation(num).tolist(),
        # A thousand, most of them several times.
        [best, *rng.integers(0, num, 999).tolist()],
    ):
        found = scores_of(client, request, places)
        assert len(found) == len(places)
        np.testing.assert_allclose(found, whole[places], atol=1e-6, rtol=0)


def test_ids_alone_get_features_from_the_bundles_item_table(
    pages: Pages, artifact: Artifact, journey_exported: Exported, client: httpx.Client
) -> None:
    request = replace(pages.requests[0], item_features={})
    (expected,) = by_graph(journey_exported.workspace, artifact, [request])
    answer = ask(client, request)
    np.testing.assert_allclose(answer["scores"], expected, atol=1e-6)
    assert answer["missing"].keys() >= pages.requests[0].item_features.keys()


def test_somebody_unknown_is_scored_without_a_window_and_told_so(
    pages: Pages, client: httpx.Client
) -> None:
    nobody = replace(
        pages.requests[0],
        user_id="nobody",
        user_features={},
        history_items=[],
        history_age_days=[],
        history_count=[],
    )
    answer = ask(client, nobody)
    assert answer["missing"]["user_window"] == 1
    assert answer["missing"]["history"] == 1
    assert np.isfinite(answer["scores"]).all()
    assert answer["scores"] != ask(client, pages.requests[0])["scores"]


def test_the_client_gives_scores_in_order_and_says_what_the_service_said(
    pages: Pages, journey_url: str
) -> None:
    answers = score_over_http(journey_url, pages.requests[:3])
    for scores, expected in zip(answers.scores, pages.offline, strict=False):
        np.testing.assert_allclose(scores, expected, atol=1e-5)
    assert (answers.latency_ms > 0).all()
    wrong = replace(pages.requests[0], context={"planet": "mars"})
    with pytest.raises(ServiceError, match=r"answered 422: .*planet"):
        score_over_http(journey_url, [wrong])


def test_what_is_served_is_as_calibrated_as_what_was_trained(
    pages: Pages, client: httpx.Client
) -> None:
    predicted = sum(sum(ask(client, request)["scores"]) for request in pages.requests)
    assert predicted == pytest.approx(sum(map(np.sum, pages.offline)), rel=1e-4)


def bundle_of(root: Path, data: Path, seed: int) -> tuple[str, float]:
    """The id of a bundle of all tiers, and A-CTR's loss, from nothing but a log and a seed."""
    root.mkdir()
    (root / "data").symlink_to(data)
    workspace, recipe = Workspace(root), tiny.RECIPE
    tiny.train_before_ads(workspace, seed=seed)
    train_actr(workspace, tiny.ASOF, recipe.network, recipe.actr, seed)
    bundle_id = export_actr(workspace, tiny.ASOF, recipe)
    return bundle_id, load_actr(workspace, tiny.ASOF, recipe.network).facts["loss"]


def test_the_same_log_and_seed_give_the_same_bundle_and_another_seed_another(
    tiny_data: Path, tiny_exported: Exported, tmp_path: Path
) -> None:
    facts = load_actr(tiny_exported.workspace, tiny.ASOF, tiny.RECIPE.network).facts
    again, loss = bundle_of(tmp_path / "again", tiny_data, seed=0)
    assert (again, loss) == (tiny_exported.bundle_id, facts["loss"])
    other, other_loss = bundle_of(tmp_path / "other", tiny_data, seed=1)
    assert other != again
    assert other_loss != loss


def test_a_bundle_does_not_depend_on_what_happens_from_its_day_on(
    tiny_data: Path, tiny_log: EventLog, tiny_exported: Exported, tmp_path: Path
) -> None:
    """All of it: three tiers, windows, calibration, item table and golden requests."""
    altered = tiny.alter_from(tiny_data, tmp_path / "altered", tiny.ASOF, remove=True)
    assert len(EventLog(altered).days("item")) < len(tiny_log.days("item"))
    found, _ = bundle_of(tmp_path / "workspace", altered, seed=0)
    assert found == tiny_exported.bundle_id
