"""asyncio's own loop, woken to the microsecond: timers of epoll, and of uvloop, end on whole
milliseconds, which would be a load test's largest error."""

from __future__ import annotations

import asyncio
import select
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Precise(selectors.EpollSelector):
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout > 0:
            select.select([self.fileno()], [], [], timeout)
        return super().select(0)


def run(main: Coroutine[Any, Any, T]) -> T:
    """What `asyncio.run` does, on the precise loop."""
    with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(_Precise())) as runner:
        return runner.run(main)
