"""Runs the command line as its users do, in this process or in one of its own."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import ecdctr

ROOT = Path(__file__).parent.parent
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import ecdctr
ecdctr.main(sys.argv[1:])
"""
"""Runs the command line on a machine that lacks some libraries."""


def commands_in(text: str) -> list[str]:
    """The commands in the console blocks of a document, each with what it prints, if that stands
    there, and without its prompt."""
    return [
        block.removeprefix("$ ").strip()
        for fence in re.findall(r"```console\n(.*?)```", text, re.DOTALL)
        for block in re.split(r"\n(?=\$ )", fence)
    ]


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def run_process(command: list[str], *arguments: str) -> Ran:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
    done = subprocess.run(
        [sys.executable, *command, *arguments],
        capture_output=True,
        text=True,
        env=environ,
        timeout=120,
        check=False,
    )
    return Ran(done.returncode, done.stdout, done.stderr)


class Run:
    """Runs a verb in this process, which spares the import of torch each time."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Ran:
        code, message = 0, ""
        try:
            ecdctr.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            # What the interpreter does with it: a text goes to stderr, and the code is 1.
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
            message = f"{stop.code}\n" if isinstance(stop.code, str) else ""
        captured = self._capsys.readouterr()
        return Ran(code, captured.out, captured.err + message)

    def refused(self, *arguments: object) -> str:
        """The one line that a verb says before it exits with 1."""
        found = self(*arguments)
        assert (found.code, found.out) == (1, ""), found
        # A progress bar may have been begun.
        (said,) = [line for line in re.split(r"[\r\n]+", found.err) if line and "%|" not in line]
        assert said.startswith("ecdctr: ")
        return said
