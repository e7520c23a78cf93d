"""What the documents quote is what the stored results say."""

from __future__ import annotations

from pathlib import Path

import pytest

import ecdctr
from benchmarks.figures import Figures
from benchmarks.store import capacity
from experiments.catalogue import EXPERIMENTS
from experiments.report import markdown
from experiments.results import Result
from training.simulate import read_lines, weekly_pcoc
from training.update import TIERS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "experiments.md").read_text()
PAGES = {"bench-store": "store.md"} | dict.fromkeys(
    ["bench-soak", "bench-overload", "bench-startup"], "benchmarks-endurance.md"
)
"""Of benchmarks whose page has another name than they."""
STORED = sorted((DOCS / "results" / "experiments").glob("*.json"))


def test_some_results_are_stored() -> None:
    assert STORED


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_the_page_has_the_table_of_every_stored_result(path: Path) -> None:
    assert markdown(Result.read(path)) in PAGE


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_a_stored_result_says_which_command_made_it_at_full_size(path: Path) -> None:
    result = Result.read(path)
    assert result.command == f"ecdctr experiment {path.stem}"
    assert ecdctr.parser().parse_args(result.command.split()[1:]).name == path.stem
    assert len(result.seeds) > 1


def test_the_page_lists_every_experiment_and_whether_it_is_stored() -> None:
    for name in EXPERIMENTS:
        said = "yes" if DOCS / "results" / "experiments" / f"{name}.json" in STORED else "not yet"
        (line,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` "))
        assert line.endswith(f"| {said} |")


# The replay


def test_the_page_of_the_replay_says_what_was_stored() -> None:
    page = (DOCS / "replay.md").read_text()
    for path in sorted((DOCS / "results").glob("replay-*.txt")):
        assert path.read_text() in page


def test_the_stored_table_of_the_replay_is_of_the_stored_days() -> None:
    lines = read_lines(DOCS / "results" / "replay-2017-08-to-12.jsonl")
    table = (DOCS / "results" / "replay-2017-08-to-12.txt").read_text()
    scored = [line for line in lines if line.get("positives")]
    low, high = weekly_pcoc(scored)
    assert f"PCOC of seven days on end: {low:.3f} to {high:.3f}\n" in table
    trained = ", ".join(f"{sum(t in e['trained'] for e in lines)} {t}" for t in TIERS)
    refused = sum(bool(line["refused"]) for line in lines)
    assert f"trained: {trained}; {refused} bundles refused\n" in table
    for month in ("2017-08", "2017-12"):
        own = [line for line in scored if line["date"].startswith(month)]
        positives = sum(line["positives"] for line in own)
        pcoc = sum(line["expected"] for line in own) / positives
        (row,) = (row.split() for row in table.splitlines() if row.startswith(month))
        assert row[4:] == [f"{pcoc:.3f}", f"{len(own)}", f"{positives:,}"]


# The benchmarks


@pytest.mark.parametrize(
    "name", [path.stem for path in (DOCS / "results").glob("bench-*.json")], ids=str
)
def test_the_page_of_a_benchmark_has_the_table_that_was_stored(name: str) -> None:
    found = Figures.read(DOCS / "results" / f"{name}.json")
    page = DOCS / PAGES.get(name, f"{name.replace('bench-', 'benchmarks-')}.md")
    assert str(found) in page.read_text()


def test_the_capacity_of_the_store_is_that_of_its_figures() -> None:
    found = Figures.read(DOCS / "results" / "bench-store.json")
    assert capacity(found) in (DOCS / "store.md").read_text()
