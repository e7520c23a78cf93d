"""Five hundred swaps under load, which nobody notices."""

from __future__ import annotations

import signal
import threading
from functools import partial
from pathlib import Path

import httpx
import pytest
from bundles import ITEMS, add_bundle, body, eventually, make_place
from test_monitoring import total
from test_service_app import is_ready, process

from benchmarks.processes import Sampler, workers
from loadtest import loop
from loadtest.address import SCORE_PATH
from loadtest.bodies import encode
from loadtest.client import Target
from loadtest.disturbance import Swap
from loadtest.run import Phase, Runner

NUM_SWAPS = 500
EVERY_S = 0.8
RATE = 100.0


class Observer:
    """Asks all the while, and keeps what each model answered."""

    def __init__(self, url: str) -> None:
        self.answers: set[tuple[str, tuple[float, ...]]] = set()
        self._url, self._over = url, threading.Event()
        self._thread = threading.Thread(target=self._ask)

    def __enter__(self) -> Observer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _ask(self) -> None:
        with httpx.Client(base_url=self._url, timeout=20) as client:
            while not self._over.wait(0.01):
                answer = client.post("/v1/score", json=body(num=len(ITEMS))).json()
                self.answers.add((answer["model"], tuple(answer["scores"])))


@pytest.mark.timeout(1200)
def test_five_hundred_swaps_fail_no_request_mix_no_scores_and_leave_no_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ECDCTR_POLL_S", "0.2")
    place = make_place(tmp_path)
    ids = [add_bundle(place, bias=bias) for bias in (0.0, 0.5)]
    place.registry.promote(ids[0])
    swap = Swap([partial(place.registry.promote, ids[n]) for n in (1, 0)], EVERY_S)
    # A few more: who is promoted and replaced while another one is loaded is never live.
    seconds = (NUM_SWAPS + 20) * EVERY_S
    with process(place, workers=2) as (server, url):
        eventually(lambda: is_ready(url) and total(url, "ecdctr_swaps_total") == 2)
        requests = encode([body(num=len(ITEMS))], "127.0.0.1", SCORE_PATH)
        runner = Runner(Target("127.0.0.1", int(url.rpartition(":")[2])), requests)
        first, second = (Sampler(pid) for pid in workers(server.pid))
        with Observer(url) as observer, first, second:
            phases = [Phase("steady", 20.0, RATE), Phase("swaps", seconds, RATE, disturbance=swap)]
            loop.run(runner.run(phases))
            eventually(lambda: total(url, "ecdctr_swaps_total") >= 2 * NUM_SWAPS)
        server.send_signal(signal.SIGTERM)
        assert server.wait(timeout=20) == 0
    steady, swaps = runner.reports
    assert (steady.num_failed, swaps.num_failed) == (0, 0)
    assert len([event for event in swaps.events if event.ok]) >= NUM_SWAPS
    assert len(observer.answers) == 2
    assert steady.latency_ms.p99
    assert swaps.latency_ms.p99
    print(f"p99 {steady.latency_ms.p99:.1f} ms steady, {swaps.latency_ms.p99:.1f} ms over swaps")
    settled_s = 20.0 + 10 * EVERY_S
    for sampler in (first, second):
        growth = sampler.most(settled_s, float("inf")) / sampler.most(0, settled_s) - 1
        print(f"grown by {growth:.1%}")
        assert growth <= 0.1
