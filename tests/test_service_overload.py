"""More requests than can be answered: what is answered is in time, the rest is told at once."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
import uvicorn
from bundles import add_live_bundle, body, eventually, make_place, serving, settings_of
from fastapi import FastAPI
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from test_service_app import is_ready, process, samples

from loadtest import loop
from loadtest.bodies import Request as WireRequest
from loadtest.bodies import encode, resized
from loadtest.client import Target
from loadtest.schedule import arrivals_of
from loadtest.traffic import Traffic
from service import errors
from service.admission import NOW, USUALLY, Admission, Cost, TurnAway
from service.metrics import Metrics
from service.settings import Settings, SettingsError

IN_TIME_S = 0.1


class Slow:
    """An application whose requests hold up the event loop for `block_s`, once it is their turn."""

    def __init__(self, max_wait_s: float, metrics: Metrics) -> None:
        self.begun: list[str] = []
        self._admission = Admission(max_wait_s, metrics)
        self.app = FastAPI()
        self.app.post("/v1/score")(self.score)
        self.app.get("/livez")(lambda: "alive")
        errors.install(self.app)
        self.app.add_middleware(errors.AnswerFaults)
        self.app.add_middleware(TurnAway, admission=self._admission, metrics=metrics)

    async def score(self, request: Request) -> str:
        content = await request.body()
        async with self._admission.turn(request, content):
            asked = json.loads(content)
            self.begun.append(asked.get("name", ""))
            time.sleep(asked.get("block_s", 0))
            assert not asked.get("fail"), "planted"
            return "done"


class Answer(NamedTuple):
    status: int
    headers: Mapping[str, str]
    content: bytes


class Served(NamedTuple):
    app: Slow
    port: int
    metrics: CollectorRegistry

    def ask(self, **asked: object) -> Answer:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=20)
        with closing(connection):
            connection.request("POST", "/v1/score", json.dumps(asked))
            response = connection.getresponse()
            return Answer(response.status, dict(response.getheaders()), response.read())

    def shed(self, reason: str) -> float:
        return self.metrics.get_sample_value("ecdctr_shed_total", {"reason": reason}) or 0.0


@contextmanager
def admitting(max_wait_s: float) -> Iterator[Served]:
    """`Slow` on a real socket."""
    registry = CollectorRegistry()
    app = Slow(max_wait_s, Metrics(registry))
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(app.app, lifespan="off", log_config=None, http="httptools")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        eventually(lambda: server.started)
        yield Served(app, listener.getsockname()[1], registry)
    finally:
        server.should_exit = True
        thread.join()


def in_parallel(num: int, ask: Callable[[int], Answer]) -> list[Answer]:
    with ThreadPoolExecutor(num) as pool:
        return list(pool.map(ask, range(num)))


def test_what_would_wait_too_long_is_answered_503_with_retry_after() -> None:
    with admitting(max_wait_s=0.05) as served:
        for _ in range(30):
            served.ask(block_s=0.01)
        answers = in_parallel(40, lambda _: served.ask(block_s=0.01))
        shed = [answer for answer in answers if answer.status == 503]
        assert served.shed("wait") == len(shed) > 5
        assert sum(answer.status == 200 for answer in answers) == 40 - len(shed) >= 5
        assert shed[0].headers["retry-after"] == "1"
        assert shed[0].headers["content-type"] == "application/problem+json"
        assert json.loads(shed[0].content)["type"] == "urn:ecdctr:problem:overloaded"
        assert served.ask().status == 200


@pytest.mark.parametrize(("seconds", "is_flood"), [(0.0, False), (4.0, True)])
def test_what_gathers_in_a_pause_is_answered_and_what_stays_in_a_flood_is_not(
    seconds: float, is_flood: bool
) -> None:
    with admitting(max_wait_s=0.05) as served, ThreadPoolExecutor(1) as pool:
        for _ in range(30):
            served.ask(block_s=0.01)
        pause = pool.submit(served.ask, name="pause", block_s=0.3)
        eventually(lambda: "pause" in served.app.begun)
        end_s = time.monotonic() + seconds

        def ask_until_the_end(_: int) -> Answer:
            answer = served.ask(block_s=0.01)
            while answer.status == 200 and time.monotonic() < end_s:
                answer = served.ask(block_s=0.01)
            return answer

        # Work of .1 s: more than the longest wait, less than three times of it.
        statuses = {answer.status for answer in in_parallel(10, ask_until_the_end)}
        assert pause.result().status == 200
        assert (503 in statuses) == (served.shed("wait") > 0) == is_flood


def test_what_would_miss_its_deadline_in_the_queue_is_answered_503_and_others_wait() -> None:
    with admitting(max_wait_s=60) as served:
        for _ in range(30):
            served.ask(block_s=0.02)
        deadlines = [10_000.0 if number % 2 else 50.0 for number in range(20)]
        answers = in_parallel(
            20, lambda number: served.ask(block_s=0.02, deadline_ms=deadlines[number])
        )
        shed = {deadlines[n] for n, answer in enumerate(answers) if answer.status == 503}
        assert shed == {50.0}
        assert served.shed("deadline") > 0
        assert served.shed("wait") == 0


def test_work_whose_deadline_passed_while_it_waited_is_not_begun() -> None:
    with admitting(max_wait_s=60) as served, ThreadPoolExecutor(2) as pool:
        first = pool.submit(served.ask, name="first", block_s=0.5)
        eventually(lambda: served.app.begun == ["first"])
        # Both are read when the first one ends, and nothing is known yet of how long they take.
        second = pool.submit(served.ask, name="second", block_s=0.5)
        time.sleep(0.1)
        late = served.ask(name="late", deadline_ms=300)
        assert late.status == 504
        assert json.loads(late.content)["type"] == "urn:ecdctr:problem:deadline-exceeded"
        assert (first.result().status, second.result().status) == (200, 200)
        assert served.app.begun == ["first", "second"]
        assert served.shed("expired") == 1


def test_nothing_is_computed_for_a_caller_that_has_gone_away() -> None:
    with admitting(max_wait_s=60) as served, ThreadPoolExecutor(1) as pool:
        running = pool.submit(served.ask, name="running", block_s=0.1)
        for number in range(5):
            content = json.dumps({"name": f"gone-{number}"}).encode()
            head = f"POST /v1/score HTTP/1.1\r\nhost: x\r\ncontent-length: {len(content)}\r\n\r\n"
            with socket.create_connection(("127.0.0.1", served.port)) as connection:
                connection.sendall(head.encode() + content)
        assert running.result().status == 200
        assert served.ask(name="last").status == 200
        gone = [name for name in served.app.begun if name.startswith("gone")]
        # The first may have been begun before its end was seen.
        assert len(gone) <= 1
        assert served.shed("gone") >= 4


def test_a_request_that_fails_gives_its_turn_back() -> None:
    with admitting(max_wait_s=60) as served:
        for _ in range(20):
            assert served.ask(fail=True).status == 500
        assert served.ask().status == 200


def test_probes_are_answered_while_requests_are_turned_away() -> None:
    with admitting(max_wait_s=0.02) as served, ThreadPoolExecutor(30) as pool:
        flood = [pool.submit(served.ask, block_s=0.02) for _ in range(60)]
        probe = httpx.get(f"http://127.0.0.1:{served.port}/livez", timeout=20)
        assert probe.status_code == 200
        assert {answer.result().status for answer in flood} == {200, 503}


@pytest.mark.parametrize("slope", [0.0, 2e-6])
def test_the_cost_of_a_request_is_learnt_from_those_before(slope: float) -> None:
    cost, random = Cost(), np.random.default_rng(0)
    for size in random.integers(100, 20_000, 400).tolist():
        cost.learn(size, 0.002 + slope * size)
    for size in (100, 5_000, 20_000):
        assert cost.of(size) == pytest.approx(0.002 + slope * size, rel=0.05)


def test_a_pause_of_the_whole_process_hardly_changes_what_a_request_is_taken_to_cost() -> None:
    cost = Cost()
    for _ in range(300):
        cost.learn(5_000, 0.002)
    cost.learn(5_000, 2.0)
    assert cost.of(5_000) < 0.0022


def test_a_slow_second_changes_the_expected_wait_but_not_what_a_request_usually_costs() -> None:
    now, usually = Cost(NOW), Cost(USUALLY)
    for cost in (now, usually):
        for _ in range(3000):
            cost.learn(5_000, 0.002)
        for _ in range(100):
            cost.learn(5_000, 0.004)
    assert now.of(5_000) > 0.0035
    assert usually.of(5_000) < 0.0022
    for _ in range(6000):  # a machine that stays slow is usual in the end
        usually.learn(5_000, 0.004)
    assert usually.of(5_000) > 0.0035


def test_the_wait_is_in_the_stage_times_and_counts_for_the_deadline(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    with serving(settings_of(place)) as client:
        answer = client.post("/v1/score", json=body())
        assert "queue;dur=" in answer.headers["server-timing"]
        assert client.post("/v1/score", json=body(deadline_ms=0.001)).status_code == 504
        client.get("/livez")
        assert samples(client)["ecdctr_stage_seconds_count{stage=queue}"] == 1


class Flood(NamedTuple):
    """What came of requests at one rate: in time, and all, by the time they were due."""

    due_s: np.ndarray[Any, np.dtype[np.float64]]
    good: np.ndarray[Any, np.dtype[np.bool_]]
    outcomes: list[str]
    seconds: float

    @property
    def goodput(self) -> float:
        return float(self.good.sum() / self.seconds)

    def share_good(self, from_s: float) -> float:
        return float(self.good[self.due_s >= from_s].mean())


async def capacity(target: Target, requests: Sequence[WireRequest], seconds: float) -> float:
    """Requests a second that eight callers get, each of whom waits for its answer."""
    traffic = Traffic(target, requests, seed=0)
    await traffic.closed_loop(8, seconds, asyncio.Event())
    return traffic.samples.num_ok / seconds


async def flood(
    target: Target, requests: Sequence[WireRequest], rate: float, seconds: float
) -> Flood:
    """Requests that come at `rate` whatever happens."""
    traffic = Traffic(target, requests, seed=0)
    await traffic.open_loop(arrivals_of("poisson", rate, seconds, 1), asyncio.Event())
    found = traffic.samples
    due, done = np.array(found.intended_s), np.array(found.done_s)
    outcomes = [answer.outcome for answer in found.answers]
    good = (np.array(outcomes) == "ok") & (done - due <= IN_TIME_S)
    return Flood(due - traffic.started_s, good, outcomes, seconds)


def requests_of(num_candidates: int) -> list[WireRequest]:
    return encode([resized(body(num=20), num_candidates)], "127.0.0.1", "/v1/score")


def test_at_twice_the_capacity_most_of_it_is_answered_in_time_and_afterwards_all_is(
    tmp_path: Path,
) -> None:
    place = make_place(tmp_path)
    add_live_bundle(place)
    with process(place, workers=1) as (_, url):
        eventually(lambda: is_ready(url))
        target = Target("127.0.0.1", int(url.rpartition(":")[2]), timeout_s=2.0)
        requests = requests_of(1000)

        async def run() -> tuple[float, Flood, Flood]:
            await capacity(target, requests, 1.0)
            most = await capacity(target, requests, 1.5)
            return (
                most,
                await flood(target, requests, 2 * most, 3.0),
                await flood(target, requests, 0.4 * most, 3.0),
            )

        most, during, after = loop.run(run())
    assert set(during.outcomes) == {"ok", "http_503"}
    # Without admission, a seventh of it.
    assert during.goodput >= 0.5 * most
    assert after.share_good(from_s=2.0) >= 0.9


def test_the_limits_are_settings(tmp_path: Path) -> None:
    environ = {"ECDCTR_REGISTRY": str(tmp_path), "ECDCTR_STORE": "store"}
    limits = {"ECDCTR_MAX_WAIT_MS": "20", "ECDCTR_DRAIN_S": "0", "ECDCTR_CONTROL_PORT": "9000"}
    settings = Settings.from_env({**environ, **limits, "ECDCTR_CONTROL_TOKEN": "s3cret"})
    assert (settings.max_wait_ms, settings.drain_s) == (20, 0)
    assert (settings.control_token, settings.control_port) == ("s3cret", 9000)
    assert "s3cret" not in repr(settings)
    with pytest.raises(SettingsError, match="ECDCTR_MAX_WAIT_MS"):
        Settings.from_env({**environ, "ECDCTR_MAX_WAIT_MS": "-1"})
