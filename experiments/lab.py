"""Trains arms and scores with them. What arms share (rows, snapshots, CPMs) is made once and kept
on disk, so that an experiment that was interrupted goes on, and the next one starts further."""

from __future__ import annotations

import fcntl
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import date, timedelta
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from experiments.arms import Arm, Split, key
from experiments.features import data_with
from experiments.references import fit_reference
from experiments.windows import attach, hide, load_windows, months_of
from training.cpm import cpm_rows
from training.events import EventLog, Ints, days_between
from training.examples import Batch, Builder, Examples, concatenate
from training.fit import calibration, fit, predict
from training.network import Network
from training.tpm import train_through
from training.workspace import Workspace

Floats = npt.NDArray[np.float64]
State = dict[str, Tensor]
_T = TypeVar("_T")


class KeepsStatistics(Network):
    """A network whose normalisation statistics stay what CPM's were."""

    def fit_statistics(self, x: Batch) -> None:
        """Does nothing."""


class Lab:
    """Works on one data set; `root` is where it keeps what it makes of it."""

    def __init__(self, data: Path, root: Path) -> None:
        self.data, self.root = data, root
        self._logs: dict[str, EventLog] = {}

    def log(self, features: str = "") -> EventLog:
        """The data set, or the same with another feature spec."""
        if features not in self._logs:
            data = data_with(features, self.data, self.root) if features else self.data
            self._logs[features] = EventLog(data)
        return self._logs[features]

    def logits(self, arm: Arm, split: Split, seed: int) -> Floats:
        """Calibrated logits float64 [n] of the arm, on the rows of `test`."""

        def score() -> Floats:
            test = self._with_windows(arm, self.test(arm, split), seed)
            if arm.reference:
                learned = self._with_windows(arm, self._ads(arm, split.asof, seed), seed)
                return fit_reference(arm.reference, self.log(arm.features), learned, seed)(test)
            network, offset = self._actr(replace(arm, hides=()), split.asof, seed)
            return predict(network, hide(test, arm.hides)) + offset

        return self._kept("logits", key(arm, split, seed), score)

    def test(self, arm: Arm, split: Split) -> Examples:
        """All candidates of the split's requests, without windows."""
        log, days = self.log(arm.features), days_between(split.first, split.last)

        def build() -> Examples:
            return self._builder(arm, split.last).build(log.full_lists(days, split.per_day))

        rows = key(split.first, split.last, split.per_day, arm.features, arm.history_days)
        return self._kept("test", rows, build)

    def _actr(self, arm: Arm, asof: date, seed: int) -> tuple[Network, float]:
        """A trained network and the offset of its calibration."""
        config = arm.recipe.actr
        network = self._network(arm, seed)

        def train() -> tuple[State, float]:
            if (start := self._start(arm, asof, seed)) is not None:
                network.load_state_dict(start)
            rows = self._with_windows(arm, self._ads(arm, asof, seed), seed)
            fit(network, rows, config.fit, seed, f"actr {asof}")
            recent = rows.since(asof - timedelta(days=config.calibration_days))
            return network.state_dict(), calibration(predict(network, recent), recent)

        state, offset = self._kept("actr", key(arm, asof, seed), train)
        network.load_state_dict(state)
        return network.eval(), offset

    def _start(self, arm: Arm, asof: date, seed: int) -> State | None:
        """What A-CTR's parameters are before it sees its ads; None is drawn at random."""
        earlier = self._earlier(arm, asof, seed)
        if arm.start in ("random", "ads only"):
            return earlier
        if arm.start == "continued" and earlier is not None:
            return earlier
        cpm = self._cpm(arm, asof - timedelta(days=arm.cpm_age_days), seed)
        return _mean([cpm, earlier]) if arm.start == "mixed" and earlier is not None else cpm

    def _earlier(self, arm: Arm, asof: date, seed: int) -> State | None:
        """The A-CTR of the days before the rows of this one."""
        if not arm.links:
            return None
        before = asof - timedelta(days=arm.recipe.actr.days)
        network, _ = self._actr(replace(arm, links=arm.links - 1), before, seed)
        return network.state_dict()

    def _cpm(self, arm: Arm, asof: date, seed: int) -> State:
        def train() -> State:
            network = self._network(arm, seed)
            if (earlier := self._earlier(arm, asof, seed)) is not None:
                network.load_state_dict(earlier)
            rows = self._with_windows(arm, self._natural(arm, asof, seed), seed)
            fit(network, rows, arm.recipe.cpm.fit, seed, f"cpm {asof}")
            return network.state_dict()

        made = (arm.recipe.network, arm.recipe.cpm, self._tpm_key(arm, seed), arm.features)
        chain = (arm.links, arm.start, arm.recipe.actr) if arm.links else ()
        return self._kept("cpm", key(*made, arm.history_days, chain, asof, seed), train)

    def _network(self, arm: Arm, seed: int) -> Network:
        log, dim = self.log(arm.features), arm.recipe.tpm.dim if arm.tpm else 0
        kind = KeepsStatistics if arm.keeps_statistics else Network
        torch.manual_seed(seed)
        return kind(log.spec, log.encoder, arm.recipe.network, dim)

    def _ads(self, arm: Arm, asof: date, seed: int) -> Examples:
        """What A-CTR learns from, without windows."""
        log, first = self.log(arm.features), asof - timedelta(days=arm.recipe.actr.days)
        last = asof - timedelta(days=1)

        def build() -> Examples:
            return self._builder(arm, last).build(log.rows("ad", first, last))

        rows = self._kept("ads", key(first, last, arm.features, arm.history_days), build)
        if arm.requests_share < 1.0:
            rows = rows.take(_some_requests(rows, arm.requests_share, seed))
        return concatenate([self._natural(arm, asof, seed), rows]) if arm.mixes else rows

    def _natural(self, arm: Arm, asof: date, seed: int) -> Examples:
        """What CPM learns from, without windows."""
        config, log = arm.recipe.cpm, self.log(arm.features)
        first, last = asof - timedelta(days=config.days), asof - timedelta(days=1)

        def build() -> Examples:
            return self._builder(arm, last).build(cpm_rows(log, first, last, config, seed))

        drawn = (config.near_negatives, config.catalogue_negatives, seed)
        rows = key(first, last, drawn, arm.features, arm.history_days)
        return self._kept("natural", rows, build)

    def _builder(self, arm: Arm, last: date) -> Builder:
        until = last + timedelta(days=1)
        return Builder(self.log(arm.features), {}, until, arm.history_days)

    def _with_windows(self, arm: Arm, examples: Examples, seed: int) -> Examples:
        if not arm.tpm:
            return examples
        log, months = self.log(arm.features), months_of(examples)
        size, dim = arm.recipe.network.window_months, arm.recipe.tpm.dim
        workspace = self._tpm(arm, seed)
        return attach(examples, log, load_windows(workspace, log, months, size, dim))

    def _tpm(self, arm: Arm, seed: int) -> Workspace:
        """A workspace with the arm's snapshots of TPM."""
        root = self.root / "tpm" / self._tpm_key(arm, seed)
        with locked(root):
            root.mkdir(exist_ok=True)
            if not (root / "data").is_symlink():
                (root / "data").symlink_to(self.data.resolve())
            workspace = Workspace(root, arm.precision)
            train_through(workspace, arm.last_snapshot, arm.snapshots, arm.recipe.tpm, seed)
        return workspace

    def _tpm_key(self, arm: Arm, seed: int) -> str:
        if not arm.tpm:
            return ""
        return key(arm.recipe.tpm, arm.last_snapshot, arm.snapshots, arm.precision, seed)

    def _kept(self, kind: str, name: str, make: Callable[[], _T]) -> _T:
        """What `make` returns; made once, by whoever comes first, and read from disk after that."""
        path = self.root / kind / f"{name}.pickle"
        with locked(path):
            if not path.is_file():
                made = make()
                _write(path, made)
                return made
        with path.open("rb") as file:
            found: _T = pickle.load(file)
        return found


def _mean(states: Sequence[State]) -> State:
    first, *others = states
    return {
        name: torch.stack([tensor, *(o[name] for o in others)]).mean(0)
        if tensor.is_floating_point()
        else tensor
        for name, tensor in first.items()
    }


def _some_requests(rows: Examples, share: float, seed: int) -> Ints:
    """Row numbers of a share of the requests: of a request all rows or none."""
    requests, place = np.unique(rows.request_id, return_inverse=True)
    kept = np.random.default_rng(seed).permutation(len(requests)) < round(share * len(requests))
    return np.flatnonzero(kept[place])


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time makes what is at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _write(path: Path, made: object) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("wb") as file:
        pickle.dump(made, file, protocol=5)
    draft.replace(path)
