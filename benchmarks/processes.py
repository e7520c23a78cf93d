"""What the system says of the processes of a service."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

SAMPLE_S = 1.0


def workers(pid: int) -> set[int]:
    """Processes that serve; the one that tracks resources for Python is none."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return {int(child) for child in children if b"spawn_main" in _command_line(child)}


def resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def mapped_bytes(pid: int, path: Path) -> tuple[int, int]:
    """Bytes of a file that a process has mapped and in memory; and its share of them, where pages
    that n processes have count 1/n (Rss and Pss of smaps)."""
    resident = share = 0
    lines = iter(Path(f"/proc/{pid}/smaps").read_text().splitlines())
    for line in lines:
        if line.endswith(str(path)):
            facts = dict(next(lines).split(":") for _ in range(5))
            resident += int(facts["Rss"].split()[0]) * 1024
            share += int(facts["Pss"].split()[0]) * 1024
    return resident, share


def stolen_s() -> float:
    """Seconds since it started in which the machine, if it is a virtual one, had no processor
    though it had work: a pause that no process of it can avoid."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()
    return int(fields[8]) / os.sysconf("SC_CLK_TCK")


class Sampler:
    """Samples what a process has resident, and how the machine does, from the beginning of the
    block to its end."""

    def __init__(self, pid: int) -> None:
        self.memory: list[tuple[float, int]] = []
        """Seconds since the beginning, and bytes."""
        self.stolen_s: list[float] = []
        """As `stolen_s` counts, between one sample and the next."""
        self.loop_s: list[float] = []
        """Processor time that a fixed loop took: no less than usual where others slow it down."""
        self._pid, self._over = pid, threading.Event()
        self._thread = threading.Thread(target=self._sample)

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def most(self, from_s: float, to_s: float) -> int:
        """Bytes."""
        return max(size for at_s, size in self.memory if from_s <= at_s <= to_s)

    def _sample(self) -> None:
        started_s, before_s = time.monotonic(), stolen_s()
        while not self._over.wait(SAMPLE_S):
            self.memory.append((time.monotonic() - started_s, resident_bytes(self._pid)))
            now_s = stolen_s()
            self.stolen_s.append(now_s - before_s)
            self.loop_s.append(_loop_s())
            before_s = now_s


def _loop_s() -> float:
    started_s = time.thread_time()
    for _ in range(10_000):
        pass
    return time.thread_time() - started_s


def _command_line(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has just ended
        return b""
