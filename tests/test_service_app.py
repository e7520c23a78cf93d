"""The service around the scores: documentation, probes, metrics, processes and signals."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest
from bundles import Place, add_live_bundle, body, eventually, make_place, serving, settings_of
from prometheus_client.parser import text_string_to_metric_families
from runclock import run_s
from servers import free_port

from bundle.registry import Registry, RegistryUnavailable

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def client(place: Place) -> Iterator[httpx.Client]:
    with serving(settings_of(place)) as client:
        yield client


def samples(client: httpx.Client) -> dict[str, float]:
    """Values by name and labels: 'ecdctr_requests_total{route=/livez,status=200}'."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name}{{{labels}}}"] = sample.value
    return found


def is_beside(client: httpx.Client, role: str, bundle_id: str) -> bool:
    """Whether a bundle is the canary, or the shadow."""
    start = f"ecdctr_{role}_model{{model={bundle_id}"
    return any(name.startswith(start) and value == 1 for name, value in samples(client).items())


def test_the_documentation_needs_nothing_from_elsewhere(client: httpx.Client) -> None:
    page = client.get("/docs", headers={"host": "evil.example"})
    assert page.status_code == 200
    assert "//" not in re.sub(r"//[ -].*|<!--.*?-->", "", page.text)
    assert "evil.example" not in page.text
    assert '"validatorUrl": null' in page.text
    links = re.findall(r'(?:src|href)="([^"]+)"', page.text) + re.findall(
        r"url: '(.+?)'", page.text
    )
    assert len(links) == 4
    for link in links:
        assert client.get(f"/{link}").status_code == 200


def test_the_schema_documents_request_answer_and_every_error(client: httpx.Client) -> None:
    schema = client.get("/openapi.json").json()
    score = schema["paths"]["/v1/score"]["post"]
    request = score["requestBody"]["content"]["application/json"]["schema"]
    assert request == {"$ref": "#/components/schemas/ScoreRequest"}
    assert set(score["responses"]) == {"200", "400", "408", "413", "415", "422", "503", "504"}
    for status, response in score["responses"].items():
        media_type = "application/json" if status == "200" else "application/problem+json"
        assert list(response["content"]) == [media_type]
    for reference in re.findall(r"#/components/schemas/(\w+)", str(schema)):
        assert reference in schema["components"]["schemas"]
    assert schema["components"]["schemas"]["ScoreRequest"]["examples"]
    assert schema["components"]["schemas"]["ScoreResponse"]["examples"]


def test_what_a_silent_registry_holds_is_not_known_and_not_nothing(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    def silent(_: Registry) -> list[str]:
        raise RegistryUnavailable("planted")

    monkeypatch.setattr(Registry, "ids", silent)
    models = client.get("/v1/models").json()
    assert models["live"] is not None
    assert models["available"] is None
    found = client.get("/console/bundles").json()
    assert (found["bundles"], found["num_bundles"]) == ([], None)


def test_the_models_page_tells_what_is_live_and_what_there_is(
    client: httpx.Client, place: Place
) -> None:
    models = client.get("/v1/models").json()
    assert models["live"]["id"] in models["available"]
    assert models["live"]["asof"] == "2017-07-01"
    assert models["live"]["window"]["build"] == place.window.ref.build
    assert models["live"]["lineage"]["cpm_id"] == "cpm-1"
    assert models["live"]["metrics"] == {"auc": 0.75}
    assert models["live"]["since"]
    assert models["refusals"] == []


def test_metrics_count_answers_by_route_template_and_nothing_by_path(client: httpx.Client) -> None:
    before = samples(client)

    def grown(name: str) -> float:
        return samples(client)[name] - before.get(name, 0.0)

    for number in range(5):
        client.get(f"/no/such/{number}")
    for _ in range(2):
        client.post("/v1/score", json=body(num=20))
    client.post("/v1/score", content=b"{")
    client.get("/v1/score")
    assert grown("ecdctr_requests_total{route=unknown,status=404}") == 5
    assert grown("ecdctr_requests_total{route=/v1/score,status=200}") == 2
    assert grown("ecdctr_requests_total{route=/v1/score,status=400}") == 1
    assert grown("ecdctr_requests_total{route=/v1/score,status=405}") == 1
    assert grown("ecdctr_candidates_sum{}") == 40
    for stage in ("decode", "encode", "lookup", "run", "serialise", "total"):
        assert grown(f"ecdctr_stage_seconds_count{{stage={stage}}}") == 2
    assert not any("/no/such" in name for name in samples(client))


def test_missing_values_are_counted_by_feature(client: httpx.Client) -> None:
    before = samples(client).get("ecdctr_missing_total{feature=category}", 0.0)
    client.post("/v1/score", json=body(candidates={"id": ["never-seen", "item-1", "also-new"]}))
    assert samples(client)["ecdctr_missing_total{feature=category}"] - before == 2


@contextmanager
def process(place: Place, workers: int) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A service in a process of its own, and its URL."""
    port = free_port()
    code = (
        "import os; from service.app import serve; from service.settings import Settings;"
        f" serve(Settings.from_env(os.environ), '127.0.0.1', {port}, {workers})"
    )
    environ = {
        **os.environ,
        "ECDCTR_REGISTRY": str(place.registry.root),
        "ECDCTR_STORE": place.store_url,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    started = subprocess.Popen([sys.executable, "-c", code], env=environ, start_new_session=True)
    try:
        yield started, f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):  # its workers too, which would outlive it
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz").status_code == 200
    except httpx.TransportError:
        return False


def test_sigterm_ends_a_server_that_was_serving_with_exit_code_0(place: Place) -> None:
    with process(place, workers=1) as (server, url), httpx.Client(base_url=url) as client:
        eventually(lambda: is_ready(url))
        assert client.post("/v1/score", json=body()).status_code == 200
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0


def test_workers_share_their_metrics_and_end_with_exit_code_0(place: Place) -> None:
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url))
        live = f"ecdctr_live_model{{model={place.registry.ids()[0]},window={place.window.ref}}}"
        with httpx.Client(base_url=url) as client:
            eventually(lambda: samples(client)[live] == 2)
        # Each connection reaches one worker; each worker tells of all answers.
        for _ in range(10):
            with httpx.Client(base_url=url) as client:
                assert client.post("/v1/score", json=body()).status_code == 200
        with httpx.Client(base_url=url) as client:
            assert samples(client)["ecdctr_requests_total{route=/v1/score,status=200}"] == 10
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0


def test_importing_the_service_loads_nothing_of_training() -> None:
    code = (
        "import sys, service.app;"
        " print(sorted({m.split('.')[0] for m in sys.modules}"
        " & {'torch', 'polars', 'pyarrow', 'onnx', 'training', 'httpx'}))"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert run.stdout.decode().strip() == "[]"


def test_the_event_loop_answers_while_a_bundle_loads(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    with serving(settings_of(place)) as client:
        worst_s = 0.0
        for number in range(1, 4):
            add_live_bundle(place, bias=number / 2)
            for _ in range(30):
                started_s = run_s()
                assert client.get("/livez").status_code == 200
                worst_s = max(worst_s, run_s() - started_s)
    assert worst_s < 1.0
