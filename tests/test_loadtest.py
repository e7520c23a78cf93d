"""The load generator: what it measures, what it counts, what it leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, cast

import bundles
import httptools
import numpy as np
import orjson
import pytest
from commands import ROOT
from proxies import stop_accepting
from scipy import stats
from servers import free_port

from benchmarks.soak import maximum
from bundle.golden import body_of
from loadtest import loop
from loadtest.address import resolve
from loadtest.bodies import bodies_of_bundle, encode, read_bodies, resized
from loadtest.client import Target
from loadtest.command import add_parser
from loadtest.disturbance import Freeze, Swap, frozen
from loadtest.null import answer, null_server
from loadtest.overhead import measure_overhead
from loadtest.picture import draw
from loadtest.queue import ideal_latencies, mean_wait_s
from loadtest.report import Limits, PhaseReport, Report, percentile_ms
from loadtest.run import Phase, Runner
from loadtest.schedule import arrivals_of, choices
from loadtest.search import SearchReport, Step, Stopped, highest_rate, step_seconds

NUM = 5
BODY = {"user": {"id": 1}, "context": {}, "candidates": {"id": list(range(NUM))}}
DEADLINE_S = 20.0

Behave = Callable[[int], bytes | None]
"""The answer to the nth request, from 0: b"" breaks the connection off, None never comes."""


def constantly(content: bytes) -> Behave:
    return lambda n: content


def http(status: str, content: bytes, more: str = "") -> bytes:
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(content)}\r\n{more}\r\n".encode() + content


def scores(**changes: Any) -> bytes:
    document = {"model": "one", "scores": [0.5] * NUM, "degraded": [], "missing": {}}
    return http("200 OK", orjson.dumps(document | changes))


class Scripted(asyncio.Protocol):
    """A connection to `scripted`."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._content = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._server.connections.append(self._transport)

    def connection_lost(self, error: Exception | None) -> None:
        self._server.num_lost += 1

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, data: bytes) -> None:
        self._content += data

    def on_message_complete(self) -> None:
        content = self._server.behave(len(self._server.bodies))
        self._server.bodies.append(self._content)
        self._content = b""
        if content:
            delay_s = self._server.delay_s
            asyncio.get_running_loop().call_later(delay_s, self._transport.write, content)
        elif content == b"":
            self._transport.abort()


