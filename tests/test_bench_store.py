"""The store's benchmark, small: it runs, and its figures are what they say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.figures import Figures
from benchmarks.store import PAYLOAD_BYTES, QUICK, main


def test_the_quick_run_leaves_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--quick", "--out", str(tmp_path)])
    entries = json.loads((tmp_path / "store.json").read_text())
    values = {entry["figure"]: entry["value"] for entry in entries}
    server = next(name for name in values if name.startswith("memory per user, Valkey"))
    server = server.removeprefix("memory per user, ").removesuffix(", float16")
    assert PAYLOAD_BYTES < values[f"memory per user, {server}, float16"] < 2 * PAYLOAD_BYTES
    int8, float16 = (values[f"memory per user, {server}, {p}"] for p in ("int8", "float16"))
    assert int8 < float16
    for num in QUICK.candidates:
        p50, p99 = (values[f"{p}, user + {num} items, {server}"] for p in ("p50", "p99"))
        assert 0 < p50 <= p99
    said = capsys.readouterr().out
    assert all(entry["figure"] in said for entry in entries)


def test_a_goal_is_met_or_not_as_its_value_says(tmp_path: Path) -> None:
    figures = Figures()
    figures.add("rate", 12.0, "1/s", at_least=10)
    figures.add("rate", 9.0, "1/s", at_least=10)
    figures.add("time", 9.0, "ms", at_most=10)
    figures.add("time", 12.0, "ms", at_most=10)
    figures.add("size", 12.0, "bytes")
    figures.write(tmp_path / "bench" / "some.json")
    entries = json.loads((tmp_path / "bench" / "some.json").read_text())
    assert [entry["met"] for entry in entries] == [True, False, True, False, None]
    assert [entry["goal"] for entry in entries] == [">= 10", ">= 10", "<= 10", "<= 10", ""]
    assert str(figures).count("NOT met") == 2
