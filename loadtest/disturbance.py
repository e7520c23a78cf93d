"""What is done to the service while it is under load: models swapped, a process stopped."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import cycle
from typing import Protocol

COMMAND_TIMEOUT_S = 60.0

Note = Callable[[str, bool], None]
"""Takes what happened, and whether it went well."""


class Disturbance(Protocol):
    async def run(self, note: Note, over: asyncio.Event) -> None:
        """Disturbs until `over`; leaves nothing behind, also when it is cancelled."""


@dataclass(frozen=True)
class Swap:
    """Does one action after the other, over and over, one every `every_s`."""

    actions: Sequence[str | Callable[[], object]]
    """Command lines (no shell), or functions, which are called in a thread."""
    every_s: float

    def __post_init__(self) -> None:
        if not self.actions or not self.every_s > 0:
            raise ValueError(
                f"{len(self.actions)} actions every {self.every_s} s; it takes at least one"
                " --swap-command, and --swap-every-s above 0"
            )

    async def run(self, note: Note, over: asyncio.Event) -> None:
        for action in cycle(self.actions):
            if await _is_set_within(over, self.every_s):
                return
            if isinstance(action, str):
                await _run_command(action, note)
            else:
                await _call(action, note)


@dataclass(frozen=True)
class Freeze:
    """Stops a process after a while, as a hung machine would be, and lets it go on later."""

    pid: int
    after_s: float
    seconds: float

    def __post_init__(self) -> None:
        # 0, 1 and negative ids would stop whole groups of processes.
        if self.pid <= 1 or self.pid == os.getpid():
            raise ValueError(f"--freeze-pid {self.pid} must be the id of another process, above 1")
        with _missing_is_an_error(self.pid):
            os.kill(self.pid, 0)

    async def run(self, note: Note, over: asyncio.Event) -> None:
        if await _is_set_within(over, self.after_s):
            return
        try:
            with frozen(self.pid):
                note(f"process {self.pid} frozen", True)
                await _is_set_within(over, self.seconds)
            note(f"process {self.pid} thawed", True)
        except ValueError as error:
            note(str(error), False)


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    """SIGSTOP now, SIGCONT at the end of the block, and even where this process is killed in it.

    Raises:
        ValueError: there is no such process.
    """
    # Ends when our end of its input closes, however that comes about. In a session of its own:
    # Ctrl-C at a terminal must not end it before.
    command = ["/bin/sh", "-c", f"read _; kill -CONT {pid}"]
    guard = subprocess.Popen(
        command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        with _missing_is_an_error(pid):
            os.kill(pid, signal.SIGSTOP)
        yield
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
        guard.communicate(timeout=COMMAND_TIMEOUT_S)


@contextmanager
def _missing_is_an_error(pid: int) -> Iterator[None]:
    try:
        yield
    except ProcessLookupError:
        raise ValueError(f"there is no process {pid} to freeze") from None


async def _is_set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()


async def _call(action: Callable[[], object], note: Note) -> None:
    name = getattr(action, "__name__", repr(action))
    try:
        await asyncio.to_thread(action)
    except Exception as error:
        note(f"{name}: {error}", False)
    else:
        note(name, True)


async def _run_command(line: str, note: Note) -> None:
    try:
        process = await asyncio.create_subprocess_exec(
            *shlex.split(line),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C must not leave it half done
        )
    except OSError as error:
        note(f"{line}: {error}", False)
        return
    try:
        output, _ = await asyncio.wait_for(process.communicate(), COMMAND_TIMEOUT_S)
        last = output.decode(errors="replace").strip().rpartition("\n")[2]
        note(line if process.returncode == 0 else f"{line}: {last}", process.returncode == 0)
    except TimeoutError:
        note(f"{line}: not done after {COMMAND_TIMEOUT_S:.0f} s", False)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
