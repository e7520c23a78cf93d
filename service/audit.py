"""Keeps some requests with their scores, as JSON lines: for audits, for replay, for training.

Written by a thread. The bytes in a folder are bounded, and so is what waits: a disk that is slow or
full costs lines, never answers.
"""

from __future__ import annotations

import logging
import os
import random
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

import numpy as np
import orjson

from service.scorer import Scored

log = logging.getLogger(__name__)

SUFFIX = ".jsonl"
PART = ".part"
"""Of the file that is being written; it is renamed once it is complete."""
QUEUE_BYTES = 16_000_000
FILE_S = 300.0
"""Longest time until what was written has its final name."""
_NUM_FILES = 16
"""Files that share the folder's bytes: the oldest is removed as a whole."""


@dataclass(frozen=True)
class Entry:
    """One scored request. body: the JSON as it came."""

    time_s: float
    request_id: str
    body: bytes
    scored: Scored

    @property
    def size_bytes(self) -> int:
        return len(self.body) + self.scored.scores.nbytes

    def line(self) -> bytes:
        """The entry as one line of JSON."""
        return orjson.dumps(
            {
                "time": datetime.fromtimestamp(self.time_s, UTC).isoformat(),
                "request_id": self.request_id,
                "model": self.scored.model,
                # Parsed and written anew: a body may be spread over lines.
                "request": orjson.loads(self.body),
                "scores": self.scored.scores.astype(np.float64),
                "degraded": self.scored.degraded,
                "missing": self.scored.missing,
            },
            option=orjson.OPT_SERIALIZE_NUMPY | orjson.OPT_APPEND_NEWLINE,
        )


class Audit:
    """Owns the thread and its file. `count` is called with "written" or "dropped", from the thread
    too. A process may go beyond the folder's limit by one file, a sixteenth of it."""

    def __init__(
        self,
        folder: Path,
        sample: float,
        limit_bytes: int,
        count: Callable[[str], None],
        queue_bytes: int = QUEUE_BYTES,
    ) -> None:
        """sample: share of requests, 0 .. 1. limit_bytes: of all files in the folder together.
        queue_bytes: most that waits to be written."""
        self._folder, self._sample, self._count = folder, sample, count
        self._limit_bytes, self._file_bytes = limit_bytes, limit_bytes // _NUM_FILES
        self._waiting: deque[Entry] = deque()
        self._waiting_bytes, self._queue_bytes = 0, queue_bytes
        self._changed = threading.Condition()
        self._closing = False
        self._file: BinaryIO | None = None
        self._file_since_s = 0.0
        self._thread = threading.Thread(target=self._write_all, name="audit", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def offer(self, request_id: str, body: bytes, scored: Scored) -> None:
        """Takes the request if the sample wants it and there is room; never waits for a disk."""
        if random.random() >= self._sample:
            return
        entry = Entry(time.time(), request_id, body, scored)
        with self._changed:
            fits = self._waiting_bytes + entry.size_bytes <= self._queue_bytes
            if fits:
                self._waiting.append(entry)
                self._waiting_bytes += entry.size_bytes
                self._changed.notify()
        if not fits:
            self._count("dropped")

    def close(self, timeout_s: float = 5.0) -> None:
        """Writes what waits, for `timeout_s` at most."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(timeout_s)

    def _write_all(self) -> None:
        while True:
            entry = self._next()
            is_last = entry is None and self._closing
            try:
                if entry is not None:
                    self._write(entry)
                if self._file is not None and (is_last or self._is_due()):
                    self._finish()
            except OSError as error:
                log.error("the audit log can't be written: %s", error)
                self._count("dropped")
                self._give_up_file()
            if is_last:
                return

    def _next(self) -> Entry | None:
        """The next entry; None when there is none for a second, or at the end."""
        with self._changed:
            if not self._waiting and not self._closing:
                self._changed.wait(timeout=1.0)
            if not self._waiting:
                return None
            entry = self._waiting.popleft()
            self._waiting_bytes -= entry.size_bytes
            return entry

    def _write(self, entry: Entry) -> None:
        line = entry.line()
        if self._file is None:
            self._file = self._open()
        self._file.write(line)
        self._count("written")

    def _open(self) -> BinaryIO:
        self._make_room()
        self._file_since_s = time.monotonic()
        name = f"audit-{time.time_ns()}-{os.getpid()}{SUFFIX}{PART}"
        return (self._folder / name).open("xb")

    def _is_due(self) -> bool:
        assert self._file is not None
        is_old = time.monotonic() - self._file_since_s >= FILE_S
        return is_old or self._file.tell() >= self._file_bytes

    def _finish(self) -> None:
        assert self._file is not None
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        path, self._file = Path(self._file.name), None
        path.rename(path.with_suffix(""))

    def _give_up_file(self) -> None:
        """What is in it keeps its temporary name, and goes when room is made."""
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):
                file.close()

    def _make_room(self) -> None:
        """Removes the oldest files, of this and of other processes, until one more fits."""
        files = sorted(self._folder.glob(f"audit-*{SUFFIX}*"))
        sizes = [_size_bytes(path) for path in files]
        surplus_bytes = sum(sizes) + self._file_bytes - self._limit_bytes
        for path, size_bytes in zip(files, sizes, strict=True):
            if surplus_bytes <= 0:
                break
            path.unlink(missing_ok=True)
            surplus_bytes -= size_bytes


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:  # another process removed it
        return 0
