"""Where the tiers leave what they made: one folder, each thing written in one step."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bundle.registry import Registry
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
from training.events import EventLog


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
    """`data/` (event log), `snapshots/`, `models/`, `store/` (embedded windows), `registry/`."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.data = root / "data"
        self.store = EmbeddedStore(root / "store")
        self.registry = Registry(root / "registry")

    def log(self) -> EventLog:
        return EventLog(self.data)

    def write_snapshots(self, snapshots: dict[Entity, Snapshot]) -> None:
        """Keeps a month's snapshots under `snapshots/MONTH`; items last, which makes it count."""
        for entity, snapshot in snapshots.items():
            write_snapshot(self.root, entity, snapshot)

    def months(self) -> list[str]:
        """Months that have a snapshot of users and of items, oldest first."""
        found = sorted(path.name for path in (self.root / "snapshots").glob("????-??"))
        return [m for m in found if (self.root / "snapshots" / m / "items").is_dir()]

    def pack(self, month: str) -> PackedWindow:
        """The window that ends with `month`, from its three snapshots.

        Raises:
            WorkspaceError: one of them has not been trained.
        """
        needed = window_months(month)
        lacking = sorted(set(needed) - set(self.months()))
        if lacking:
            raise WorkspaceError(
                f"window {month} needs the snapshots of {', '.join(lacking)};"
                f" run 'ecdctr train tpm --through {month}'"
            )
        entities: tuple[Entity, ...] = ("users", "items")
        return pack_window(
            month, {m: {e: read_snapshot(self.root, e, m) for e in entities} for m in needed}
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
        try:
            yield draft
            shutil.rmtree(target, ignore_errors=True)
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
