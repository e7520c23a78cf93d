"""The README's commands do what it says: each is taken from its text and run."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from commands import commands_in
from conftest import Exported

import ecdctr

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = commands_in(README)


def commands(start: str) -> list[str]:
    found = [command for command in COMMANDS if command.startswith(start)]
    assert found, f"the README has no command that starts with {start!r}"
    return found


@pytest.mark.parametrize("command", commands("make "))
def test_every_make_target_of_the_readme_exists(command: str) -> None:
    done = subprocess.run(["make", "--dry-run", *shlex.split(command)[1:]], cwd=ROOT, check=False)
    assert done.returncode == 0


@pytest.mark.parametrize("command", [*commands("ecdctr "), *commands(".venv/bin/ecdctr ")])
def test_every_ecdctr_command_of_the_readme_parses(command: str) -> None:
    ecdctr.parser().parse_args(shlex.split(command)[1:])


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_readmes_curl_commands_work_as_printed(
    journey_exported: Exported, journey_url: str, tmp_path: Path
) -> None:
    page = tmp_path / "build" / "page.json"
    arguments = shlex.split(commands(".venv/bin/ecdctr score")[0])[1:]
    day = str(journey_exported.asof)
    changed = {"build/page.json": str(page), "2017-11-01": day}
    workspace = ["--workspace", str(journey_exported.workspace.root)]
    ecdctr.main([*workspace, *(changed.get(word, word) for word in arguments)])
    for command in commands("curl "):
        here = command.replace("http://127.0.0.1:8000", journey_url)
        done = subprocess.run(
            here, shell=True, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert re.match(r'\{"model":"[^"]+","scores":\[0\.\d+', done.stdout), done.stdout
