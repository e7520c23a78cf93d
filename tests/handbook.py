"""The operator's handbook, `docs/operations.md`: its commands, and what they make."""

from __future__ import annotations

import re
import shlex
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml
from commands import commands_in
from manifests import ROOT, kubectl

OPERATIONS = (ROOT / "docs" / "operations.md").read_text()
COMMANDS = [command.replace("\\\n", "") for command in commands_in(OPERATIONS)]


def commands_of(start: str) -> list[str]:
    found = [command for command in COMMANDS if command.startswith(start)]
    assert found, f"docs/operations.md has no command that starts with {start!r}"
    return found


def acl() -> str:
    """The users of the store as the operator's handbook has them."""
    (found,) = re.findall(r"```text\n(user default.*?)```", OPERATIONS, re.DOTALL)
    return str(found)


@cache
def documented_secrets() -> dict[str, set[str]]:
    """Keys by secret, as the commands of the operator's handbook make them."""
    found: dict[str, set[str]] = {}
    with TemporaryDirectory() as folder:
        (Path(folder) / "users.acl").write_text(acl())
        for command in commands_of("kubectl create secret"):
            words = [*shlex.split(command)[1:], "--dry-run=client", "--output=yaml"]
            made = yaml.safe_load(kubectl(*words, folder=Path(folder)))
            found.setdefault(str(made["metadata"]["name"]), set()).update(made["data"])
    return found
