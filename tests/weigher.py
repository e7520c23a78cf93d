"""Fits a small network on parts of 40 MB, and prints the peak of the process's resident memory in
MiB: weigher.py parts|kept NUMBER. With `kept` no part is ever let go of."""

from __future__ import annotations

import re
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

import numpy as np
import torch

from benchmarks.training import QUICK, Dnn, read_part, write_rows
from training.config import FitConfig
from training.examples import Examples
from training.fit import fit
from training.network import Network
from training.parts import Parts

ROWS, WIDTH = 10_000, 1000


class Kept(Parts):
    """What must not be."""

    def __getitem__(self, number: int) -> Examples:
        kept.append(super().__getitem__(number))
        return kept[-1]


kept: list[Examples] = []


def heavy(path: Path) -> Examples:
    """A part of 40 MB, nearly all of it numbers that the network does not read."""
    return replace(read_part(path), match=np.ones((ROWS, WIDTH), np.float32))


def main(kind: str, num: int) -> None:
    torch.set_num_threads(1)
    size = replace(QUICK, parts=1, part_rows=ROWS, test_rows=100)
    with TemporaryDirectory() as folder:
        write_rows(Path(folder), size)
        build = partial(heavy, Path(folder) / "train" / "part-000.parquet")
        parts = (Kept if kind == "kept" else Parts)([build] * num)
        fit(cast(Network, Dnn(size)), parts, FitConfig(), seed=0, name="weigh")
    # Not getrusage, whose peak begins with that of the process that started this one.
    status = Path("/proc/self/status").read_text()
    print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1024)  # type: ignore[index]


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
