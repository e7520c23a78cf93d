"""A clock that counts only while this process is let run.

A machine that is shared may keep a process from running for a second, or a collection of garbage
may, and then a lookup that kept its deadline looks as if it had not. What blocks only the thread
of the test (a wait without a deadline, the fault to be found) does not stop this clock.
"""

from __future__ import annotations

import threading
import time

_TICK_S, _LONGEST_TICK_S = 0.005, 0.05


class _RunClock:
    def __init__(self) -> None:
        self._last = (0.0, time.monotonic())
        threading.Thread(target=self._tick, daemon=True).start()

    def now_s(self) -> float:
        return self._at(time.monotonic())

    def _at(self, monotonic_s: float) -> float:
        run_s, ticked_s = self._last
        return run_s + min(monotonic_s - ticked_s, _LONGEST_TICK_S)

    def _tick(self) -> None:
        while True:
            time.sleep(_TICK_S)
            monotonic_s = time.monotonic()
            self._last = (self._at(monotonic_s), monotonic_s)


_clock = _RunClock()


def run_s() -> float:
    """Seconds that this process has run since some moment; never goes back."""
    return _clock.now_s()
