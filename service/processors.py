"""How many processors there are for this process: those that it may run on, and no more than the
time on them that its control groups leave it. A container sees all processors of its machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def processors(groups: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> int:
    """At least 1. groups: where control groups of version 2 are mounted. own: says which of them
    the process is in."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *_quotas(groups, own)])))


def _quotas(groups: Path, own: Path) -> Iterator[float]:
    """Processors that the process's group and those above it may use, where that is limited."""
    with suppress(OSError, StopIteration):
        lines = own.read_text().splitlines()
        name = next(line.removeprefix("0::") for line in lines if line.startswith("0::"))
        folder = groups / name.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(groups):
                yield from _quota(group / "cpu.max")


def _quota(limit: Path) -> Iterator[float]:
    """Of a file that has microseconds of processor time, or "max", in so many microseconds."""
    with suppress(OSError, ValueError):
        time_us, period_us = limit.read_text().split()
        yield float(time_us) / float(period_us)
