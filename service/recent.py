"""Counts of the last minutes, by name, summed over the processes of one service.

Prometheus sums counters over processes and takes windows of them, but what is no sum (an index of
drift, an AUC) has to be computed where the counts of all processes are.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import orjson

Counts = npt.NDArray[np.float64]


class Recent:
    """A sliding window in slices; `add` is for one thread and costs a microsecond."""

    def __init__(
        self,
        name: str,
        window_s: float,
        slice_s: float,
        shared: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`shared` is the folder in which several processes share their counts, if they do."""
        self._window_s, self._slice_s, self._clock = window_s, slice_s, clock
        self._pattern = f"recent-{name}-*.json"
        self._path = shared / f"recent-{name}-{os.getpid()}.json" if shared else None
        self._slices: deque[tuple[float, dict[str, Counts]]] = deque()
        self._begin(clock())

    def add(self, name: str, counts: float | Counts | npt.NDArray[np.int64]) -> None:
        """counts: a number, or an array that has the same shape each time."""
        self._now[name] = np.asarray(self._now.get(name, 0.0) + counts, np.float64)

    def tick(self) -> None:
        """Lets go of what is too old; for every few seconds."""
        now_s = self._clock()
        if now_s - self._slices[-1][0] >= self._slice_s:
            self._begin(now_s)
        while now_s - self._slices[0][0] > self._window_s:
            self._slices.popleft()

    def content(self) -> bytes:
        """What the other processes are to know, for `share`."""
        return orjson.dumps({name: value.tolist() for name, value in self._own().items()})

    def share(self, content: bytes) -> None:
        """Tells the other processes, by a file: not for the event loop."""
        if self._path is not None:
            temporary = self._path.with_suffix(".part")
            temporary.write_bytes(content)
            temporary.replace(self._path)

    def total(self) -> dict[str, Counts]:
        """By name, over all slices and processes; a process that died is soon left out."""
        total = self._own()
        if self._path is not None:
            for path in self._path.parent.glob(self._pattern):
                if path != self._path:
                    _add(total, self._read(path))
        return total

    def close(self) -> None:
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _begin(self, now_s: float) -> None:
        self._now: dict[str, Counts] = {}
        self._slices.append((now_s, self._now))

    def _own(self) -> dict[str, Counts]:
        total: dict[str, Counts] = {}
        for _, counts in self._slices:
            _add(total, counts)
        return total

    def _read(self, path: Path) -> dict[str, Counts]:
        try:
            is_old = time.time() - path.stat().st_mtime > max(30.0, 2 * self._slice_s)
            counts = {} if is_old else orjson.loads(path.read_bytes())
        except OSError:  # its process has just ended
            return {}
        return {name: np.asarray(value, np.float64) for name, value in counts.items()}


def _add(total: dict[str, Counts], counts: dict[str, Counts]) -> None:
    for name, value in counts.items():
        total[name] = total[name] + value if name in total else value