class Server:
    def __init__(self, behave: Behave, delay_s: float) -> None:
        self.behave, self.delay_s, self.port = behave, delay_s, 0
        self.connections: list[asyncio.Transport] = []
        self.num_lost = 0
        self.bodies: list[bytes] = []
        self.started, self.ended = threading.Event(), asyncio.Event()

    async def serve(self) -> None:
        self.loop = asyncio.get_running_loop()
        server = await self.loop.create_server(lambda: Scripted(self), "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self.started.set()
        await self.ended.wait()
        stop_accepting(server)
        while accepting := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(accepting)
        server.close()
        await self._end_connections()

    async def _end_connections(self) -> None:
        """However long it takes: what the loop leaves open warns in a later test."""
        for connection in self.connections:
            connection.abort()
        while self.num_lost < len(self.connections):
            await asyncio.sleep(0)


@contextmanager
def scripted(behave: Behave, delay_s: float = 0.0) -> Iterator[Server]:
    """A server on a thread that does what it is told, request by request."""
    server = Server(behave, delay_s)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    assert server.started.wait(DEADLINE_S)
    try:
        yield server
    finally:
        server.loop.call_soon_threadsafe(server.ended.set)
        thread.join(DEADLINE_S)


def report_of(port: int, *phases: Phase, seed: int = 0, **target: Any) -> list[PhaseReport]:
    async def run() -> list[PhaseReport]:
        wire = encode([BODY], "test", "/v1/score")
        target.setdefault("connections", 4)
        runner = Runner(Target("127.0.0.1", port, **target), wire, seed)
        await runner.run(phases)
        return runner.reports

    return loop.run(run())


def steady(seconds: float = 1.0, rate: float = 50.0, **changes: Any) -> Phase:
    return Phase("steady", seconds, rate, arrivals="constant", **changes)


@pytest.fixture(scope="module")
def null_port() -> Iterator[int]:
    with null_server(NUM) as (port, _):
        yield port


class TestIdealQueue:
    def test_it_is_what_a_server_that_takes_one_after_the_other_would_give(self) -> None:
        generator = np.random.default_rng(0)
        arrivals = np.sort(generator.uniform(0, 10, 500))
        service = generator.exponential(0.02, 500)
        free_s, expected = 0.0, []
        for arrival, takes in zip(arrivals, service, strict=True):
            free_s = max(free_s, arrival) + takes
            expected.append(free_s - arrival)
        np.testing.assert_allclose(ideal_latencies(arrivals, service), expected, atol=1e-9)

    @pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
    def test_its_mean_wait_is_that_of_pollaczek_and_khinchine(self, load: float) -> None:
        service_s = 0.01
        arrivals = arrivals_of("poisson", load / service_s, 10_000, seed=3)
        waits = ideal_latencies(arrivals, service_s) - service_s
        assert waits.mean() == pytest.approx(mean_wait_s(load / service_s, service_s), rel=0.05)

    def test_service_times_that_vary_double_the_mean_wait_where_they_are_exponential(self) -> None:
        arrivals = arrivals_of("poisson", 60, 10_000, seed=4)
        service = np.random.default_rng(5).exponential(0.01, len(arrivals))
        waits = ideal_latencies(arrivals, service) - service
        expected = mean_wait_s(60, 0.01, 0.01**2)
        assert expected == pytest.approx(2 * mean_wait_s(60, 0.01))
        assert waits.mean() == pytest.approx(expected, rel=0.05)

    def test_what_is_no_queue_is_refused(self) -> None:
        with pytest.raises(ValueError, match="arrivals_s descends"):
            ideal_latencies(np.array([1.0, 0.5]), 0.1)
        with pytest.raises(ValueError, match=r"service_s has -0\.1"):
            ideal_latencies(np.array([0.5, 1.0]), -0.1)
        with pytest.raises(ValueError, match="must be below 1"):
            mean_wait_s(100, 0.01)


class TestSchedule:
    def test_poisson_arrivals_have_the_right_mean_and_exponential_gaps(self) -> None:
        arrivals = arrivals_of("poisson", 200, 100, seed=0)
        assert len(arrivals) == pytest.approx(20_000, abs=3 * np.sqrt(20_000))
        assert stats.kstest(np.diff(arrivals) * 200, "expon").pvalue > 0.01

    def test_arrivals_that_are_not_poisson_are_told_apart(self) -> None:
        jittered = np.arange(20_000) / 200 + np.random.default_rng(0).uniform(0, 0.005, 20_000)
        assert stats.kstest(np.diff(jittered) * 200, "expon").pvalue < 1e-6

    def test_a_constant_rate_has_equal_gaps(self) -> None:
        arrivals = arrivals_of("constant", 40, 2.5, seed=0)
        np.testing.assert_allclose(arrivals, np.arange(100) * 0.025)

    def test_the_seed_alone_decides_when_what_is_sent(self) -> None:
        first, again, other = (arrivals_of("poisson", 50, 10, seed) for seed in (1, 1, 2))
        np.testing.assert_array_equal(first, again)
        assert len(first) != len(other) or (first != other).any()
        np.testing.assert_array_equal(choices(100, 7, 1), choices(100, 7, 1))
        assert (choices(100, 7, 1) != choices(100, 7, 2)).any()

    @pytest.mark.parametrize(
        ("kind", "rate", "seconds", "said"),
        [
            ("poisson", 0, 10, "rate 0 a second"),
            ("poisson", float("nan"), 10, "rate nan"),
            ("constant", 10, -1, "for -1 s"),
            ("constant", 1e6, 1e3, "at most 2,000,000 requests"),
            ("bursty", 10, 10, "'bursty'; there are: poisson, constant"),
        ],
    )
    def test_what_can_not_be_is_refused(
        self, kind: str, rate: float, seconds: float, said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            arrivals_of(kind, rate, seconds, seed=0)


class TestBodies:
    def test_a_file_has_one_body_or_one_a_line(self, tmp_path: Path) -> None:
        one, lines = tmp_path / "one.json", tmp_path / "lines.jsonl"
        one.write_text(json.dumps(BODY, indent=2))
        lines.write_text(f"{json.dumps(BODY)}\n\n{json.dumps(resized(BODY, 2))}\n")
        assert read_bodies(one) == [BODY]
        assert [len(body["candidates"]["id"]) for body in read_bodies(lines)] == [NUM, 2]

    @pytest.mark.parametrize(
        ("text", "said"),
        [
            ("", "is empty"),
            ("[1, 2]", "no list candidates.id"),
            ('{"candidates": {}}', "no list candidates.id"),
            (f"{json.dumps(BODY)}\n{{oops\n", "bodies:2 is not JSON"),
        ],
    )
    def test_what_is_no_body_is_refused_by_its_line(
        self, tmp_path: Path, text: str, said: str
    ) -> None:
        (tmp_path / "bodies").write_text(text)
        with pytest.raises(ValueError, match=said):
            read_bodies(tmp_path / "bodies")

    def test_candidates_are_cut_or_repeated_with_their_columns(self) -> None:
        candidates = {"id": [1, 2, 3], "features": {"price": [0.1, None, 0.3]}}
        body = {**BODY, "candidates": candidates}
        assert resized(body, 2)["candidates"] == {"id": [1, 2], "features": {"price": [0.1, None]}}
        longer = resized(body, 5)["candidates"]
        assert longer == {"id": [1, 2, 3, 1, 2], "features": {"price": [0.1, None, 0.3, 0.1, None]}}
        assert body["candidates"] is candidates
        with pytest.raises(ValueError, match="at least one"):
            resized({**BODY, "candidates": {"id": []}}, 2)

    def test_the_golden_requests_of_a_bundle_can_be_sent(self, tmp_path: Path) -> None:
        place = bundles.make_place(tmp_path)
        folder = place.registry.path(bundles.add_live_bundle(place))
        expected = [body_of(golden.request) for golden in bundles.open_artifact(folder).golden]
        assert bodies_of_bundle(folder) == expected
        assert expected


class TestTruth:
    """A latency counts from when a request was due, so what a pause delays is seen."""

    def test_a_pause_is_in_the_latency_of_every_request_that_was_due_in_it(self) -> None:
        rate, pause_s = 100.0, 1.0
        with null_server(NUM) as (port, process):
            freeze = Freeze(process.pid, 1.0, pause_s)
            (report,) = report_of(port, steady(3.0, rate, disturbance=freeze))
            (closed,) = report_of(port, Phase("closed", 2.5, clients=1, disturbance=freeze))
        assert report.ok == report.due == 300
        assert report.latency_ms.p99 is not None
        assert report.latency_ms.max is not None
        assert 900 * pause_s < report.latency_ms.p99 <= report.latency_ms.max < 3000 * pause_s
        # Due in the second that the pause fills, all of them late, the first by the most.
        hit = report.timeline[1]
        assert hit.ok == rate
        assert hit.p50_ms is not None
        assert 350 * pause_s < hit.p50_ms < 1500 * pause_s
        # A closed loop asks nothing while it waits: it sees one slow answer among thousands.
        assert closed.latency_ms.p99 is not None
        assert closed.latency_ms.max is not None
        assert closed.latency_ms.p99 < 300 * pause_s < 900 * pause_s < closed.latency_ms.max

    def test_as_many_requests_are_late_as_were_due_in_the_pause(self) -> None:
        latencies = _latencies_over_a_pause(rate=100.0, pause_s=1.0)
        assert (latencies > 0.1).sum() == pytest.approx(90, abs=20)

    def test_a_generator_that_stands_still_does_not_hide_it(self, null_port: int) -> None:
        pause_s = 0.6

        class Stall:
            async def run(self, note: object, over: asyncio.Event) -> None:
                await asyncio.sleep(0.3)
                time.sleep(pause_s)

        async def run() -> PhaseReport:
            runner = Runner(Target("127.0.0.1", null_port), encode([BODY], "test", "/v1/score"))
            return await runner.run_phase(steady(1.5, 100, disturbance=Stall()))

        report = loop.run(run())
        assert report.ok == report.due == 150
        assert report.latency_ms.max is not None
        assert report.latency_ms.max > 900 * pause_s
        assert report.lag_ms.p90 is not None
        assert report.lag_ms.p90 > 300 * pause_s

    def test_a_queue_before_the_server_is_in_the_latency(self) -> None:
        rate, service_s = 30.0, 0.05
        with scripted(constantly(scores()), delay_s=service_s) as server:
            (report,) = report_of(server.port, steady(1.0, rate), max_in_flight=1)
        ideal = ideal_latencies(arrivals_of("constant", rate, 1.0, 0), service_s)
        assert report.late > 20
        assert (report.ok, report.not_sent) == (30, 0)
        assert report.latency_ms.p50 is not None
        assert report.latency_ms.p50 > 900 * np.median(ideal)


def _latencies_over_a_pause(rate: float, pause_s: float) -> np.ndarray[Any, Any]:
    """float64 [n] seconds, of a run of 3 s in which the server stands still after the first."""
    from loadtest.traffic import Traffic

    async def run(port: int, pid: int) -> Traffic:
        wire = encode([BODY], "test", "/v1/score")
        traffic, over = Traffic(Target("127.0.0.1", port), wire, 0), asyncio.Event()
        freeze = Freeze(pid, 1.0, pause_s).run(lambda text, ok: None, over)
        freezing = asyncio.create_task(freeze)
        await traffic.open_loop(arrivals_of("constant", rate, 3.0, 0), asyncio.Event())
        await freezing
        return traffic

    with null_server(NUM) as (port, process):
        samples = loop.run(run(port, process.pid)).samples
    return np.array(samples.done_s) - np.array(samples.intended_s)


class TestCounts:
    ENDS: ClassVar = {
        "ok": scores(),
        "http_500": http("500 Oops", b"{}"),
        "http_503": http("503 Busy", b"{}"),
        "reset": b"",
        "timeout": None,
        "malformed, no JSON": http("200 OK", b"<html>"),
        "malformed, a list": http("200 OK", b"[]"),
        "malformed, a score too few": scores(scores=[0.5] * (NUM - 1)),
        "malformed, no model": scores(model=None),
        "malformed, no HTTP": b"oops\r\n\r\n",
    }

    def test_failures_are_counted_by_kind_and_not_confused(self) -> None:
        ends, rounds = list(self.ENDS.values()), 6
        with scripted(lambda n: ends[n % len(ends)]) as server:
            phase = steady(1.0, len(ends) * rounds)
            (report,) = report_of(server.port, phase, timeout_s=2.5)
        expected = Counter(name.partition(",")[0] for name in self.ENDS)
        found = {"ok": report.ok, **report.failed}
        assert found == {name: n * rounds for name, n in expected.items()}
        assert report.sent == report.due == len(ends) * rounds

    def test_a_service_that_is_not_there_refuses_every_request(self) -> None:
        (report,) = report_of(free_port(), steady(0.5))
        assert report.failed == {"refused": 25}
        assert (report.due, report.sent, report.ok) == (25, 0, 0)

    def test_a_closed_loop_does_not_try_without_end_what_is_refused(self) -> None:
        (report,) = report_of(free_port(), Phase("closed", 0.5, clients=2))
        assert set(report.failed) == {"refused"}
        assert 2 <= report.due <= 22

    def test_what_finds_no_connection_in_time_is_counted_as_not_sent(self) -> None:
        with scripted(constantly(cast(bytes, None))) as server:
            phase = steady(0.25, 8000)
            (report,) = report_of(server.port, phase, max_in_flight=1, timeout_s=0.3)
        assert report.due == 2000 == sum(report.failed.values())
        assert set(report.failed) == {"timeout", "not_sent"}
        assert report.not_sent == report.failed["not_sent"] == report.due - report.sent > 20
        assert report.late == 1999
        assert 0 < len(server.bodies) <= report.sent

    def test_connections_are_kept_unless_the_server_says_otherwise(self) -> None:
        for more, closes in (("", False), ("connection: close\r\n", True)):
            content = scores().replace(b"\r\n\r\n", f"\r\n{more}\r\n".encode(), 1)
            with scripted(constantly(content)) as server:
                (report,) = report_of(server.port, steady(0.5), connections=1)
            assert (report.ok, report.failed) == (25, {})
            assert (len(server.connections) > 20) == closes

    def test_answers_in_chunks_are_read(self) -> None:
        content = scores().partition(b"\r\n\r\n")[2]
        head = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(content), content)
        with scripted(constantly(head + chunks)) as server:
            (report,) = report_of(server.port, steady(0.5))
        assert (report.ok, report.failed) == (25, {})

    def test_two_models_that_take_turns_are_in_the_timeline(self) -> None:
        with scripted(lambda n: scores(model="one" if n < 50 else "two")) as server:
            (report,) = report_of(server.port, steady(2.0), max_in_flight=1)
        assert [second.models for second in report.timeline] == [{"one": 50}, {"two": 50}]
        assert report.models == {"one": 50, "two": 50}

    def test_degraded_answers_are_counted_with_what_they_lacked(self) -> None:
        lacking = [{"what": "user_window", "reason": "timeout"}]
        with scripted(lambda n: scores(degraded=lacking if n % 5 == 0 else [])) as server:
            (report,) = report_of(server.port, steady(1.0))
        assert (report.ok, report.degraded) == (50, 10)
        assert report.degraded_by == {"user_window:timeout": 10}
        assert sum(second.degraded for second in report.timeline) == 10

    def test_a_closed_loop_has_no_more_under_way_than_clients(self) -> None:
        with scripted(constantly(scores()), delay_s=0.02) as server:
            (report,) = report_of(server.port, Phase("closed", 1.0, clients=3))
        assert (report.peak_in_flight, len(server.connections)) == (3, 3)
        assert 60 <= report.ok == report.due <= 160

    def test_a_run_sends_the_same_again_under_its_seed(self) -> None:
        wire = encode([resized(BODY, n) for n in range(1, NUM + 1)], "test", "/v1/score")

        def sent(seed: int) -> list[bytes]:
            async def run(port: int) -> None:
                target = Target("127.0.0.1", port, max_in_flight=1)
                await Runner(target, wire, seed).run([steady(0.5), steady(0.5)])

            with scripted(constantly(http("503 Busy", b""))) as server:
                loop.run(run(server.port))
            return server.bodies

        first = sent(1)
        assert first == sent(1)
        assert first != sent(2)
        assert first[:25] != first[25:]

    def test_what_was_due_is_ok_or_failed_or_unfinished_also_when_it_is_stopped(self) -> None:
        async def run(port: int) -> PhaseReport:
            target = Target("127.0.0.1", port, connections=4)
            runner = Runner(target, encode([BODY], "test", "/v1/score"))
            running = asyncio.create_task(runner.run([steady(30.0), steady(30.0)]))
            while len(server.bodies) < 20:
                await asyncio.sleep(0.01)
            runner.stop.set()
            await running
            sent = len(server.bodies)
            await asyncio.sleep(0.2)
            assert len(server.bodies) == sent
            (report,) = runner.reports
            return report

        with scripted(constantly(scores()), delay_s=0.2) as server:
            report = loop.run(run(server.port))
        assert not report.complete
        assert report.due == report.ok + report.unfinished
        assert report.unfinished > 0
        assert 0 < report.seconds < DEADLINE_S


class TestLoops:
    def test_phases_on_another_loop_are_an_error_and_not_a_phase_that_sends_nothing(self) -> None:
        with scripted(constantly(scores())) as server:
            wire = encode([BODY], "test", "/v1/score")
            runner = Runner(Target("127.0.0.1", server.port, connections=4), wire)
            loop.run(runner.run_phase(steady(0.2)))
            with pytest.raises(RuntimeError, match="different event loop"):
                loop.run(runner.run_phase(steady(0.2)))

    def test_the_capacity_is_that_of_the_best_number_of_clients(self) -> None:
        with scripted(constantly(scores()), delay_s=0.05) as server:
            wire = encode([BODY], "test", "/v1/score")
            # One client gets 20 answers a second, and eight get 160.
            assert 80 < maximum(server.port, wire, seconds=0.5) <= 161


class TestDisturbances:
    def test_a_process_goes_on_when_the_run_is_stopped(self) -> None:
        async def run(port: int, pid: int) -> list[str]:
            runner = Runner(Target("127.0.0.1", port), encode([BODY], "test", "/v1/score"))
            phase = steady(30.0, disturbance=Freeze(pid, 0.2, 20.0))
            running = asyncio.create_task(runner.run_phase(phase))
            while not running.done() and _state_of(pid) != "T":
                await asyncio.sleep(0.01)
            runner.stop.set()
            return [event.text for event in (await running).events]

        with null_server(NUM) as (port, process):
            pid = process.pid
            assert loop.run(run(port, pid)) == [f"process {pid} frozen", f"process {pid} thawed"]
            bundles.eventually(lambda: _state_of(pid) != "T")

    def test_a_process_goes_on_when_the_one_that_froze_it_is_killed(self) -> None:
        code = "import sys, time\nfrom loadtest.disturbance import frozen\n"
        code += "with frozen(int(sys.argv[1])):\n    print('frozen', flush=True); time.sleep(20)"
        with null_server(NUM) as (_, process):
            command = [sys.executable, "-c", code, str(process.pid)]
            with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as freezer:
                assert freezer.stdout is not None
                assert freezer.stdout.readline() == b"frozen\n"
                bundles.eventually(lambda: _state_of(process.pid) == "T")
                freezer.kill()
            bundles.eventually(lambda: _state_of(process.pid) != "T")

    def test_a_process_goes_on_when_something_fails_meanwhile(self) -> None:
        with null_server(NUM) as (_, process):
            with pytest.raises(FileNotFoundError), frozen(process.pid):
                Path("/does/not/exist").read_text()
            bundles.eventually(lambda: _state_of(process.pid) != "T")

    def test_a_process_that_is_gone_when_it_shall_be_frozen_is_told(self, null_port: int) -> None:
        with subprocess.Popen(["/bin/sleep", "20"]) as sleeping:
            freeze = Freeze(sleeping.pid, 0.1, 0.1)
            sleeping.kill()
        (report,) = report_of(null_port, steady(0.5, disturbance=freeze))
        (line,) = Limits().broken(report)
        assert line == f"steady: there is no process {sleeping.pid} to freeze"
        assert report.ok == 25

    @pytest.mark.parametrize("pid", [-1, 0, 1, pytest.param(os.getpid(), id="own"), 2**22 - 1])
    def test_only_another_process_can_be_frozen(self, pid: int) -> None:
        with pytest.raises(ValueError, match=r"freeze"):
            Freeze(pid, 0.0, 1.0)

    def test_a_freeze_must_end_within_its_phase(self) -> None:
        with null_server(NUM) as (_, process), pytest.raises(ValueError, match="within its 3 s"):
            steady(3.0, disturbance=Freeze(process.pid, 2.0, 2.0))

    def test_commands_take_turns_and_their_failures_are_told(
        self, null_port: int, tmp_path: Path
    ) -> None:
        lines = tmp_path / "lines"
        commands = [f"/bin/sh -c 'echo {name} >> {lines}'" for name in ("a", "b")]
        failing = "/bin/sh -c 'echo why; exit 4'"
        swap = Swap([*commands, failing, "/does/not/exist"], 0.2)
        (report,) = report_of(null_port, steady(2.0, disturbance=swap))
        assert lines.read_text().split()[:2] == ["a", "b"]
        assert [event.ok for event in report.events[:4]] == [True, True, False, False]
        assert report.events[2].text == f"{failing}: why"
        first, second, *_ = Limits().broken(report)
        assert "why" in first
        assert "/does/not/exist" in second

    def test_a_real_service_that_swaps_models_under_load_answers_all_the_time(
        self, tmp_path: Path
    ) -> None:
        place = bundles.make_place(tmp_path)
        first = bundles.add_live_bundle(place)
        second = bundles.add_bundle(place, bias=0.5)
        wire = encode([bundles.body(7)], "test", "/v1/score")
        to_second, to_first = (lambda b=b: bundles.point_at(place, b) for b in (second, first))

        async def run(port: int) -> PhaseReport:
            swap = Swap([to_second, to_first], 1.0)
            phase = Phase("swap", 3.5, 30.0, disturbance=swap)
            return await Runner(Target("127.0.0.1", port), wire).run_phase(phase)

        with bundles.serving(bundles.settings_of(place, poll_s=0.05)) as client:
            report = loop.run(run(client.base_url.port or 0))
        assert (report.failed, report.ok) == ({}, report.due)
        assert set(report.models) == {first, second}
        assert set(report.timeline[0].models) == {first}
        assert all(event.ok for event in report.events)


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


class TestReport:
    def test_a_percentile_is_the_least_that_so_many_did_not_exceed(self) -> None:
        seconds = np.arange(1, 101) / 1000
        assert percentile_ms(seconds, 50) == 50
        assert percentile_ms(seconds, 99) == 99
        assert percentile_ms(seconds, 99.9) == 100
        assert percentile_ms(np.array([]), 99) is None

    def test_a_limit_on_p99_counts_failures_as_infinitely_late(self) -> None:
        for failing, held in ((1, True), (2, False)):
            with scripted(lambda n, failing=failing: scores() if n >= failing else b"") as server:
                (report,) = report_of(server.port, steady(1.0, 100))
            assert report.latency_ms.p99 is not None
            assert (report.p99_all_ms is not None) == held
            broken = Limits(slo_p99_ms=10_000).broken(report)
            assert broken == [] if held else "more than 1 % failed" in broken[0]

    def test_limits_are_told_where_they_do_not_hold_and_only_in_phases_that_are_judged(
        self, null_port: int
    ) -> None:
        judged, other = report_of(null_port, steady(0.5), steady(0.5, judged=False))
        assert Limits(10_000, 0).broken(judged) == []
        assert len(Limits(1e-6).broken(judged)) == 1
        assert Limits(1e-6).broken(other) == []
        (refused,) = report_of(free_port(), steady(0.5))
        assert Limits(max_failures=25).broken(refused) == []
        (line,) = Limits(max_failures=24).broken(refused)
        assert line == "steady: 25 requests failed; at most 24"

    def test_it_is_written_whole_with_a_picture(self, null_port: int, tmp_path: Path) -> None:
        phases = report_of(null_port, steady(1.5), Phase("closed", 0.5, clients=2))
        report = Report("ecdctr loadtest", "http://test", 0, "test", [NUM], phases, Limits(50.0))
        report.write(tmp_path / "new" / "report.json")
        draw(report, tmp_path / "new" / "report.png")
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.png"]
        stored = json.loads((tmp_path / "new" / "report.json").read_text())
        assert [len(phase["timeline"]) for phase in stored["phases"]] == [2, 1]
        assert stored["phases"][0]["plan"]["name"] == "steady"
        assert (tmp_path / "new" / "report.png").read_bytes().startswith(b"\x89PNG")

    def test_a_report_that_can_not_be_written_leaves_the_old_one(
        self, null_port: int, tmp_path: Path
    ) -> None:
        path = tmp_path / "report.json"
        path.write_text("old")
        phases = report_of(null_port, steady(0.2))
        nan = [replace(phases[0], ok_per_s=float("nan"))]
        with pytest.raises(ValueError, match="not JSON compliant"):
            Report("", "", 0, "", [], nan, Limits()).write(path)
        assert path.read_text() == "old"


class TestSearch:
    SERVICE_S, SLO_MS = 0.005, 40.0

    async def ideal(self, rate: float) -> Step:
        """A step on an ideal queue."""
        latencies = ideal_latencies(arrivals_of("poisson", rate, 600, seed=9), self.SERVICE_S)
        p99_ms = percentile_ms(latencies, 99)
        assert p99_ms is not None
        return Step(rate, p99_ms, p99_ms <= self.SLO_MS)

    def found(self, first: float, most: float = 1e4, tolerance: float = 0.02) -> SearchReport:
        return asyncio.run(highest_rate(self.ideal, self.SLO_MS, first, most, tolerance))

    @pytest.mark.parametrize("first", [3.0, 100.0, 900.0])
    def test_the_rate_is_the_highest_that_holds_within_the_tolerance(self, first: float) -> None:
        report = self.found(first)
        assert report.p99_ms is not None
        assert report.p99_ms <= self.SLO_MS
        assert report.complete
        assert asyncio.run(self.ideal(report.rate * 1.03)).held is False
        assert 100 < report.rate < 200
        assert len(report.steps) < 20

    def test_a_step_has_enough_requests_unless_that_would_take_too_long(self) -> None:
        assert [step_seconds(rate, 2.0) for rate in (5000, 100, 1)] == [2.0, 10.0, 60.0]

    def test_no_more_is_tried_than_was_allowed(self) -> None:
        report = self.found(10.0, most=50.0)
        assert report.rate == 50.0
        assert max(step.rate for step in report.steps) == 50.0

    def test_where_nothing_holds_it_gives_up_and_says_so(self) -> None:
        async def never(rate: float) -> Step:
            return Step(rate, None, False)

        report = asyncio.run(highest_rate(never, 5.0, 8.0, 1e4, 0.05))
        assert (report.rate, report.p99_ms) == (0.0, None)
        assert [step.rate for step in report.steps] == [8.0, 4.0, 2.0, 1.0]
        (line,) = report.broken()
        assert line == "search: p99 above 5 ms at 1/s too"

    def test_what_was_found_before_a_stop_is_kept(self) -> None:
        async def stopped(rate: float) -> Step:
            if rate > 50:
                raise Stopped
            return await self.ideal(rate)

        report = asyncio.run(highest_rate(stopped, self.SLO_MS, 10.0, 1e4, 0.05))
        assert (report.rate, report.complete) == (40.0, False)

    def test_it_finds_what_a_real_server_of_known_speed_can_do(self) -> None:
        async def run(port: int) -> SearchReport:
            target = Target("127.0.0.1", port, max_in_flight=1, timeout_s=1.0)
            runner = Runner(target, encode([BODY], "test", "/v1/score"))
            return await runner.search(50.0, 500.0, 4000.0, 0.5, 0.1)

        with scripted(constantly(scores()), delay_s=0.0005) as server:
            report = loop.run(run(server.port))
        # One at a time, half a millisecond each, and what the loops add.
        assert 0 < report.rate < 2000
        assert report.p99_ms is not None
        assert report.p99_ms <= 50


def options_of(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_parser(parser.add_subparsers())
    return parser.parse_args(["loadtest", *map(str, arguments)])


class TestCommand:
    @pytest.fixture
    def requests(self, tmp_path: Path) -> Path:
        path = tmp_path / "bodies.jsonl"
        path.write_text(json.dumps(BODY))
        return path

    @pytest.fixture
    def common(self, null_port: int, requests: Path) -> list[object]:
        url = f"http://127.0.0.1:{null_port}"
        return ["--url", url, "--requests", requests, "--seconds", 0.5, "--rate", 100]

    def code(self, *arguments: object) -> int:
        options = options_of(*arguments)
        try:
            options.run(options)
        except SystemExit as stop:
            return int(str(stop.code))
        return 0

    def test_the_exit_code_says_whether_the_limits_were_held(
        self, common: Sequence[object], requests: Path
    ) -> None:
        assert self.code(*common) == 0
        assert self.code(*common, "--slo-p99-ms", 10_000, "--max-failures", 0) == 0
        assert self.code(*common, "--slo-p99-ms", 0.001) == 3
        with scripted(lambda n: scores() if n % 2 else http("503 Busy", b"")) as server:
            half = ["--url", f"http://127.0.0.1:{server.port}", *common[2:]]
            assert self.code(*half) == 0
            assert self.code(*half, "--max-failures", 10) == 3
            assert self.code(*half, "--phase", "overload:0.5", "--max-failures", 10) == 0

    def test_a_search_exits_with_3_where_no_rate_holds(self, common: Sequence[object]) -> None:
        search = ["--search", "--step-s", 0.1, "--max-rate", 2000, "--tolerance", 0.5]
        start = [*common[:-1], 1000]
        assert self.code(*start, *search, "--slo-p99-ms", 10_000) == 0

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--url", "http://192.0.2.1:80"], "--allow-remote"),
            (["--url", "https://127.0.0.1"], "must be like http://"),
            (["--rate", 0], "rate 0"),
            (["--rate", 10, "--clients", 2], "give one"),
            (["--max-in-flight", 0], "--max-in-flight 0 must be above 0"),
            (["--candidates", -3], "--candidates -3 must be above 0"),
            (["--phase", "swap:1"], "at least one --swap-command"),
            (["--phase", "frozen:5"], "takes --freeze-pid"),
            (["--seconds", 20, "--max-s", 10], "longer than --max-s 10"),
            (["--search"], "--slo-p99-ms None"),
            (["--requests", "/does/not/exist"], "No such file"),
        ],
    )
    def test_what_a_user_can_mend_is_said_in_a_line(
        self, requests: Path, arguments: list[object], said: str
    ) -> None:
        with pytest.raises((ValueError, OSError), match=said):
            self.code("--requests", requests, *arguments)

    def test_nobody_there_is_an_error_and_no_result(self, common: list[object]) -> None:
        gone = ["--url", f"http://127.0.0.1:{free_port()}", *common[2:]]
        with pytest.raises(ValueError, match=r"no request .* was answered .*refused"):
            self.code(*gone)

    def test_a_wrong_phase_is_told_by_the_parser(self, capsys: pytest.CaptureFixture[str]) -> None:
        for wrong in ("steady", "steady:x", "rush:10"):
            with pytest.raises(SystemExit):
                options_of("--phase", wrong)
            assert "is not like steady:30" in capsys.readouterr().err

    def test_a_plan_of_phases_is_reported_phase_by_phase(
        self, common: list[object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with null_server(NUM) as (port, process):
            plan = ["--url", f"http://127.0.0.1:{port}", *common[2:], "--out", tmp_path / "r.json"]
            plan += ["--picture", tmp_path / "r.svg", "--arrivals", "constant"]
            plan += ["--swap-command", "true", "--swap-command", "/bin/true"]
            plan += ["--swap-every-s", 0.3, "--freeze-pid", process.pid]
            plan += ["--freeze-after-s", 0.2, "--freeze-s", 0.5]
            for phase in ("warmup:0.3", "steady:0.5", "swap:1", "frozen:1", "overload:0.5"):
                plan += ["--phase", phase]
            assert self.code(*plan, "--phase", "steady:0.5") == 0
        names = ["warmup", "steady-1", "swap", "frozen", "overload", "steady-2"]
        phases = json.loads((tmp_path / "r.json").read_text())["phases"]
        assert [phase["plan"]["name"] for phase in phases] == names
        assert [phase["due"] for phase in phases] == [30, 50, 100, 100, 100, 50]
        events = [len(phase["events"]) for phase in phases]
        assert (events[0], events[1], *events[3:]) == (0, 0, 2, 0, 0)
        assert events[2] >= 2
        assert phases[3]["latency_ms"]["max"] > 400
        assert "<svg" in (tmp_path / "r.svg").read_text()
        shown = capsys.readouterr()
        assert [line.split()[0] for line in shown.out.splitlines()[1:]] == names
        assert "swap 1 s: " in shown.err or "frozen 1 s: " in shown.err

    def test_ctrl_c_gives_the_report_of_what_ran(
        self, common: list[object], tmp_path: Path
    ) -> None:
        command = [sys.executable, "-m", "loadtest", *map(str, common), "--seconds", "60"]
        command += ["--out", str(tmp_path / "report.json")]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with subprocess.Popen(command, cwd=ROOT, text=True, **pipes) as process:
            assert process.stderr is not None
            assert process.stderr.readline().startswith("steady 1 s: ")
            under_way = datetime.now(UTC)
            process.send_signal(signal.SIGINT)
            output, _ = process.communicate(timeout=DEADLINE_S)
        assert process.returncode == 130
        assert output.splitlines()[1].startswith("steady")
        report = json.loads((tmp_path / "report.json").read_text())
        assert datetime.fromisoformat(report["started"]) < under_way
        (phase,) = report["phases"]
        assert not phase["complete"]
        assert 0 < phase["due"] < 6000

    def test_a_run_ends_by_itself_at_its_longest(self, common: list[object]) -> None:
        search = ["--search", "--slo-p99-ms", 10_000, "--step-s", 60, "--max-s", 3]
        started_s = time.monotonic()
        assert self.code(*common, *search) == 3
        assert time.monotonic() - started_s < DEADLINE_S

    def test_the_verb_is_known_without_any_library_being_loaded(self) -> None:
        code = "import sys, loadtest.command; print(*{n.split('.')[0] for n in sys.modules})"
        command = [sys.executable, "-W", "error", "-c", code]
        loaded = set(subprocess.check_output(command, cwd=ROOT, text=True).split())
        assert loaded & {"numpy", "httptools", "orjson", "tqdm", "matplotlib", "bundle"} == set()


def test_this_machine_is_known_by_its_addresses() -> None:
    for url in ("http://127.0.0.1:8000", "http://localhost:8000", "http://[::1]:8000"):
        assert resolve(url, allow_remote=False).port == 8000
    with pytest.raises(ValueError, match="another machine"):
        resolve("http://192.0.2.1", allow_remote=False)
    remote = resolve("http://192.0.2.1/ranker/", allow_remote=True)
    assert remote == ("192.0.2.1", 80, "192.0.2.1", "/ranker/v1/score")


def test_the_null_server_gives_what_the_service_would() -> None:
    content = orjson.loads(answer(3).partition(b"\r\n\r\n")[2])
    assert len(content["scores"]) == 3
    assert set(content) == {"model", "scores", "degraded", "missing", "request_id"}


def test_what_the_generator_adds_is_measured_beside_other_clients() -> None:
    overhead = measure_overhead([BODY], candidates=50, seconds=0.5)
    assert set(overhead.clients) >= {"loadtest", "httpx"}
    assert all(one.max_per_s > 0 for one in overhead.clients.values())
    assert overhead.floor_ms.p50 is not None
    assert overhead.open_ms.p50 is not None
    assert 0 < overhead.floor_ms.p50 < overhead.open_ms.p50
    assert json.loads(json.dumps(overhead.document(), allow_nan=False))["candidates"] == 50
