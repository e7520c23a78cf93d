"""The serving benchmark, small and without other servers: it runs, and what it says is so."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import bundles
import numpy as np
import pytest
import torch
from conftest import Exported

from benchmarks import serving_peers
from benchmarks.figures import Figures
from benchmarks.peers.conventional import Model
from benchmarks.serving import (
    FLOOR,
    OURS,
    PLAIN,
    QUICK,
    TILED,
    TUNED,
    Differing,
    Found,
    check,
    figures,
    main,
    run,
)
from benchmarks.serving_model import Served, TiledMatch, make
from benchmarks.serving_peers import OTHERS, System, ask, running
from training.demo import running_redis
from training.layers import HardMatch

SIZE = replace(QUICK, candidates=(3, 12), closed_s=0.2, open_s=0.4, own_open_s=0.4)
DOCS = Path(__file__).parent.parent / "docs"
GRAPHS = ("shared", "tiled")


@pytest.fixture(scope="module")
def served(tiny_exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("bench-serving")
    sizes = dict.fromkeys(SIZE.candidates, SIZE.bodies)
    with running_redis() as store:
        workspace, recipe = tiny_exported.workspace, tiny_exported.recipe
        yield make(workspace, tiny_exported.asof, recipe, folder, store, sizes)


@contextmanager
def this_service(served: Served) -> Iterator[int]:
    with running(OURS, served, min(os.sched_getaffinity(0))) as port:
        yield port


def conventional_scores(served: Served, graph: str) -> list[list[float]]:
    model = Model(served.folder, graph)
    bodies = served.bodies[max(SIZE.candidates)]
    with model.blocking_client() as client:
        return [model.scores(body, client.mget(model.keys(body))).tolist() for body in bodies]


def test_the_quick_run_leaves_its_figures(
    tiny_exported: Exported, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace, recipe = tiny_exported.workspace, tiny_exported.recipe
    before = os.sched_getaffinity(0)
    found = run(workspace, tiny_exported.asof, recipe, tmp_path, SIZE, others=())
    entries = json.loads((tmp_path / "serving.json").read_text())
    values = {entry["figure"]: entry["value"] for entry in entries}
    assert [figure.figure for figure in found.found] == list(values)
    assert all(value > 0 for name, value in values.items() if name.startswith("requests"))
    for num in SIZE.candidates:
        assert values[f"requests per second, N = {num}, {OURS.name}"] > 0
        assert values[f"p50, N = {num}, half of the maximum, {OURS.name}"] > 0
    assert values["time of a request, N = 12, decode"] > 0
    assert values["time of a request, N = 12, total (Server-Timing)"] > 0
    assert values["time of a request, N = 12, HTTP (client's wait beyond total)"] > 0
    assert os.sched_getaffinity(0) == before
    assert "requests/s" in capsys.readouterr().err


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_conventional_graph_gives_the_scores_of_the_service(served: Served, graph: str) -> None:
    with this_service(served) as port:
        expected = [ask(port, OURS.content(b)) for b in served.bodies[max(SIZE.candidates)]]
    found = conventional_scores(served, graph)
    assert np.abs(np.subtract(found, expected)).max() < 1e-5
    assert np.ptp(expected) > 1e-5


def test_windows_and_histories_matter_to_the_scores(served: Served) -> None:
    """So equal scores say that both were looked up and matched."""
    model, body = Model(served.folder, "shared"), served.bodies[max(SIZE.candidates)][0]
    with model.blocking_client() as client:
        found = client.mget(model.keys(body))
    whole = model.scores(body, found)
    assert np.abs(model.scores(body, [None] * len(found)) - whole).max() > 1e-5
    nothing = {"items": [], "age_days": [], "count": []}
    without = {**body, "user": {**body["user"], "history": nothing}}
    assert np.abs(model.scores(without, found) - whole).max() > 1e-5


def test_scores_that_differ_end_the_run(served: Served) -> None:
    num = min(SIZE.candidates)
    with this_service(served) as port:
        right = [ask(port, OURS.content(body)) for body in served.bodies[num][: SIZE.checked]]
        check(OURS, port, served, SIZE, {num: right})
        wrong = [[score + 1e-4 for score in scores] for scores in right]
        with pytest.raises(Differing, match=f"{OURS.name}: a score of {num} candidates is off"):
            check(OURS, port, served, SIZE, {num: wrong})


def test_a_server_that_does_not_start_is_named_with_its_log(served: Served) -> None:
    broken = System("broken", command=(sys.executable, "-c", "raise SystemExit('no such thing')"))
    with (
        pytest.raises(RuntimeError, match=r"(?s)broken gave no scores.*no such thing"),
        running(broken, served, min(os.sched_getaffinity(0))),
    ):
        pass


def test_a_process_without_http_that_has_ended_is_told(served: Served) -> None:
    with serving_peers.floor(served, min(os.sched_getaffinity(0))) as without_http:
        assert without_http("rate", min(SIZE.candidates), 2, 0.2) > 0
        with pytest.raises(RuntimeError, match="without HTTP has ended"):
            without_http("no such thing", min(SIZE.candidates))


def test_matching_row_by_row_is_the_same_as_matching_once() -> None:
    random = torch.Generator().manual_seed(0)
    num, steps, columns = 7, 20, [2, 0]
    item = torch.randint(0, 9, (1, steps), generator=random)
    cat = torch.randint(0, 4, (1, steps, 2), generator=random)
    numbers = torch.rand((1, steps, 2), generator=random) * 40
    key = torch.randint(1, 9, (num,), generator=random)
    item_cat = torch.randint(0, 4, (num, 3), generator=random)
    once = HardMatch(columns)(item, cat, numbers, key, item_cat)
    rows = [one.expand(num, *one.shape[1:]) for one in (item, cat, numbers)]
    assert torch.allclose(TiledMatch(columns)(*rows, key, item_cat), once, atol=1e-6)


def test_each_ad_is_an_object_for_the_plain_server_with_the_same_content() -> None:
    (plain,) = (system for system in OTHERS if system.name == PLAIN)
    body = bundles.body(2)
    body["candidates"] = {"id": [7, 8], "features": {"price": [1.5, None]}}
    ads = json.loads(plain.content(body))["candidates"]
    assert ads == [
        {"id": 7, "features": {"price": 1.5}},
        {"id": 8, "features": {"price": None}},
    ]


def found_of(ours: float, others: dict[str, float], speeds: Sequence[float] = (1.0,)) -> Found:
    """Pairs on a machine of one speed after the other."""
    num = max(SIZE.candidates)
    return Found(
        pairs={
            (name, n): [(rate * speed, ours * speed) for speed in speeds]
            for name, rate in {FLOOR: 100.0, **others}.items()
            for n in SIZE.candidates
        },
        parts_ms={"decode": 1.0},
        latency={
            (OURS.name, num, "half"): (1.0, 2.6, 2.0),
            (OURS.name, num, "a tenth"): (1.0, 1.7, 1.0),
        },
    )


def test_a_ratio_is_of_two_figures_of_one_pair_and_the_median_of_them() -> None:
    """A machine of half the speed moves no ratio."""
    each = {TUNED: 40.0, TILED: 30.0, PLAIN: 10.0}
    found = {f.figure: f for f in figures(found_of(90.0, each, (1.0, 0.5, 0.5)), SIZE).found}
    num = max(SIZE.candidates)
    ratio = found[f"{OURS.name} to {TUNED}, N = {num}"]
    assert (ratio.value, ratio.met) == (2.25, True)
    assert found[f"{OURS.name} to {TILED}, N = {num}"].met is False
    assert found[f"{OURS.name} to {PLAIN}, N = {num}"].met is True
    assert found[f"requests per second, N = {num}, {OURS.name}"].value == 45.0
    floor = found[f"{OURS.name} to its floor, N = {num}"]
    assert (floor.value, floor.met) == (0.9, True)
    assert found[f"requests per second, N = {num}, {FLOOR}"].value == 50.0
    assert found[f"{OURS.name} to {TUNED}, N = {min(SIZE.candidates)}"].met is None


def test_a_floor_that_was_beaten_is_counted_as_a_disturbance() -> None:
    said = "times that the floor was beaten, so disturbed"
    for rate, times, met in ((104.0, 0, True), (110.0, len(SIZE.candidates), False)):
        found = {f.figure: f for f in figures(found_of(rate, {}), SIZE).found}
        assert (found[said].value, found[said].met) == (times, met)


def test_latency_is_judged_beside_an_ideal_queue_and_beside_its_median() -> None:
    found = {f.figure: f for f in figures(found_of(89.0, {}), SIZE).found}
    assert found[f"{OURS.name} to its floor, N = {max(SIZE.candidates)}"].met is False
    num = max(SIZE.candidates)
    half = found[f"p99 to an ideal queue, N = {num}, half of the maximum, {OURS.name}"]
    assert (half.value, half.goal, half.met) == (1.3, "<= 1.3", True)
    tenth = found[f"p99 to p50, N = {num}, a tenth of the maximum, {OURS.name}"]
    assert (tenth.value, tenth.goal, tenth.met) == (1.7, "<= 1.6", False)


def test_a_workspace_without_a_model_is_said_to_need_the_demo(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no A-CTR; make demo trains one"):
        main(["--quick", "--bundle-from", str(tmp_path)])


def test_servers_that_are_not_installed_are_named_before_anything_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving_peers, "PEERS", tmp_path)
    installed = tmp_path / "fastapi" / "ready"
    installed.parent.mkdir()
    installed.touch()
    with pytest.raises(SystemExit, match=": LitServe, BentoML, Ray Serve, mosec; make"):
        main(["--bundle-from", str(tmp_path)])


def test_every_server_has_its_script_and_what_it_needs_pinned() -> None:
    for system in OTHERS:
        assert (serving_peers.SCRIPTS / f"{system.environment}.txt").is_file()


def test_the_page_has_the_table_of_the_stored_result() -> None:
    stored = DOCS / "results" / "bench-serving.json"
    if not stored.is_file():
        pytest.skip("docs/results/bench-serving.json is not there yet")
    assert str(Figures.read(stored)) in (DOCS / "benchmarks-serving.md").read_text()
