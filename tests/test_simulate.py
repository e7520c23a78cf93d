"""The replay: each day scored by what was live, before anything has learned from it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

import killer
import numpy as np
import pytest
import tiny
from conftest import ROOT
from scipy.special import logit

import training.export
from experiments.replay import replay_page
from training import simulate
from training.actr import load_actr
from training.client import Answers
from training.examples import builder_for
from training.fit import predict
from training.metrics import measure
from training.simulate import (
    Line,
    read_lines,
    run_simulation,
    score_day,
    scores_path,
    summary,
    weekly_pcoc,
)
from training.workspace import Workspace, WorkspaceError

FIRST, LAST = date(2017, 3, 30), date(2017, 3, 31)
ONE_DAY = timedelta(days=1)


@dataclass(frozen=True)
class Replayed:
    workspace: Workspace
    out: Path
    lines: list[Line]


def replay(workspace: Workspace, out: Path, last: date = LAST, **options: object) -> list[Line]:
    return run_simulation(
        workspace,
        FIRST,
        last,
        tiny.RECIPE,
        killer.SCHEDULE,
        out,
        **options,  # type: ignore[arg-type]
    )


@pytest.fixture(scope="module")
def replayed(tmp_path_factory: pytest.TempPathFactory, tiny_data: Path) -> Iterator[Replayed]:
    """Two days of the tiny data set from nothing, with a service that follows."""
    original = killer.remember_graphs(tmp_path_factory.getbasetemp() / "graphs")
    root = tmp_path_factory.mktemp("replayed")
    (root / "data").symlink_to(tiny_data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("ECDCTR_POLL_S", "0.1")
        lines = replay(Workspace(root), root / "days.jsonl", serve=True)
    yield Replayed(Workspace(root), root / "days.jsonl", lines)
    training.export.export_graph = original


@pytest.fixture
def copy(replayed: Replayed, tmp_path: Path) -> Replayed:
    shutil.copytree(replayed.workspace.root, tmp_path / "copy", symlinks=True)
    return Replayed(Workspace(tmp_path / "copy"), tmp_path / "copy" / "days.jsonl", replayed.lines)


def test_a_day_is_a_line_that_says_what_was_done(replayed: Replayed) -> None:
    first, second = replayed.lines
    assert (first["date"], second["date"]) == ("2017-03-30", "2017-03-31")
    assert set(first["trained"]) == {"tpm", "cpm", "actr"}
    assert second["trained"]["actr"]["first"] == "2017-03-16"
    assert second["trained"]["actr"]["last"] == "2017-03-29"
    assert set(second["trained"]) == {"actr"}
    assert first["window"] == "2017-02"
    assert all(line["promoted"] and line["live"] == line["bundle_id"] for line in replayed.lines)
    assert [json.loads(line) for line in replayed.out.read_text().splitlines()] == replayed.lines


def test_what_scores_a_day_has_learned_from_earlier_days_alone(replayed: Replayed) -> None:
    for line in replayed.lines:
        manifest = replayed.workspace.registry.read(line["live"])
        assert manifest.lineage.actr_to < line["date"]
        assert manifest.lineage.cpm_to < line["date"]
        assert max(manifest.lineage.tpm_months) < line["date"][:7]


def test_scores_are_those_of_the_model_on_all_candidates(replayed: Replayed) -> None:
    """Through torch and the examples, instead of through requests and the graph."""
    workspace, log = replayed.workspace, replayed.workspace.log()
    for line in replayed.lines:
        day = date.fromisoformat(line["date"])
        actr = load_actr(workspace, day, tiny.RECIPE.network)
        examples = builder_for(workspace, log, day, day).build(log.full_lists([day]))
        expected = predict(actr.network, examples) + actr.offset
        kept = np.load(scores_path(replayed.out, day))
        np.testing.assert_allclose(kept["logit"], expected, atol=1e-4)
        np.testing.assert_array_equal(kept["label"], examples.label)
        np.testing.assert_array_equal(kept["user_row"], examples.user_row)
        assert line["gauc"] == pytest.approx(
            measure(expected, examples.label, examples.user_row).gauc
        )
        assert line["rows"] == len(examples)
        assert line["expected"] == pytest.approx(line["pcoc"] * line["positives"])


def test_the_service_follows_and_gives_the_same_scores(replayed: Replayed) -> None:
    for line in replayed.lines:
        assert line["served"]["requests"] > 5
        assert 0 <= line["served"]["worst"] <= 1e-5
        assert "error" not in line["served"]


def test_a_service_that_scores_otherwise_is_in_the_line(
    replayed: Replayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = replayed.lines[-1]["live"]
    scored = score_day(replayed.workspace, live, LAST, 3)
    assert scored
    answers = Answers([scores + 2e-5 for scores in scored.scores], np.ones(3), {})
    monkeypatch.setattr(simulate, "score_over_http", lambda url, requests: answers)
    monkeypatch.setattr(simulate, "_wait_for", lambda url, bundle_id: None)
    found = simulate._served("http://there", live, scored)
    assert found["worst"] == pytest.approx(2e-5)
    assert found["error"] == "scores over HTTP differ by 2.0e-05, at most 1e-05 is right"


def test_a_service_that_is_away_is_in_the_line(replayed: Replayed) -> None:
    scored = score_day(replayed.workspace, replayed.lines[-1]["live"], LAST, 3)
    assert scored
    found = simulate._served("http://127.0.0.1:9", "2017-03-31-x", scored)
    assert found["requests"] == 0
    assert "refused" in found["error"]


def test_only_the_first_requests_are_scored_where_that_is_asked(replayed: Replayed) -> None:
    live = replayed.lines[-1]["live"]
    few = score_day(replayed.workspace, live, LAST, 3)
    every = score_day(replayed.workspace, live, LAST, None)
    assert few
    assert every
    assert len(few.requests) == 3 < len(every.requests)
    assert len(few.label) == sum(len(scores) for scores in few.scores)


def test_an_older_bundle_scores_where_it_is_live(replayed: Replayed) -> None:
    one, other = (
        score_day(replayed.workspace, line["live"], LAST, None) for line in replayed.lines
    )
    assert one
    assert other
    assert not np.allclose(logit(np.concatenate(one.scores)), logit(np.concatenate(other.scores)))


def test_days_that_are_done_are_not_replayed(copy: Replayed) -> None:
    before = killer.content(copy.workspace.root)
    assert replay(copy.workspace, copy.out) == copy.lines
    assert killer.content(copy.workspace.root) == before


def test_half_a_line_is_dropped_and_its_day_replayed(copy: Replayed) -> None:
    """The update of that day is done already, and stays as it is."""
    text = copy.out.read_text()
    copy.out.write_text(text[: text.rindex('"gauc"')])
    assert [line["date"] for line in read_lines(copy.out)] == ["2017-03-30"]
    second = replay(copy.workspace, copy.out)[1]
    assert second["trained"] == {}
    for name in ("date", "live", "bundle_id", "gauc", "log_loss", "expected", "positives"):
        assert second[name] == copy.lines[1][name]


def test_a_day_before_what_is_live_can_not_be_replayed(copy: Replayed) -> None:
    copy.out.unlink()
    with pytest.raises(WorkspaceError, match=r"2017-03-31.* is live, .* use another workspace"):
        replay(copy.workspace, copy.out)


def test_a_day_without_requests_has_no_scores(replayed: Replayed) -> None:
    later = tiny.LAST + 30 * ONE_DAY
    log = replayed.workspace.log()
    assert log.full_lists([LAST]).height > 0
    workspace = Workspace(replayed.workspace.root)
    workspace.cache = simulate.DayCache(simulate.TolerantLog(log.root, {later}), later + ONE_DAY)
    assert score_day(workspace, replayed.lines[-1]["live"], later, None) is None


def test_the_summary_is_measured_on_all_days_together(replayed: Replayed) -> None:
    text = summary(replayed.lines, replayed.out).splitlines()
    days = [np.load(scores_path(replayed.out, line["date"])) for line in replayed.lines]
    logits, label, user = (
        np.concatenate([day[n] for day in days]) for n in ("logit", "label", "user_row")
    )
    metrics = measure(logits.astype(np.float64), label.astype(np.float32), user.astype(np.int64))
    words = text[-3].split()
    assert words == [
        "all",
        f"{metrics.gauc:.4f}",
        f"{metrics.auc:.4f}",
        f"{metrics.log_loss:.6f}",
        f"{metrics.pcoc:.3f}",
        "2",
        f"{metrics.positives}",
    ]
    assert text[1].split()[0] == "2017-03"
    assert text[-1] == "trained: 1 tpm, 1 cpm, 2 actr; 0 bundles refused"


def test_the_page_shows_every_day_what_was_trained_and_what_was_refused(
    replayed: Replayed,
) -> None:
    lines = [{**line} for line in replayed.lines]
    lines[1] |= {"refused": ["gauc: <.01 below"], "trained": {}}
    text = replay_page(lines, summary(lines, replayed.out), "ecdctr simulate")
    assert text.count("<svg") == 1
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    assert [row.count("<td>") for row in rows] == [0, 8, 8]
    assert "<td>tpm, cpm, actr</td>" in rows[1]
    for line, row in zip(lines, rows[1:], strict=True):
        for name, form in (("gauc", ".4f"), ("log_loss", ".6f"), ("pcoc", ".3f")):
            assert f"<td>{line[name]:{form}}</td>" in row
    assert "gauc: &lt;.01 below" in rows[2]
    assert re.findall(r"""(?:src|href)=["'](?!#)""", text) == []


def test_the_page_of_days_that_have_no_scores_has_no_picture() -> None:
    line = {"date": "2017-12-25", "trained": {}, "refused": [], "notes": [], "live": None}
    assert "<svg" not in replay_page([line], "", "")
    assert "no day" in replay_page([], "", "")


def test_the_summary_of_nothing_is_no_error(tmp_path: Path) -> None:
    assert summary([], tmp_path / "out").splitlines()[-1].startswith("trained: 0 tpm")


def test_weekly_pcoc_is_that_of_the_worst_and_the_best_seven_days() -> None:
    rng = np.random.default_rng(0)
    lines: list[Line] = [
        {"expected": float(e), "positives": int(p)}
        for e, p in zip(rng.uniform(5, 15, 20), rng.integers(5, 15, 20), strict=True)
    ]
    slow = [
        sum(line["expected"] for line in lines[i : i + 7])
        / sum(line["positives"] for line in lines[i : i + 7])
        for i in range(14)
    ]
    assert weekly_pcoc(lines) == pytest.approx((min(slow), max(slow)))
    assert weekly_pcoc(lines[:1]) == pytest.approx(
        (lines[0]["expected"] / lines[0]["positives"],) * 2
    )
