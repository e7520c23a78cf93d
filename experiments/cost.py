"""What the tiers cost in CPU time, on their own schedule and all together every day."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from training.actr import train_actr
from training.cpm import train_cpm
from training.examples import month_before
from training.recipes import Recipe
from training.tpm import months_until, train_through
from training.workspace import Workspace

_SNAPSHOTS = 4


@dataclass(frozen=True)
class Cost:
    """CPU seconds of one training of each tier, reading and joining its rows included."""

    tpm_whole: float
    """On all the months behind a first snapshot."""
    tpm_month: float
    """Of one more month, continued."""
    cpm: float
    actr: float

    @property
    def scheduled(self) -> float:
        """CPU seconds a day with TPM monthly, CPM weekly and A-CTR daily."""
        return self.tpm_month / 30 + self.cpm / 7 + self.actr

    @property
    def everything(self) -> float:
        """CPU seconds a day with all of it pre-trained anew every day."""
        return self.tpm_whole + self.cpm + self.actr


def measure_cost(data: Path, root: Path, recipe: Recipe, asof: date, seed: int) -> Cost:
    """Trains all tiers once with the product's own functions, in a workspace that is removed."""
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir(parents=True)
    (root / "data").symlink_to(data.resolve())
    workspace = Workspace(root)
    first, *others = months_until(month_before(asof), _SNAPSHOTS)
    whole = _cpu_s(lambda: train_through(workspace, first, 1, recipe.tpm, seed))
    months = _cpu_s(lambda: train_through(workspace, others[-1], len(others), recipe.tpm, seed))
    cpm = _cpu_s(lambda: train_cpm(workspace, asof, recipe.network, recipe.cpm, seed))
    actr = _cpu_s(lambda: train_actr(workspace, asof, recipe.network, recipe.actr, seed))
    shutil.rmtree(root)
    return Cost(whole, months / len(others), cpm, actr)


def _cpu_s(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start
