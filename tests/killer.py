"""Kills updates, and runs several at once, in processes forked from one that has imported all there
is and computed nothing: a start of torch would cost three seconds each time.

    python tests/killer.py kill BEFORE SCRATCH ASOF OPERATIONS
    python tests/killer.py together BEFORE TARGET ASOF

BEFORE is a workspace, and copied. `kill` kills an update at each durable operation whose name
begins like OPERATIONS ("os.rename", or "" for all) in turn, and runs it again. The environment
variable GRAPHS names the folder of `remember_graphs`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, NoReturn

import onnxscript  # noqa: F401  (what the exporter would import in every child)
import tiny
import torch
from torch.onnx._internal.exporter import _core  # noqa: F401

import training.export
from bundle.encode import Arrays
from training.config import GatesConfig, Schedule
from training.served import ItemSide, RequestSide
from training.update import TIERS, run_update
from training.workspace import Workspace

SCHEDULE = Schedule(cpm_days=5, gates=GatesConfig(min_spread=0.01))
"""What is trained on the tiny data set has hardly learned to tell candidates apart."""
_CHANGES = ("os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "os.link")
_VOLATILE = {"manifest.json": "created", "current.json": "changed_at"}


def remember_graphs(folder: Path) -> Callable[..., None]:
    """Puts a memory in front of `export_graph`, which takes five seconds and depends on nothing but
    the network; returns the original."""
    original = training.export.export_graph

    def export_graph(module: ItemSide | RequestSide, example: Arrays, target: Path) -> None:
        weights = sorted((name, t.numpy().tobytes()) for name, t in module.state_dict().items())
        known = folder / hashlib.sha256(repr((target.name, weights)).encode()).hexdigest()
        if not known.exists():
            draft = known.with_suffix(".partial")
            draft.mkdir(parents=True)
            original(module, example, draft / target.name)
            draft.rename(known)
        for path in known.iterdir():
            shutil.copyfile(path, target.parent / path.name)

    training.export.export_graph = export_graph
    return original


def content(root: Path) -> dict[str, str]:
    """Every path of a workspace with the hash of what is in it; times and locks left out."""
    paths = [p for p in root.rglob("*") if p.relative_to(root).parts[0] not in ("data", "locks")]
    return {str(path.relative_to(root)): _hash(path) for path in sorted(paths)}


def _hash(path: Path) -> str:
    if path.is_dir():
        return "folder"
    held = path.read_bytes()
    if volatile := _VOLATILE.get(path.name):
        document = json.loads(held)
        del document[volatile]
        held = json.dumps(document, sort_keys=True).encode()
    return hashlib.sha256(held).hexdigest()


class Durable:
    """Counts what changes the file system under a folder, and kills this process before one."""

    def __init__(self, root: Path, fatal: int = 0) -> None:
        self.root, self.fatal = str(root), fatal
        self.done: list[str] = []
        sys.addaudithook(self)

    def __call__(self, event: str, args: tuple[Any, ...]) -> None:
        writes = (
            event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        )
        if not (writes or event in _CHANGES) or isinstance(args[0], int):
            return
        path = os.fsdecode(args[0])
        # What is removed within a tree is named relative to an open folder.
        if not path.startswith(self.root) and path.startswith("/"):
            return
        self.done.append(f"{event} {path.removeprefix(self.root)}")
        if len(self.done) == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)


def _in_child(run: Callable[[], object]) -> int:
    """The wait status of a forked child that runs something."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        _exit_after(run)
    return os.waitpid(child, 0)[1]


def _exit_after(run: Callable[[], object]) -> NoReturn:
    code = 1
    try:
        run()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Not sys.exit: what the parent would do at its end is not for its children.
        os._exit(code)


def _update(root: Path, asof: date, tiers: Sequence[str] = TIERS) -> None:
    run_update(Workspace(root), asof, tiny.RECIPE, SCHEDULE, tiers=tiers)


def _copied(before: Path, target: Path) -> Path:
    shutil.rmtree(target, ignore_errors=True)
    return Path(shutil.copytree(before, target, symlinks=True))


def kill(before: Path, scratch: Path, asof: date, named: str) -> dict[str, Any]:
    """By operation of an update: what it was, how much was left to do, and what is different."""
    reference, listed = scratch / "reference", scratch / "operations.json"

    def count() -> None:
        durable = Durable(reference)
        _update(reference, asof)
        listed.write_text(json.dumps(durable.done))

    # Twice: the first time the exporter itself runs, whose operations are its own.
    for _ in range(2):
        _copied(before, reference)
        assert _in_child(count) == 0
    operations, expected = json.loads(listed.read_text()), content(reference)
    chosen = [n for n, one in enumerate(operations, start=1) if one.startswith(named)]
    found = {n: _killed_at(n, before, scratch / "killed", asof, expected) for n in chosen}
    return {"operations": operations, "killed": found}


def _killed_at(
    n: int, before: Path, root: Path, asof: date, expected: dict[str, str]
) -> dict[str, Any]:
    _copied(before, root)

    def killed() -> None:
        Durable(root, n)
        _update(root, asof)

    status = _in_child(killed)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL, n
    to_do = len(content(root).items() ^ expected.items())
    assert _in_child(lambda: _update(root, asof)) == 0, n
    different = sorted({path for path, _ in content(root).items() ^ expected.items()})
    return {"to_do": to_do, "different": different}


def together(root: Path, asof: date) -> dict[str, Any]:
    """Updates each tier of a workspace in a process of its own, all at once; their exit codes."""
    sys.stdout.flush()
    children = {}
    for tier in TIERS:
        child = os.fork()
        if child == 0:
            _exit_after(lambda tier=tier: _update(root, asof, [tier]))
        children[tier] = child
    return {tier: os.waitstatus_to_exitcode(os.waitpid(c, 0)[1]) for tier, c in children.items()}


def main(arguments: Sequence[str]) -> dict[str, Any]:
    """What the module's docstring says."""
    what, before, scratch, asof = arguments[0], Path(arguments[1]), Path(arguments[2]), arguments[3]
    day = date.fromisoformat(asof)
    if what == "together":
        return together(_copied(before, scratch), day)
    return kill(before, scratch, day, arguments[4])


if __name__ == "__main__":
    torch.set_num_threads(1)
    remember_graphs(Path(os.environ["GRAPHS"]))
    print(json.dumps(main(sys.argv[1:])))
