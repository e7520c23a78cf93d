"""Independent jobs on all cores, one process and one thread each, with a progress bar each.

One thread: with more, small batches spend their time waiting for each other, and sums come out in
another order, so that the same seed no longer gives the same model.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.sharedctypes import Synchronized
from typing import NoReturn, TypeVar

import torch
from tqdm import tqdm

from training.distributed import world

_T = TypeVar("_T")
_line = 0


def in_parallel(run: Callable[..., _T], jobs: Sequence[tuple[object, ...]]) -> list[_T]:
    """Results of run(*job), in the order of the jobs. The first error ends it."""
    workers = min(len(jobs), len(os.sched_getaffinity(0)))
    if workers <= 1:
        return [run(*job) for job in jobs]
    context = multiprocessing.get_context("spawn")
    lines = context.Value("i", 0)
    with ProcessPoolExecutor(workers, context, _start, (lines,)) as pool:
        return list(pool.map(run, *zip(*jobs, strict=True)))


def progress(
    steps: Iterable[_T], name: str, total: int | None = None, unit: str = "it"
) -> tqdm[_T]:
    """A progress bar over `steps`, on this process's own line of the terminal. Of the processes
    that train one model the first one has it."""
    return tqdm(
        steps, name, total, unit=unit, position=_line, leave=_line == 0, disable=world().rank > 0
    )


def counter(name: str) -> tqdm[NoReturn]:
    """A progress bar that is moved by hand."""
    return tqdm(desc=name, position=_line, leave=_line == 0, disable=world().rank > 0)


def _start(lines: Synchronized[int]) -> None:
    global _line
    torch.set_num_threads(1)
    with lines.get_lock():
        _line = lines.value
        lines.value += 1
