"""Where the tiers leave what they made: one folder, each thing written in one step."""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
from torch import nn

from bundle.registry import Registry, sync
from embeddings_store import (
    EmbeddedStore,
    Entity,
    PackedWindow,
    Snapshot,
    WindowRef,
    Windows,
    pack_window,
    read_snapshot,
    window_months,
    write_snapshot,
)
from embeddings_store.precision import PRECISIONS, Precision
from training.events import EventLog

if TYPE_CHECKING:
    from training.examples import DayCache

_DAY = re.compile(r"\d{4}-\d\d-\d\d")


@dataclass(frozen=True)
class WindowTable:
    """One published window for all users and all items of the log, in its row order."""

    ref: WindowRef | None
    """None where there is no window: everything is absent then."""
    users: Windows
    items: Windows


class WorkspaceError(ValueError):
    """Something that a step needs is not there yet; the message names the command that makes it."""


class Workspace:
    """`data/` (event log), `snapshots/`, `held/` (snapshots that moved too far), `models/`,
    `store/` (embedded windows), `registry/`."""

    cache: DayCache | None = None
    """Shared by builders of a long run over a log that does not change; nothing by default."""

    def __init__(self, root: Path, precision: str = "") -> None:
        """`precision` is that of windows that are packed from now on, one of
        `embeddings_store.precision.PRECISIONS`; ECDCTR_WINDOW_PRECISION or float16 unless given.

        Raises:
            WorkspaceError: there is no such precision.
        """
        self.root = root
        chosen = precision or os.environ.get("ECDCTR_WINDOW_PRECISION") or "float16"
        if chosen not in PRECISIONS:
            choices = ", ".join(PRECISIONS)
            raise WorkspaceError(f"window precision {chosen!r} must be one of {choices}")
        self.precision: Precision = chosen
        self.data = root / "data"
        self.store = EmbeddedStore(root / "store")
        self.registry = Registry(root / "registry")
        """Who delivers to another one puts that here."""

    def log(self) -> EventLog:
        return self.cache.log if self.cache else EventLog(self.data)

    def write_snapshots(self, snapshots: dict[Entity, Snapshot]) -> None:
        """Keeps a month's snapshots under `snapshots/MONTH`; items last, which makes it count."""
        for entity, snapshot in snapshots.items():
            write_snapshot(self.root, entity, snapshot)

    def hold(self, month: str, snapshots: Mapping[Entity, Snapshot], reasons: list[str]) -> None:
        """Keeps a month's snapshots under `held/MONTH`, with the reasons, out of every window."""
        with self._replaced(self.root / "held" / month) as folder:
            for entity, snapshot in snapshots.items():
                write_snapshot(folder, entity, snapshot)
            (folder / "reasons.json").write_text(json.dumps(reasons, indent=2))

    def held(self) -> dict[str, list[str]]:
        """Months that are held back, oldest first, with the reasons. Who removes `held/MONTH`
        wants the month to be trained again."""
        found = sorted((self.root / "held").glob("????-??/snapshots/*/items"))
        folders = [path.parents[2] for path in found]
        return {f.name: json.loads((f / "reasons.json").read_text()) for f in folders}

    def release(self, month: str) -> None:
        """Makes the snapshots of a month that is held back count, in one rename.

        Raises:
            WorkspaceError: it is not held back.
        """
        if month not in self.held():
            held = ", ".join(self.held()) or "none"
            raise WorkspaceError(f"{month} is not held back, must be one of: {held}")
        folder, target = self.root / "held" / month, self.root / "snapshots" / month
        target.parent.mkdir(exist_ok=True)
        # What a broken-off run left.
        shutil.rmtree(target, ignore_errors=True)
        (folder / "snapshots" / month).rename(target)
        sync(target.parent)
        shutil.rmtree(folder)

    def months(self) -> list[str]:
        """Months that have a snapshot of users and of items, oldest first."""
        found = sorted(path.name for path in (self.root / "snapshots").glob("????-??"))
        return [m for m in found if (self.root / "snapshots" / m / "items").is_dir()]

    def whole_windows(self) -> list[str]:
        """The last months of all windows whose three snapshots are there, oldest first."""
        months = self.months()
        return [month for month in months if set(window_months(month)) <= set(months)]

    @property
    def lag_days(self) -> int:
        """How many days after its end a month's snapshot is still unknown to rows; the same for
        all that is trained, measured and exported here."""
        path = self.root / "lag.json"
        return int(json.loads(path.read_text())["days"]) if path.is_file() else 0

    def keep_lag(self, days: int) -> None:
        """Makes `days` the workspace's lag.

        Raises:
            WorkspaceError: models here were trained with another one.
        """
        with self.locked("lag", wait_s=60.0):
            if days == self.lag_days:
                return
            trained = [name for name in self.models() if not name.startswith("tpm-")]
            if trained:
                raise WorkspaceError(
                    f"a lag of {days} days was asked for, but {trained[-1]} in {self.root} was"
                    f" trained with {self.lag_days}; use that, or another workspace"
                )
            draft = self.root / ".lag.json"
            draft.write_text(json.dumps({"days": days}))
            draft.replace(self.root / "lag.json")

    def pack(self, month: str) -> PackedWindow:
        """The window that ends with `month`, from its three snapshots.

        Raises:
            WorkspaceError: one of them has not been trained.
        """
        needed = window_months(month)
        lacking = sorted(set(needed) - set(self.months()))
        if held := sorted(set(lacking) & self.held().keys()):
            why = "; ".join(self.held()[held[0]])
            raise WorkspaceError(
                f"window {month} needs snapshot {held[0]}, which is held back: {why}; release it or"
                f" remove held/{held[0]}"
            )
        if lacking:
            raise WorkspaceError(
                f"window {month} needs the snapshots of {', '.join(lacking)};"
                f" run 'ecdctr train tpm --through {month}'"
            )
        entities: tuple[Entity, ...] = ("users", "items")
        return pack_window(
            month,
            {m: {e: read_snapshot(self.root, e, m) for e in entities} for m in needed},
            self.precision,
        )

    def windows(self, log: EventLog, months: Sequence[str]) -> dict[str, WindowTable]:
        """Windows as training reads them: published into the embedded store, and read back from
        it, so that they are rounded exactly as in serving."""
        tables = {}
        for month in sorted(set(months)):
            reader = self.store.open_now(self.store.publish(self.pack(month)))
            tables[month] = WindowTable(
                reader.ref,
                reader.lookup_now("users", log.users.keys),
                reader.lookup_now("items", log.items.keys),
            )
        return tables

    def save_model(self, name: str, model: nn.Module, facts: dict[str, Any]) -> None:
        """Keeps a model's tensors and what is to be known about them under `models/NAME`."""
        with self._replaced(self.root / "models" / name) as folder:
            torch.save(model.state_dict(), folder / "model.pt")
            (folder / "facts.json").write_text(json.dumps(facts, indent=2))

    def load_model(self, name: str, model: nn.Module, command: str) -> dict[str, Any]:
        """Loads tensors into `model` and returns its facts.

        Raises:
            WorkspaceError: there is no such model; `command` would make it.
        """
        facts = self.facts(name, command)
        state = torch.load(self.root / "models" / name / "model.pt", weights_only=True)
        model.load_state_dict(state)
        return facts

    def models(self) -> list[str]:
        """Names of all models that are there."""
        return sorted(p.parent.name for p in (self.root / "models").glob("[!.]*/facts.json"))

    def newest(self, named: Callable[[date], str], until: date) -> date | None:
        """The newest day up to `until` that there is a model of; `named` gives a day's name."""
        names = self.models()
        days = {date.fromisoformat(found[0]) for name in names if (found := _DAY.search(name))}
        return max((day for day in days if day <= until and named(day) in names), default=None)

    @contextmanager
    def locked(self, tier: str, wait_s: float = 0.0) -> Iterator[None]:
        """One process at a time makes what belongs to a tier; the lock dies with it.

        Raises:
            WorkspaceError: another process has it for longer than `wait_s`; who, and since when.
        """
        path = self.root / "locks" / tier
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+") as file:
            _lock(file, tier, time.monotonic() + wait_s)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.write(f" since {datetime.now(UTC):%F %T} UTC")
            file.flush()
            yield

    def has_model(self, name: str) -> bool:
        return (self.root / "models" / name / "facts.json").is_file()

    def facts(self, name: str, command: str) -> dict[str, Any]:
        """What is known about a model; see `load_model`."""
        path = self.root / "models" / name / "facts.json"
        if not path.is_file():
            raise WorkspaceError(f"no model {name}; run '{command}' first")
        facts: dict[str, Any] = json.loads(path.read_text())
        return facts

    def keep_evaluation(self, asof: date, entries: list[dict[str, Any]]) -> Path:
        """Keeps an evaluation's report under `evaluations/ASOF.json`."""
        path = self.root / "evaluations" / f"{asof}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(entries, indent=2))
        return path

    def metrics(self, asof: date) -> dict[str, float]:
        """Held-out figures of the full model of a day; empty before it has been evaluated."""
        path = self.root / "evaluations" / f"{asof}.json"
        if not path.is_file():
            return {}
        entry = json.loads(path.read_text())[0]
        return {name: entry[name] for name in ("gauc", "auc", "log_loss", "pcoc")}

    @contextmanager
    def _replaced(self, target: Path) -> Iterator[Path]:
        """A draft folder that takes the place of `target` when the block ends well."""
        draft = target.with_name(f".{target.name}.{os.getpid()}")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        replaced = target.with_name(f"{draft.name}.replaced")
        try:
            yield draft
            for path in [*draft.iterdir(), draft]:
                sync(path)
            # Never a folder with half of its files: in between there is none for a moment.
            if target.exists():
                target.rename(replaced)
            draft.rename(target)
            sync(target.parent)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
            shutil.rmtree(replaced, ignore_errors=True)


def _lock(file: IO[str], tier: str, until: float) -> None:
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until:
                time.sleep(0.05)
                continue
            file.seek(0)
            raise WorkspaceError(
                f"{tier} is being made by {file.read() or 'another process'};"
                " run this again when that has ended"
            ) from None
