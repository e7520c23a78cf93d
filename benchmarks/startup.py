"""How soon a bundle of gigabytes serves, and whether workers share its pages.

The bundle is the one that `make demo` promoted, with items added until it is as large as wanted.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import orjson

from benchmarks.figures import Figures
from benchmarks.processes import mapped_bytes, workers
from benchmarks.serving import arguments_of
from benchmarks.serving_peers import OURS, ask, await_answer, free_port, started
from bundle.artifact import Artifact, open_artifact
from bundle.golden import body_of
from bundle.items import ItemTable
from bundle.manifest import ITEMS, PARTS, seal
from bundle.registry import Registry
from loadtest.bodies import Body

TIMEOUT_S = 120.0
NUM_STARTS = 5
CHUNK = 100_000
"""Rows that are written at a time."""


def enlarge(source: Artifact, registry: Registry, num_bytes: int) -> str:
    """A bundle in `registry` like `source`, with added items of whom nobody has heard."""
    row_bytes = sum(a[0].nbytes for a in (source.parts, source.encoder.items.categorical))
    with registry.draft() as draft:
        shutil.copytree(source.folder, draft, dirs_exist_ok=True)
        _add_items(source, draft, num_bytes // row_bytes)
        seal(draft, source.manifest)
        bundle_id = registry.publish(draft)
    registry.promote(bundle_id)
    return bundle_id


def _add_items(source: Artifact, draft: Path, num: int) -> None:
    random, items = np.random.default_rng(0), source.encoder.items
    num_old = len(items.keys)
    new = np.setdiff1d(random.integers(1, 1 << 63, num, np.uint64), items.keys)
    rows = np.concatenate([np.arange(num_old), random.integers(0, num_old, len(new))])
    keys = np.concatenate([items.keys, new])
    ItemTable.build(keys, items.categorical[rows], items.numeric[rows]).write(draft / ITEMS)
    rows = np.append(rows[np.argsort(keys)], num_old)  # the last one is the missing item's
    path, shape = draft / PARTS, (len(rows), source.parts.shape[1])
    path.unlink()
    parts = np.lib.format.open_memmap(path, "w+", np.float32, shape)
    for start in range(0, len(rows), CHUNK):
        parts[start : start + CHUNK] = source.parts[rows[start : start + CHUNK]]
    parts.flush()


@contextmanager
def serving(workspace: Path, num_workers: int, body: Body) -> Iterator[tuple[float, int, int]]:
    """Seconds from the start of the process to its first scores; its port and its id."""
    port, log = free_port(), workspace / "service.log"
    command = [sys.executable, "-m", "ecdctr", "--workspace", str(workspace), "serve"]
    command += ["--port", str(port), "--workers", str(num_workers)]
    start_s = time.monotonic()
    with started(command, log) as process:
        await_answer(OURS.name, orjson.dumps(body), port, process, log, pause_s=0.005)
        yield time.monotonic() - start_s, port, process.pid


def measure(source: Path, workspace: Path, num_bytes: int) -> Figures:
    """Makes the bundle in a workspace of its own, and starts services on it."""
    found = Figures()
    own = Registry(workspace / "registry")
    given = Registry(source / "registry")
    current = given.current()
    if current is None:
        raise SystemExit(f"benchmarks.startup: no bundle in {source}; make demo makes one")
    artifact = open_artifact(given.path(current.current))
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.mkdir(parents=True)
    (workspace / "store").symlink_to((source / "store").resolve())
    folder = own.path(enlarge(artifact, own, num_bytes))
    size = sum(path.stat().st_size for path in folder.rglob("*"))
    found.add("size of the bundle", size / 1e9, "GB")
    body = body_of(artifact.golden[0].request)
    for num_workers in (1, 2):
        times = []
        for _ in range(NUM_STARTS):
            with serving(workspace, num_workers, body) as (seconds, _, _):
                times.append(seconds)
        goal = 2.0 if num_workers == 1 else None
        text = f"from the start of the process to scores, {num_workers} worker(s)"
        found.add(text, float(np.median(times)), "s", at_most=goal)
    bodies = [body_of(golden.request) for golden in artifact.golden]
    with serving(workspace, 2, body) as (_, port, pid):
        sizes = _mapped_by_both(port, pid, bodies, folder / PARTS)
    found.add("pages of the parts in two workers", sum(s for s, _ in sizes) / 1e6, "MB")
    found.add("memory that they take", sum(s for _, s in sizes) / 1e6, "MB")
    return found


def _mapped_by_both(
    port: int, pid: int, bodies: Sequence[Body], path: Path
) -> list[tuple[int, int]]:
    """What `mapped_bytes` says of each of two workers, once both have answered a lot."""
    give_up_at_s = time.monotonic() + TIMEOUT_S
    while time.monotonic() < give_up_at_s:
        for body in [*bodies] * 20:
            ask(port, orjson.dumps(body))  # on a connection of its own
        sizes = [mapped_bytes(worker, path) for worker in workers(pid)]
        if len(sizes) == 2 and all(resident for resident, _ in sizes):
            return sizes
    raise RuntimeError(f"only one of two workers answered within {TIMEOUT_S:.0f} s")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = arguments_of("The start of a service on a large bundle.")
    parser.add_argument("--gb", type=float, default=2.0, help="of the bundle (%(default)s)")
    options = parser.parse_args(arguments)
    workspace = options.out.resolve() / "startup"
    found = measure(options.bundle_from.resolve(), workspace, int(options.gb * 1e9))
    shutil.rmtree(workspace)
    found.write(options.out / "startup.json")
    print(found)


if __name__ == "__main__":
    main()
