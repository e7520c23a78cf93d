"""Spans of requests arrive at a real collector, as children of the caller's own."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bundles import add_live_bundle, body, make_place, serving, settings_of

proto = pytest.importorskip("opentelemetry.proto.collector.trace.v1.trace_service_pb2")
pytest.importorskip("opentelemetry.exporter.otlp.proto.http")

ROOT = Path(__file__).parent.parent
TRACE, CALLER = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


@dataclass
class Collector:
    """A server that takes spans as OTLP over HTTP."""

    url: str
    requests: list[bytes] = field(default_factory=list)

    def spans(self) -> list[tuple[str, object]]:
        """Name of the service and span, of all that came."""
        found = []
        for content in self.requests:
            for resource in proto.ExportTraceServiceRequest.FromString(content).resource_spans:
                named = {a.key: a.value.string_value for a in resource.resource.attributes}
                for scope in resource.scope_spans:
                    found += [(named["service.name"], span) for span in scope.spans]
        return found


@contextmanager
def collecting() -> Iterator[Collector]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            content = self.rfile.read(int(self.headers["content-length"]))
            collector.requests.append(content)
            self.send_response(200)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector = Collector(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_request_and_its_stages_are_spans_below_the_callers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    model = add_live_bundle(place)
    with collecting() as collector:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with serving(settings_of(place, traces=True)) as client:
            header = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
            client.post("/v1/score", json=body(num=7, request_id="a-1"), headers=header)
            client.post("/v1/score", content=b"{}")
            client.get("/livez")
        found = collector.spans()
    assert {name for name, _ in found} == {"ecdctr"}
    spans = [span for _, span in found]
    first, second = [s for s in spans if s.name == "POST /v1/score"]
    assert (first.trace_id.hex(), first.parent_span_id.hex()) == (TRACE, CALLER)
    assert not second.parent_span_id
    named = {a.key: a.value for a in first.attributes}
    assert named["http.response.status_code"].int_value == 200
    assert named["ecdctr.request_id"].string_value == "a-1"
    assert named["ecdctr.model"].string_value == model
    assert named["ecdctr.candidates"].int_value == 7
    stages = [s for s in spans if s.parent_span_id == first.span_id]
    wanted = ["receive", "queue", "decode", "encode", "lookup", "run", "serialise"]
    assert [s.name for s in sorted(stages, key=lambda s: s.start_time_unix_nano)] == wanted
    for stage in stages:
        assert stage.start_time_unix_nano >= first.start_time_unix_nano
        assert stage.end_time_unix_nano <= first.end_time_unix_nano
    assert not any("livez" in s.name for s in spans), "a probe is no request"


def test_without_the_switch_nothing_of_it_is_loaded() -> None:
    code = "import sys, service.app; print('opentelemetry.sdk' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.strip() == b"False"


def test_a_collector_that_is_away_costs_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "1")
    with serving(settings_of(place, traces=True)) as client:
        assert client.post("/v1/score", json=body()).status_code == 200


def test_on_a_machine_without_the_extra_the_switch_says_what_to_install(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['opentelemetry.sdk'] = None\n"
        "from service.traces import open_provider\n"
        "from service.settings import SettingsError\n"
        "try: open_provider()\n"
        "except SettingsError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert b"pip install 'ecdctr[otel]'" in done.stdout
