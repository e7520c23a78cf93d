"""The soak, the flood and the start of a large bundle, in a few seconds: they run, and what they
say is so."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import Exported

from benchmarks import overload, soak, startup
from benchmarks.figures import Figures
from benchmarks.processes import Sampler
from bundle.artifact import open_artifact
from bundle.registry import Registry
from loadtest.report import Event, Latency, PhaseReport, Plan, Second
from loadtest.traffic import Traffic


def met(found: Figures) -> dict[str, bool | None]:
    return {figure.figure: figure.met for figure in found.found}


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """A soak of small requests, at a rate for a machine that does other things as well."""
    monkeypatch.setattr(soak, "CANDIDATES", 8)
    monkeypatch.setattr(soak, "CAPACITY_S", 3.0)
    monkeypatch.setattr(soak, "SHARE", 0.1)


@pytest.mark.usefixtures("short")
def test_a_short_soak_swaps_and_freezes_and_leaves_its_figures_and_a_picture(
    tiny_exported: Exported, tmp_path: Path
) -> None:
    workspace, recipe = tiny_exported.workspace, tiny_exported.recipe
    found = soak.run(workspace, tiny_exported.asof, recipe, tmp_path, seconds=9.0)
    steady, swaps, frozen = json.loads((tmp_path / "soak-report.json").read_text())["phases"]
    assert steady["events"] == []
    assert len(swaps["events"]) in (3, 4)  # the last one at the very end
    assert all(event["ok"] for event in swaps["events"])
    assert ["frozen" in event["text"] for event in frozen["events"]] == [True, False]
    assert len(swaps["models"]) == 2
    assert sum(swaps["models"].values()) == swaps["ok"] > 100
    assert Figures.read(tmp_path / "soak.json").found == found.found
    assert (tmp_path / "soak.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("short")
def test_a_soak_that_is_ended_early_leaves_what_ran_and_no_figures(
    tiny_exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def end_second(plan: Plan, _: Traffic) -> None:
        if plan.name == "swaps":
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(soak, "watch", end_second)
    with pytest.raises(SystemExit, match="ended early"):
        soak.run(
            tiny_exported.workspace, tiny_exported.asof, tiny_exported.recipe, tmp_path, seconds=9.0
        )
    reports = json.loads((tmp_path / "soak-report.json").read_text())["phases"]
    assert [report["complete"] for report in reports] == [True, False]
    assert (tmp_path / "soak.png").is_file()
    assert not (tmp_path / "soak.json").exists()


def phase(
    name: str, failed: dict[str, int] | None = None, ok: bool = True, p99_ms: float = 3.0
) -> PhaseReport:
    failed = failed or {}
    nothing = Latency()
    return PhaseReport(
        plan=Plan(name, 10.0, 5.0, 0, "poisson", True),
        seconds=10.0,
        complete=True,
        due=50,
        sent=50,
        not_sent=0,
        ok=50 - sum(failed.values()),
        ok_per_s=5.0,
        failed=failed,
        unfinished=0,
        late=0,
        degraded=0,
        degraded_by={},
        models={},
        latency_ms=Latency(p99=p99_ms),
        p99_all_ms=p99_ms,
        lag_ms=nothing,
        peak_in_flight=1,
        events=[Event(1.0, "swap", ok)],
        timeline=[],
    )


@pytest.mark.parametrize(
    ("failed", "ok", "p99_ms", "last_mb", "unmet"),
    [
        ({}, True, 3.5, 109, set()),
        ({"http_503": 1}, True, 3.5, 109, {"requests that failed"}),
        ({}, False, 3.5, 109, {"swaps and freezes that failed"}),
        ({}, True, 3.7, 109, {"p99 of swaps to steady"}),
        ({}, True, 3.5, 111, {"growth of memory after it"}),
    ],
)
def test_each_thing_that_must_not_happen_is_seen(
    failed: dict[str, int], ok: bool, p99_ms: float, last_mb: int, unmet: set[str]
) -> None:
    sampler = Sampler(os.getpid())
    sampler.memory = [(5.0, 100_000_000), (25.0, last_mb * 1_000_000)]
    reports = [phase("steady"), phase("swaps", p99_ms=p99_ms), phase("frozen", failed, ok)]
    found = met(soak.figures(reports, sampler, rate=5.0))
    assert {figure for figure, is_met in found.items() if is_met is False} == unmet


def test_a_machine_that_is_slowed_down_is_seen() -> None:
    assert soak.slowness([1.0] * 90 + [1.6] * 10) == 1.6
    assert soak.slowness([1.0] * 99 + [1.6]) == 1.0


def test_a_short_flood_leaves_its_figures(
    tiny_exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overload, "CANDIDATES", 8)
    # Where the machine does other things as well, the capacity that is measured is too low.
    monkeypatch.setattr(overload, "TIMES", 3.0)
    workspace, recipe = tiny_exported.workspace, tiny_exported.recipe
    found = overload.run(workspace, tiny_exported.asof, recipe, tmp_path, seconds=1.5)
    assert Figures.read(tmp_path / "overload.json").found == found.found
    values = {figure.figure: figure.value for figure in found.found}
    assert values["in time at twice the capacity"] > 0
    assert values["turned away at twice the capacity"] > 0.1


@pytest.mark.parametrize(
    ("in_time", "late", "shed", "unmet"),
    [
        (4.6, 0, 30, set()),
        (4.4, 0, 30, {"the same, of what is in time at the capacity"}),
        (4.6, 1, 30, {"not in time, from 2 s after the flood"}),
        (4.6, 0, 15, {"turned away at twice the capacity"}),
    ],
)
def test_a_flood_that_is_not_withstood_is_seen_and_one_that_is_none(
    in_time: float, late: int, shed: int, unmet: set[str]
) -> None:
    before, peak, after = (phase(name) for name in ("before", "peak", "after"))
    flood = replace(phase("flood", {"http_503": shed}), ok_per_s=in_time)
    seconds = [Second(at, 5, 5, ok, {}, 0, {}, 1.0, 1.0, 1.0) for at, ok in ((1, 0), (3, 5 - late))]
    reports = [before, peak, flood, replace(after, timeline=seconds)]
    found = met(overload.figures(reports, most=5.0))
    assert {figure for figure, is_met in found.items() if is_met is False} == unmet


def test_an_hour_is_six_cycles_with_a_swap_a_minute_and_a_freeze_each() -> None:
    phases = soak.phases(100.0, 3600.0, [lambda: None], os.getppid())
    assert [one.name for one in phases] == ["steady", "swaps", "frozen"] * 6
    assert sum(one.seconds for one in phases) == 3600.0
    swap = phases[1].disturbance
    assert isinstance(swap, soak.Swap)
    assert swap.every_s == 60.0


def test_a_bundle_that_is_made_larger_scores_as_before_and_its_pages_are_shared(
    tiny_exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "NUM_STARTS", 1)
    source = open_artifact(tiny_exported.bundle)
    registry = Registry(tmp_path / "registry")
    larger = open_artifact(registry.path(startup.enlarge(source, registry, 1_000_000)))
    assert len(larger.parts) * larger.parts[0].nbytes > 800_000
    keys = source.encoder.items.keys
    for before, after in (
        (source.parts, larger.parts),
        (source.encoder.items.numeric, larger.encoder.items.numeric),
    ):
        places = larger.encoder.items.rows(keys)
        assert np.array_equal(before[source.encoder.items.rows(keys)], after[places])
        assert np.array_equal(before[-1], after[-1])
    found = startup.measure(tiny_exported.workspace.root, tmp_path / "workspace", 1_000_000)
    values = {figure.figure: figure.value for figure in found.found}
    assert values["from the start of the process to scores, 1 worker(s)"] > 0
    in_both, taken = (
        values["pages of the parts in two workers"],
        values["memory that they take"],
    )
    assert in_both > 0
    assert taken < 0.7 * in_both
