"""Runs an experiment: trains what its cells need, scores, measures, and keeps the result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt

from experiments.arms import Arm, Split, key
from experiments.catalogue import Cell, Experiment, Size
from experiments.cost import measure_cost
from experiments.lab import Floats, Lab, locked
from experiments.results import Entry, Result, Rows, entry
from experiments.windows import item_rows
from training.datasets.synthetic import SyntheticConfig, best_possible, write_synthetic
from training.examples import Examples
from training.metrics import has_gauc
from training.parallel import in_parallel

Mask = npt.NDArray[np.bool_]


def run_experiment(
    experiment: Experiment, size: Size, data: Path, root: Path, command: str
) -> Result:
    """Trains and scores on all cores, one job per arm, split and seed; what an interrupted run has
    finished is kept under `root`."""
    start, splits = time.monotonic(), [cell.split for cell in experiment.cells]
    jobs = dict.fromkeys(
        (data, root, c.world, c.arm, c.split, seed)
        for seed in experiment.seeds
        for c in experiment.cells
    )
    in_parallel(_score, list(jobs))
    entries = list(_entries(data, root, experiment))
    if experiment.costs:
        entries = _with_costs(entries, experiment, size, data, root)
    return Result(
        name=experiment.name,
        title=experiment.title,
        question=experiment.question,
        x=experiment.x,
        baseline=_baseline(experiment, experiment.cells[0]).series,
        command=command,
        seeds=list(experiment.seeds),
        entries=entries,
        split=f"scored on {min(s.first for s in splits)} to {max(s.last for s in splits)}",
        seconds=time.monotonic() - start,
    )


def _score(
    data: Path, root: Path, world: SyntheticConfig | None, arm: Arm, split: Split, seed: int
) -> None:
    lab_for(data, root, world).logits(arm, split, seed)


def lab_for(data: Path, root: Path, world: SyntheticConfig | None) -> Lab:
    """A lab of the data set in `data`, or of a world, which is made where it is not there yet."""
    if world is None:
        return Lab(data, root)
    folder = root / "worlds" / key(world)
    with locked(folder):
        if not (folder / "data").is_dir():
            folder.mkdir(exist_ok=True)
            write_synthetic(folder / "data", world)
    return Lab(folder / "data", folder)


def _entries(data: Path, root: Path, experiment: Experiment) -> Iterator[Entry]:
    for cell in experiment.cells:
        lab = lab_for(data, root, cell.world)
        own = [lab.logits(cell.arm, cell.split, seed) for seed in experiment.seeds]
        other = _baseline(experiment, cell)
        others = None
        if other is not cell and (other.split, other.world) == (cell.split, cell.world):
            others = [lab.logits(other.arm, other.split, seed) for seed in experiment.seeds]
        test = lab.test(cell.arm, cell.split)
        for segment, kept in _segments(lab, experiment, cell, test).items():
            rows = _rows(test).take(kept)
            if has_gauc(rows.label, rows.user):
                name, baseline = f"{cell.series}{segment}", others and _of(others, kept)
                facts = _best(lab, cell)
                yield entry(name, cell.x, _of(own, kept), rows, baseline, **facts)


def _with_costs(
    entries: list[Entry], experiment: Experiment, size: Size, data: Path, root: Path
) -> list[Entry]:
    """Adds the CPU seconds of a day to every entry."""
    seed, asof = experiment.seeds[0], size.split.asof
    cost = measure_cost(data, root / "cost", size.base.recipe, asof, seed)
    costs = [cost.scheduled if c.arm.cpm_age_days else cost.everything for c in experiment.cells]
    parts = {f"{name} s": round(value, 1) for name, value in asdict(cost).items()}
    return [
        replace(entry, facts={"CPU s a day": round(total, 1), **parts})
        for entry, total in zip(entries, costs, strict=True)
    ]


def _baseline(experiment: Experiment, cell: Cell) -> Cell:
    """What a cell is compared with: the baseline at its point, else the first one there is."""
    marked = [c for c in experiment.cells if c.baseline]
    return next((c for c in marked if c.x == cell.x), marked[0])


def _segments(lab: Lab, experiment: Experiment, cell: Cell, test: Examples) -> dict[str, Mask]:
    """Row masks by what is put behind the series' name."""
    everything = {"": np.ones(len(test), np.bool_)}
    if not experiment.segments:
        return everything
    log, days = lab.log(), cell.arm.recipe.actr.days
    first, last = cell.split.asof - timedelta(days=days), cell.split.asof - timedelta(days=1)
    ads = log.rows("ad", first, last)
    users = log.users.rows(ads["user_id"].unique().to_numpy())
    items = log.items.rows(ads["item_id"].unique().to_numpy())
    return everything | {
        ", new users": ~np.isin(test.user_row, users),
        ", new items": ~np.isin(item_rows(test, log), items),
    }


def _best(lab: Lab, cell: Cell) -> dict[str, float]:
    """What nobody can surpass, where that is known."""
    if cell.world is None:
        return {}
    best = best_possible(lab.data, cell.split.first, cell.split.last, cell.split.per_day)
    return {"best GAUC": best.gauc, "best log loss": best.log_loss}


def _rows(test: Examples) -> Rows:
    return Rows(test.label, test.user_row)


def _of(logits: list[Floats], kept: Mask) -> list[Floats]:
    return [logit[kept] for logit in logits]
