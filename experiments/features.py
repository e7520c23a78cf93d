"""Feature specs beside a data set's own, for experiments about features."""

from __future__ import annotations

import os
import re
from pathlib import Path

SHORT = "short"
"""Without the counts that reach back further than 30 days."""


def data_with(features: str, data: Path, root: Path) -> Path:
    """A data set folder that is `data` but for its feature spec.

    Raises:
        ValueError: no such spec.
    """
    if features != SHORT:
        raise ValueError(f"features {features!r}: must be {SHORT!r}, or empty for the data's own")
    folder = root / f"data-{features}"
    folder.mkdir(parents=True, exist_ok=True)
    for path in data.iterdir():
        if path.name != "features.toml" and not (folder / path.name).exists():
            (folder / path.name).symlink_to(path.resolve())
    # Others may be reading it.
    temporary = folder / f"features.toml.{os.getpid()}"
    temporary.write_text(_without_long((data / "features.toml").read_text()))
    temporary.replace(folder / "features.toml")
    return folder


def _without_long(spec: str) -> str:
    blocks = re.split(r"(?=^\[\[feature\]\])", spec, flags=re.MULTILINE)
    return "".join(block for block in blocks if _days(block) <= 30)


def _days(block: str) -> int:
    found = re.search(r"\bdays = (\d+)", block)
    return int(found.group(1)) if found else 0
