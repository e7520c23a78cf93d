"""Ends and losses of processes under load: nobody who asks a service that is ready notices."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path

import httpx
import pytest
from bundles import Place, add_live_bundle, body, eventually
from runclock import run_s
from test_monitoring import total
from test_service_app import is_ready, process

from benchmarks.processes import workers

NUM_CALLERS = 8


class Callers:
    """Callers with connections that stay open. Each sends its next request, as soon as it has its
    answer, to the first of `ports` that was ready when it was last asked, as a balancer does."""

    def __init__(self, *ports: int) -> None:
        self.num_ok = 0
        self.models: list[tuple[float, str]] = []
        """When a request was sent, and who answered it."""
        self.failures: list[str] = []
        self.port = ports[0]
        self._ports = ports
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._call) for _ in range(NUM_CALLERS)]
        if len(ports) > 1:
            self._threads.append(threading.Thread(target=self._balance))

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()

    def _balance(self) -> None:
        while not self._over.wait(0.1):
            self.port = next(p for p in self._ports if is_ready(f"http://127.0.0.1:{p}"))

    def _call(self) -> None:
        content, headers = json.dumps(body(num=20)), {"content-type": "application/json"}
        connection, port = None, 0
        while not self._over.is_set():
            if connection is None or port != self.port:
                if connection:
                    connection.close()
                port = self.port
                connection = HTTPConnection("127.0.0.1", port, timeout=20)
            sent_s = run_s()
            try:
                connection.request("POST", "/v1/score", content, headers)
                response = connection.getresponse()
                answer = response.read()
            except (OSError, HTTPException) as error:
                self.failures.append(repr(error))
                connection.close()
                continue
            if response.status != 200:
                self.failures.append(f"{response.status} {answer!r}")
                continue
            self.num_ok += 1
            self.models.append((sent_s, json.loads(answer)["model"]))
            time.sleep(0.005)
        if connection:
            connection.close()


def port_of(url: str) -> int:
    return int(url.rpartition(":")[2])


@contextmanager
def two_services(
    place: Place, num_workers: int
) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """Two services over one registry: the first one's process, and both ports."""
    with process(place, num_workers) as (first, url), process(place, 1) as (_, other):
        eventually(lambda: is_ready(url) and is_ready(other))
        yield first, port_of(url), port_of(other)


@pytest.mark.parametrize("num_workers", [1, 2])
def test_no_request_fails_when_one_of_two_services_gets_sigterm(
    place: Place, num_workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDCTR_DRAIN_S", "1.5")
    with two_services(place, num_workers) as (first, port, other):
        with Callers(port, other) as callers:
            eventually(lambda: callers.num_ok > 100)
            first.send_signal(signal.SIGTERM)
            eventually(lambda: callers.port == other)
            assert first.poll() is None
            assert first.wait(timeout=20) == 0
            before = callers.num_ok
            eventually(lambda: callers.num_ok > before + 100)
        assert callers.failures == []


def test_without_a_drain_requests_fail_which_these_callers_notice(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDCTR_DRAIN_S", "0")
    with two_services(place, 1) as (first, port, other):
        with Callers(port, other) as callers:
            eventually(lambda: callers.num_ok > 100)
            first.send_signal(signal.SIGTERM)
            assert first.wait(timeout=20) == 0
            eventually(lambda: callers.port == other)
        assert callers.failures


def test_while_it_drains_it_is_alive_not_ready_and_closes_connections_after_answering(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDCTR_DRAIN_S", "30")
    with process(place, workers=1) as (server, url), httpx.Client(base_url=url) as client:
        eventually(lambda: is_ready(url))
        assert "connection" not in client.post("/v1/score", json=body()).headers
        server.send_signal(signal.SIGTERM)
        eventually(lambda: client.get("/readyz").status_code == 503)
        assert "about to end" in client.get("/readyz").json()["detail"]
        assert client.get("/livez").status_code == 200
        answer = client.post("/v1/score", json=body())
        assert (answer.status_code, answer.headers["connection"]) == (200, "close")
        # Whoever can't wait says so a second time.
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=10) == 0


def test_workers_that_take_long_to_start_are_waited_for(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a small share of a processor."""
    late = "import sys, time\nif '--multiprocessing-fork' in sys.orig_argv: time.sleep(7)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with process(place, workers=2) as (server, url):
        eventually(lambda: len(workers(server.pid)) == 2)
        first = workers(server.pid)
        eventually(lambda: is_ready(url))
        assert workers(server.pid) == first


def test_a_worker_that_is_killed_fails_only_what_it_had_begun_and_is_replaced(
    place: Place,
) -> None:
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url) and total(url, "ecdctr_swaps_total") == 2)
        with Callers(port_of(url)) as callers:
            eventually(lambda: callers.num_ok > 100)
            before = workers(server.pid)
            os.kill(min(before), signal.SIGKILL)
            eventually(lambda: len(workers(server.pid) - before) == 1)
            eventually(lambda: total(url, "ecdctr_swaps_total") == 3)
            assert len(callers.failures) <= NUM_CALLERS
            answered, failed = callers.num_ok, len(callers.failures)
            eventually(lambda: callers.num_ok > answered + 100)
        assert len(callers.failures) == failed
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0


def test_all_workers_have_a_promoted_bundle_within_two_seconds(place: Place) -> None:
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url) and total(url, "ecdctr_swaps_total") == 2)
        with Callers(port_of(url)) as callers:
            eventually(lambda: callers.num_ok > 100)
            promoted = add_live_bundle(place, bias=0.5)
            promoted_s = run_s()
            time.sleep(2)
            answered = callers.num_ok
            eventually(lambda: callers.num_ok > answered + 200)
            assert total(url, "ecdctr_swaps_total") == 4
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
        assert callers.failures == []
        assert {model for sent_s, model in callers.models if sent_s > promoted_s + 2} == {promoted}
