"""The training benchmark, small and without other libraries: it runs, and what it says is so."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from scipy.special import expit
from sklearn.metrics import log_loss

from benchmarks.training import QUICK, RATES, Run, Truth, figures, main

BEST = 0.4


def run(side: str, rate: float, rows_per_s: float, loss: float) -> Run:
    return Run(side, rate, rows_per_s, loss, 0.7, 1.0)


def found(runs: list[Run]) -> dict[str, tuple[float, bool | None]]:
    return {f.figure: (f.value, f.met) for f in figures(runs, BEST, {"tpm": 1000.0}).found}


def test_the_quick_run_learns_and_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--out", str(tmp_path)])
    entries = json.loads((tmp_path / "training.json").read_text())
    assert all(set(entry) == {"figure", "value", "unit", "goal", "met"} for entry in entries)
    values = {entry["figure"]: entry["value"] for entry in entries}
    label = pl.read_parquet(tmp_path / "training-rows" / "test")["label"].to_numpy()
    at = f" (learning rate {RATES[0]:g})"
    knows_nothing = log_loss(label, np.full(len(label), label.mean()))
    assert values["log loss, best possible"] < values[f"log loss, ours{at}"] < knows_nothing
    assert values[f"AUC, ours{at}"] > 0.55
    assert values["rows per second, ours"] > 0
    said = capsys.readouterr().out
    assert all(figure in said for figure in values)


def test_clicks_are_drawn_at_the_rates_that_are_given() -> None:
    rows, rate = Truth(QUICK).draw(50_000, np.random.default_rng(0))
    assert rows["label"].to_numpy().mean() == pytest.approx(rate.mean(), abs=0.01)
    likely = rate > np.quantile(rate, 0.9)
    assert rows["label"].to_numpy()[likely].mean() == pytest.approx(rate[likely].mean(), abs=0.02)
    ids = rows["f0"].to_numpy()
    assert (ids.min(), ids.max() < QUICK.vocabulary) == (1, True)
    # By a power law: as many below the square root of the vocabulary as above.
    assert (ids < np.sqrt(QUICK.vocabulary)).mean() == pytest.approx(0.5, abs=0.02)


def test_the_faster_peer_and_the_better_peer_are_the_measure() -> None:
    runs = [
        *(
            run("ours", rate, speed, 0.52)
            for rate, speed in zip(RATES, (9.0, 100.0, 50.0), strict=True)
        ),
        *(run("slow", rate, 4.0, loss) for rate, loss in zip(RATES, (0.6, 0.51, 0.7), strict=True)),
        *(run("fast", rate, 10.0, 0.55) for rate in RATES),
    ]
    figure = found(runs)
    assert figure["rows per second, ours"] == (50.0, None)
    assert figure["rows per second, ours to the faster peer"] == (5.0, True)
    assert figure["log loss, ours at its best less the better peer's"] == (0.01, False)
    assert figure["log loss, slow (learning rate 0.003)"] == (0.51, None)
    assert figure["log loss, slow (learning rate 0.001, the peers' default)"] == (0.6, None)
    runs[2:3] = [run("ours", RATES[2], 49.0, 0.5)]
    figure = found(runs)
    assert figure["rows per second, ours to the faster peer"] == (4.9, False)
    assert figure["log loss, ours at its best less the better peer's"] == (-0.01, True)


def test_goals_that_are_not_met_are_in_the_table() -> None:
    runs = [run("ours", RATES[0], 40.0, 0.5), run("peer", RATES[0], 10.0, 0.6)]
    said = " ".join(str(figures(runs, BEST, {})).split())
    assert "4 x >= 5 NOT met" in said
    assert "<= 0 met" in said


def test_the_truth_is_the_same_each_time() -> None:
    (one, first), (other, second) = (Truth(QUICK).draw(9, np.random.default_rng(3)) for _ in "ab")
    assert one.equals(other)
    assert np.array_equal(first, second)
    assert expit(-20) < first.min()
