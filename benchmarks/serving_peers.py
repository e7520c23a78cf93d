"""The servers that `benchmarks.serving` compares, and how each is started, on one core."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import orjson

from benchmarks.serving_model import Body, Served
from loadtest.address import SCORE_PATH

ROOT = Path(__file__).parent.parent
PEERS = ROOT / "build" / "bench" / "peers"
SCRIPTS = ROOT / "benchmarks" / "peers"
START_TIMEOUT_S = 90.0
ASK_TIMEOUT_S = 10.0


Ask = Callable[..., Any]
"""Puts a question to `benchmarks.serving_floor`, and gives its answer."""


@dataclass(frozen=True)
class System:
    """One server. environment: whose Python runs it; empty for the project's own."""

    name: str
    environment: str = ""
    command: tuple[str, ...] = ()
    """With {bin}, {scripts}, {folder} and {port} to fill in."""
    by_row: bool = False
    """Bodies have an object per ad."""

    @property
    def environment_ready(self) -> bool:
        """Its packages are installed."""
        return not self.environment or (PEERS / self.environment / "ready").exists()

    def content(self, body: Body) -> bytes:
        """The body as this server reads it."""
        return orjson.dumps(_by_row(body) if self.by_row else body)


def _python(name: str, environment: str, script: str, *more: str, by_row: bool = False) -> System:
    command = ("{bin}/python", f"{{scripts}}/{script}", "{folder}", "{port}", *more)
    return System(name, environment, command, by_row)


OURS = System("this service")
TUNED, TILED, PLAIN = "FastAPI tuned", "FastAPI tuned, tiled inputs", "plain FastAPI"
OTHERS = (
    _python(TUNED, "fastapi", "serve_fastapi_tuned.py", "shared"),
    _python(TILED, "fastapi", "serve_fastapi_tuned.py", "tiled"),
    _python(PLAIN, "fastapi", "serve_fastapi_plain.py", by_row=True),
    _python("LitServe", "litserve", "serve_litserve.py"),
    System(
        "BentoML",
        "bentoml",
        (
            *("{bin}/bentoml", "serve", "--working-dir", "{scripts}", "serve_bentoml:Scorer"),
            *("--host", "127.0.0.1", "--port", "{port}"),
        ),
    ),
    _python("Ray Serve", "ray_serve", "serve_ray.py"),
    System(
        "mosec",
        "mosec",
        (
            *("{bin}/python", "{scripts}/serve_mosec.py"),
            *("--address", "127.0.0.1", "--port", "{port}"),
        ),
    ),
)


def _by_row(body: Body) -> Body:
    ids, features = body["candidates"]["id"], body["candidates"]["features"]
    ads = [
        {"id": item, "features": {name: column[place] for name, column in features.items()}}
        for place, item in enumerate(ids)
    ]
    return {**body, "candidates": ads}


@contextmanager
def running(system: System, served: Served, core: int) -> Iterator[int]:
    """The port of the server once it answers; it and all that it started end with the block."""
    port = free_port()
    log = served.folder / f"{system.name.replace(' ', '-')}.log"
    command, environ = _command(system, served, port), _environ(system, served)
    pinned = partial(os.sched_setaffinity, 0, {core})
    with started(command, log, env=environ, preexec_fn=pinned) as process:
        content = system.content(next(iter(served.bodies.values()))[0])
        await_answer(system.name, content, port, process, log)
        yield port


@contextmanager
def floor(served: Served, core: int) -> Iterator[Ask]:
    """The process that answers requests without HTTP, on that core, once it is asked to.

    Raises:
        RuntimeError: when it is asked and has ended.
    """
    for num, bodies in served.bodies.items():
        (served.folder / f"bodies-{num}.json").write_text(json.dumps(bodies))
    current = served.workspace.registry.current()
    assert current is not None
    bundle = served.workspace.registry.path(current.current)
    command = [sys.executable, "-m", "benchmarks.serving_floor", str(served.folder), str(bundle)]
    pinned = partial(os.sched_setaffinity, 0, {core})
    with subprocess.Popen(
        [*command, served.store],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=pinned,
    ) as process:
        yield partial(_ask, process)


def _ask(process: subprocess.Popen[str], *values: object) -> Any:
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(values) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())
    except (BrokenPipeError, json.JSONDecodeError):
        raise RuntimeError("the process without HTTP has ended; why is above") from None


@contextmanager
def started(command: Sequence[str], log: Path, **how: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A server whose output goes to `log`; it and all that it started end with the block. how: as
    `subprocess.Popen` takes it."""
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True, **how
        )
    try:
        yield process
    finally:
        _end(process)


def ask(port: int, content: bytes) -> list[float]:
    """Scores of one request.

    Raises:
        OSError: no answer. ValueError: another status than 200.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ASK_TIMEOUT_S)
    try:
        connection.request("POST", SCORE_PATH, content, {"content-type": "application/json"})
        response = connection.getresponse()
        found = response.read()
        if response.status != 200:
            raise ValueError(f"status {response.status}: {found[:300]!r}")
        scores: list[float] = json.loads(found)["scores"]
        return scores
    finally:
        connection.close()


def _command(system: System, served: Served, port: int) -> Sequence[str]:
    if system is OURS:
        command = [sys.executable, "-m", "ecdctr", "--workspace", str(served.workspace.root)]
        command += ["serve", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
        return [*command, "--store", served.store]
    filled = {
        "bin": PEERS / system.environment / "bin",
        "scripts": SCRIPTS,
        "folder": served.folder,
        "port": port,
    }
    return [part.format(**filled) for part in system.command]


def _environ(system: System, served: Served) -> dict[str, str]:
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    if system is OURS:
        # The others wait for their store, and for their turn, as long as it takes.
        return {**environ, "ECDCTR_STORE_DEADLINE_MS": "2000", "ECDCTR_MAX_WAIT_MS": "5000"}
    environ["PYTHONPATH"] += os.pathsep + str(SCRIPTS)
    quiet = {"BENTOML_DO_NOT_TRACK": "True", "RAY_USAGE_STATS_ENABLED": "0"}
    return {**environ, **quiet, "SERVED": str(served.folder)}


def await_answer(
    name: str,
    content: bytes,
    port: int,
    process: subprocess.Popen[bytes],
    log: Path,
    pause_s: float = 0.2,
) -> None:
    """Asks until there are scores.

    Raises:
        RuntimeError: the process ended, or `START_TIMEOUT_S` have passed; with the end of the log.
    """
    give_up_at_s, why = time.monotonic() + START_TIMEOUT_S, ""
    while time.monotonic() < give_up_at_s and process.poll() is None:
        try:
            ask(port, content)
            return
        except (OSError, ValueError, http.client.HTTPException) as error:
            why = str(error)
            time.sleep(pause_s)
    raise RuntimeError(f"{name} gave no scores ({why}); {log}: {log.read_text()[-2000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """The server and its children, which are a session of their own."""
    for number, patience_s in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 10.0)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
