"""Memory does not grow with the days of a run: a part is let go of before the next one is built."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import fields, replace
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from training.actr import load_actr, train_actr
from training.cpm import train_cpm
from training.events import EventLog
from training.examples import Builder, Examples, builder_for
from training.fit import calibration, predict
from training.metrics import measure
from training.parts import Parts, Span, parts_of_days
from training.tpm import Tpm, train_tpm
from training.workspace import Workspace

TESTS = Path(__file__).parent
SPAN = Span(tiny.ASOF - timedelta(days=50), tiny.ASOF - timedelta(days=1))
"""Fifty days; the older ones are from before there is any window."""


def peak_mib(kind: str, parts: int) -> float:
    """Resident peak of a process that fits a network on so many parts."""
    environ = {**os.environ, "PYTHONPATH": f"{TESTS.parent}:{TESTS}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(TESTS / "weigher.py"), kind, str(parts)],
        env=environ,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return float(done.stdout.splitlines()[-1])


def test_twelve_parts_take_the_memory_of_three_unless_they_are_kept() -> None:
    three = peak_mib("parts", 3)
    assert peak_mib("parts", 12) < 1.2 * three
    assert peak_mib("kept", 12) > 1.2 * three


class Watch:
    """How many of what a function returned are still alive whenever it is called again."""

    def __init__(self, watched: Callable[..., Any]) -> None:
        self.alive: list[int] = []
        self._watched = watched
        self._made: list[weakref.ref[Any]] = []

    def __call__(self, *arguments: Any) -> Any:
        self.alive.append(sum(made() is not None for made in self._made))
        made = self._watched(*arguments)
        self._made.append(weakref.ref(made))
        return made


def watch(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> Watch:
    watching = Watch(getattr(owner, name))
    if isinstance(owner, type):
        monkeypatch.setattr(owner, name, lambda *arguments: watching(*arguments))
    else:
        monkeypatch.setattr(owner, name, watching)
    return watching


def copied(workspace: Workspace, tmp_path: Path) -> Workspace:
    return tiny.copy_workspace(workspace, tmp_path / "workspace")


def test_cpm_builds_no_part_while_another_is_there(
    tiny_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = watch(monkeypatch, Builder, "build")
    recipe = tiny.RECIPE
    config = replace(recipe.cpm, days=50, fit=replace(recipe.cpm.fit, part_days=10))
    train_cpm(copied(tiny_workspace, tmp_path), tiny.ASOF, recipe.network, config, seed=0)
    # The newest for its statistics, then all, oldest first.
    assert built.alive == [0] * 6


def test_actr_builds_no_part_while_another_is_there(
    tiny_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = watch(monkeypatch, Builder, "days")
    recipe = tiny.RECIPE
    config = replace(recipe.actr, days=50, fit=replace(recipe.actr.fit, part_days=10, passes=2))
    train_actr(copied(tiny_workspace, tmp_path), tiny.ASOF, recipe.network, config, seed=0)
    assert built.alive == [0] * 11


def test_tpm_reads_no_month_while_another_is_there(
    tiny_log: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = watch(monkeypatch, sys.modules["training.tpm"], "_groups")
    train_tpm(Tpm(tiny_log, tiny.RECIPE.tpm), tiny_log, date(2017, 1, 1), date(2017, 3, 31), 0)
    assert read.alive == [0] * 3 * tiny.RECIPE.tpm.passes


def test_a_run_of_a_month_is_built_once(
    tiny_workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = watch(monkeypatch, Builder, "days")
    recipe = tiny.RECIPE
    config = replace(recipe.actr, days=31, fit=replace(recipe.actr.fit, passes=3))
    train_actr(copied(tiny_workspace, tmp_path), tiny.ASOF, recipe.network, config, seed=0)
    assert len(built.alive) == 1


def ads(workspace: Workspace, log: EventLog, most: int) -> Parts:
    def build(part: Span, builder: Builder) -> Examples:
        return builder.days("ad", part.first, part.last)

    return parts_of_days(workspace, log, SPAN, most, build, with_tpm=True)


def test_parts_are_all_rows_oldest_first_with_windows_of_one_size(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    parts = ads(tiny_workspace, tiny_log, 13)
    assert len(parts) == 4
    whole = builder_for(tiny_workspace, tiny_log, SPAN.first, SPAN.last).days(
        "ad", SPAN.first, SPAN.last
    )
    for name in (f.name for f in fields(Examples) if f.name not in ("sides", "item_windows")):
        if name not in ("side", "item_window_row"):
            joined = np.concatenate([getattr(parts[i], name) for i in range(4)])
            np.testing.assert_array_equal(joined, getattr(whole, name), err_msg=name)
    assert {parts[i].window_dim for i in range(4)} == {tiny.RECIPE.tpm.dim}
    present = [bool(parts[i].item_windows.present.any()) for i in range(4)]
    assert present == [False, True, True, True]


def test_rows_since_a_day_come_from_as_many_parts_as_have_any(
    tiny_workspace: Workspace, tiny_log: EventLog
) -> None:
    parts, whole = (ads(tiny_workspace, tiny_log, most) for most in (10, 50))
    for days in (1, 7, 10, 23, 50):
        day = tiny.ASOF - timedelta(days=days)
        some, all_at_once = parts.since(day), whole.since(day)
        np.testing.assert_array_equal(some.request_id, all_at_once.request_id)
        rows = np.arange(len(some))
        for name, tensor in some.batch(rows).items():
            np.testing.assert_array_equal(tensor, all_at_once.batch(rows)[name], err_msg=name)


@pytest.mark.parametrize(
    ("days", "lengths"), [(1, [1]), (31, [31]), (32, [16, 16]), (64, [22, 21, 21])]
)
def test_days_are_split_into_few_parts_about_as_long(days: int, lengths: list[int]) -> None:
    span = Span(date(2017, 1, 1), date(2017, 1, 1) + timedelta(days=days - 1))
    parts = span.split(31)
    assert [(part.last - part.first).days + 1 for part in parts] == lengths
    assert (parts[0].first, parts[-1].last) == (span.first, span.last)


def test_a_model_of_many_parts_is_calibrated_on_all_days_that_were_asked_for(
    tiny_workspace: Workspace, tiny_log: EventLog, tmp_path: Path
) -> None:
    workspace, recipe = copied(tiny_workspace, tmp_path), tiny.RECIPE
    config = replace(
        recipe.actr, days=50, calibration_days=20, fit=replace(recipe.actr.fit, part_days=10)
    )
    train_actr(workspace, tiny.ASOF, recipe.network, config, seed=0)
    actr = load_actr(workspace, tiny.ASOF, recipe.network)
    recent = ads(workspace, tiny_log, 50).since(tiny.ASOF - timedelta(days=20))
    assert calibration(predict(actr.network, recent), recent) == pytest.approx(actr.offset)


def test_parts_teach_as_well_as_all_rows_at_once(
    tiny_workspace: Workspace, tiny_log: EventLog, tmp_path: Path
) -> None:
    workspace, recipe = copied(tiny_workspace, tmp_path), tiny.RECIPE
    later = builder_for(workspace, tiny_log, tiny.ASOF, tiny.LAST).days("ad", tiny.ASOF, tiny.LAST)
    losses = []
    for part_days in (50, 10):
        config = replace(recipe.actr, days=50, fit=replace(recipe.actr.fit, part_days=part_days))
        train_actr(workspace, tiny.ASOF, recipe.network, config, seed=0)
        actr = load_actr(workspace, tiny.ASOF, recipe.network)
        logit = predict(actr.network, later) + actr.offset
        losses.append(measure(logit, later.label, later.user_row).log_loss)
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
