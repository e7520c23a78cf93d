"""As many workers as there are processors, of which a container may see more than it may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from service.processors import processors


@pytest.fixture(autouse=True)
def eight_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))


def groups(root: Path, own: str, limits: dict[str, str]) -> tuple[Path, Path]:
    """The folder of all groups, and the file that says in which one the process is."""
    for group, limit in limits.items():
        (root / "groups" / group).mkdir(parents=True, exist_ok=True)
        (root / "groups" / group / "cpu.max").write_text(limit)
    (root / "own").write_text(own)
    return root / "groups", root / "own"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("max 100000\n", 8),
        ("300000 100000\n", 3),
        ("250000 100000\n", 2),
        ("50000 100000\n", 1),
        ("1600000 100000\n", 8),
        ("", 8),
        ("many 100000", 8),
    ],
)
def test_the_quota_of_the_group_limits_them(tmp_path: Path, limit: str, expected: int) -> None:
    assert processors(*groups(tmp_path, "0::/\n", {".": limit})) == expected


def test_the_groups_above_limit_them_too(tmp_path: Path) -> None:
    limits = {"pods": "200000 100000", "pods/one": "max 100000", "other": "100000 100000"}
    assert processors(*groups(tmp_path, "0::/pods/one\n", limits)) == 2


@pytest.mark.parametrize("own", ["", "12:cpu,cpuacct:/pods\n", "0::/gone\n"])
def test_without_a_group_of_version_2_there_are_as_many_as_it_may_run_on(
    tmp_path: Path, own: str
) -> None:
    assert processors(*groups(tmp_path, own, {"pods": "100000 100000"})) == 8


def test_where_nothing_is_mounted_there_are_as_many_as_it_may_run_on(tmp_path: Path) -> None:
    assert processors(tmp_path / "nowhere", tmp_path / "nothing") == 8
