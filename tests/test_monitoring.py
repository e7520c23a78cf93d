"""A real Prometheus scrapes a real service; every rule and every panel asks for what is there."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import yaml
from bundles import (
    Place,
    add_bundle,
    body,
    eventually,
    make_place,
    serving,
    settings_of,
)
from manifests import ROOT, named, rendered, tool
from servers import free_port
from test_service_app import is_ready, process

from benchmarks.processes import workers
from bundle.reference import write_reference
from service.drift import MIN_SCORES

FOLDER = ROOT / "k8s" / "components" / "monitoring"
RULES: dict[str, Any] = yaml.safe_load((FOLDER / "rules.yaml").read_text())["spec"]
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "dashboard.json").read_text())
RUNBOOK = (ROOT / "docs" / "runbook.md").read_text()
HOW = "apt-get install prometheus"


def rules() -> list[dict[str, Any]]:
    return [rule for group in RULES["groups"] for rule in group["rules"]]


def queries() -> list[str]:
    """Of all panels and annotations, as Grafana would send them."""
    panels = [
        target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
    ]
    everything = [*panels, *(entry["expr"] for entry in DASHBOARD["annotations"]["list"])]
    return [
        query.replace("$namespace", "n").replace("$__rate_interval", "5m") for query in everything
    ]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """With a bundle whose reference is unlike its scores."""
    place = make_place(tmp_path_factory.mktemp("monitoring"))

    def refer(draft: Path) -> None:
        scores = np.full(100, 1e-4)
        write_reference(draft / "reference.json", scores, scores)

    place.registry.promote(add_bundle(place, spoil=refer))
    return place


@pytest.fixture(scope="module")
def exposed(place: Place) -> set[str]:
    """Names of all metrics that a service shows, and of those that rules make of them."""
    with serving(settings_of(place)) as client:
        text = client.get("/metrics").text
    ends = {"counter": [""], "gauge": [""], "histogram": ["_bucket", "_sum", "_count"]}
    families = re.findall(r"^# TYPE (ecdctr_\w+) (\w+)$", text, re.MULTILINE)
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    return {name + end for name, kind in families for end in ends[kind]} | recorded


def unknown(queries: list[str], exposed: set[str]) -> set[str]:
    return {name for query in queries for name in re.findall(r"\becdctr_\w+", query)} - exposed


def test_every_rule_asks_for_metrics_that_there_are(exposed: set[str]) -> None:
    assert not unknown([rule["expr"] for rule in rules()], exposed)


def test_every_panel_asks_for_metrics_that_there_are(exposed: set[str]) -> None:
    assert len(queries()) > 20
    assert not unknown(queries(), exposed)
    assert unknown(["rate(ecdctr_requests[5m])"], exposed), "a name without its end is found"


def checked(
    promtool: str, folder: Path, expressions: list[str]
) -> subprocess.CompletedProcess[str]:
    """What promtool says of expressions, as rules."""
    made = [{"record": f"query:{n}", "expr": query} for n, query in enumerate(expressions)]
    path = folder / "queries.yaml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "queries", "rules": made}]}))
    command = [promtool, "check", "rules", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_panel_is_a_query_that_prometheus_understands(tmp_path: Path) -> None:
    promtool = tool("promtool", HOW)
    done = checked(promtool, tmp_path, queries())
    assert done.returncode == 0, done.stdout + done.stderr
    assert checked(promtool, tmp_path, [*queries(), "rate(ecdctr_x[5m]"]).returncode != 0


def test_panels_stand_beside_each_other_and_their_ids_differ() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        cells = {(at["x"] + x, at["y"] + y) for x in range(at["w"]) for y in range(at["h"])}
        assert at["x"] + at["w"] <= 24
        assert not taken & cells, panel["title"]
        taken |= cells


def test_the_dashboard_is_where_the_sidecar_of_grafana_looks() -> None:
    found = named(rendered("prod"), "ConfigMap/ecdctr-grafana")
    assert found["metadata"]["labels"]["grafana_dashboard"] == "1"
    assert json.loads(found["data"]["ecdctr.json"]) == DASHBOARD


def entries(runbook: str) -> dict[str, list[str]]:
    """The marked words of each entry, by its heading."""
    parts = re.split(r"^## (.+)$", runbook, flags=re.MULTILINE)[1:]
    found = zip(parts[::2], parts[1::2], strict=True)
    return {heading: re.findall(r"^\*\*(\w+)\.\*\*", text, re.MULTILINE) for heading, text in found}


def test_every_alert_has_its_entry_and_every_entry_its_alert() -> None:
    alerts = [rule for rule in rules() if "alert" in rule]
    assert set(entries(RUNBOOK)) == {rule["alert"] for rule in alerts}
    for rule in alerts:
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{rule['alert'].lower()}"
        severity = rule["labels"]["severity"].capitalize()
        assert f"## {rule['alert']}\n\n**Means.** {severity}. " in RUNBOOK


def test_every_entry_says_what_it_means_how_to_see_it_and_what_to_do() -> None:
    assert all(words == ["Means", "See", "Do"] for words in entries(RUNBOOK).values())


def test_links_in_the_runbook_lead_to_an_entry() -> None:
    there = {heading.lower() for heading in entries(RUNBOOK)}
    assert set(re.findall(r"\]\(#(\w+)\)", RUNBOOK)) <= there


@contextmanager
def scraping(url: str, folder: Path) -> Iterator[httpx.Client]:
    """A Prometheus that scrapes `url` each second and evaluates the rules."""
    prometheus = tool("prometheus", HOW)
    (folder / "rules.yaml").write_text(yaml.safe_dump(RULES))
    target = {"targets": [url.removeprefix("http://")], "labels": {"namespace": "n", "pod": "a"}}
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yaml"],
        "scrape_configs": [{"job_name": "ecdctr", "static_configs": [target]}],
    }
    (folder / "prometheus.yaml").write_text(yaml.safe_dump(config))
    own = f"127.0.0.1:{free_port()}"
    command = [
        prometheus,
        "--config.file=prometheus.yaml",
        "--storage.tsdb.path=data",
        f"--web.listen-address={own}",
        "--log.level=error",
    ]
    started = subprocess.Popen(command, cwd=folder)
    try:
        with httpx.Client(base_url=f"http://{own}") as client:
            eventually(lambda: is_up(client))
            yield client
    finally:
        started.terminate()
        started.wait(timeout=20)


def is_up(client: httpx.Client) -> bool:
    try:
        return client.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


def asked(client: httpx.Client, query: str) -> list[float]:
    found = client.get("/api/v1/query", params={"query": query}).json()
    assert found["status"] == "success", found
    return [float(series["value"][1]) for series in found["data"]["result"]]


def test_a_real_prometheus_sees_all_workers_of_a_running_service(
    place: Place, tmp_path: Path
) -> None:
    with process(place, workers=2) as (_, url), scraping(url, tmp_path) as prometheus:
        eventually(lambda: is_ready(url))
        num = 2 * MIN_SCORES // 50
        event = {"request_id": "r", "item": "i", "clicked": True, "score": 0.25}
        event["model"] = place.registry.ids()[0]
        for _ in range(num):  # each connection reaches either worker
            with httpx.Client(base_url=url) as client:
                assert client.post("/v1/score", json=body(num=50)).status_code == 200
                assert client.post("/v1/feedback", json=event).status_code == 200
        wanted = {
            'ecdctr_requests_total{route="/v1/score", status="200"}': [num],
            "sum by (model) (ecdctr_live_model)": [2],
            "sum (ecdctr_scores_total)": [num * 50],
            "ecdctr_score_requests_in_progress": [0],
            # Of all workers together: neither has this many alone, and duplicates count once.
            'sum (ecdctr_feedback_total{outcome="duplicate"})': [num - 1],
            "ecdctr_feedback_pcoc": [0.25],
            'ecdctr_missing_share{feature="slot"}': [0],
            "count (ecdctr_score_psi > 1)": [1],
        }
        eventually(lambda: all(asked(prometheus, q) == w for q, w in wanted.items()))
        loaded = prometheus.get("/api/v1/rules").json()["data"]["groups"]
        found = [rule for group in loaded for rule in group["rules"]]
        eventually(lambda: not asked(prometheus, 'ALERTS{alertname="EcdctrNoLiveModel"}'))
    assert len(found) == len(rules())
    assert not [rule for rule in found if rule.get("lastError")]


def test_a_worker_that_was_killed_no_longer_counts_once_another_takes_its_place(
    place: Place,
) -> None:
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url) and total(url, "ecdctr_swaps_total") == 2)
        assert total(url, "ecdctr_live_model") == 2
        before = workers(server.pid)
        os.kill(min(before), signal.SIGKILL)
        eventually(lambda: total(url, "ecdctr_swaps_total") == 3)
        assert total(url, "ecdctr_live_model") == 2


def total(url: str, name: str) -> float:
    """A metric's sum over labels; 0 where the connection was to a process that ends."""
    try:
        text = httpx.get(f"{url}/metrics").text
    except httpx.TransportError:
        return 0
    values = re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE)
    return sum(float(value) for value in values)
