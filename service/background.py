"""Work beside the requests: in a thread of its own, to which the processor is given when the event
loop leaves it. A machine with a core for each worker has no other for what a new bundle takes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from bundle.registry import RegistryUnavailable

_P = ParamSpec("_P")
_T = TypeVar("_T")

NICENESS = 10
"""A tenth of the event loop's weight. Not less: a thread that holds the interpreter's lock and does
not get to run keeps the event loop waiting too."""


async def answer_of(function: Callable[[], _T], seconds: float = 5.0) -> _T | None:
    """What the function returns in a thread; None where the registry that it asks gives no answer,
    or none so soon."""
    try:
        return await asyncio.wait_for(asyncio.to_thread(function), seconds)
    except (RegistryUnavailable, TimeoutError):
        return None


async def in_background(function: Callable[_P, _T], *arguments: _P.args, **named: _P.kwargs) -> _T:
    """What the function returns or raises."""

    def run() -> _T:
        _step_back(threading.get_native_id())
        return function(*arguments, **named)

    pool = ThreadPoolExecutor(1, "background")
    try:
        return await asyncio.get_running_loop().run_in_executor(pool, run)
    finally:
        pool.shutdown(wait=False)  # who is cancelled doesn't wait


def download_in_background() -> None:
    """From now on the thread in which fsspec waits for object stores steps back too."""
    from fsspec.asyn import get_loop, iothread

    get_loop()
    if iothread[0] is not None and iothread[0].native_id is not None:
        _step_back(iothread[0].native_id)


def _step_back(thread: int) -> None:
    # On Linux a thread has a niceness of its own.
    own = os.getpriority(os.PRIO_PROCESS, os.getpid())
    os.setpriority(os.PRIO_PROCESS, thread, own + NICENESS)
