"""What the documents quote is what the stored results say."""

from __future__ import annotations

from pathlib import Path

import pytest

import ecdctr
from experiments.catalogue import EXPERIMENTS
from experiments.report import markdown
from experiments.results import Result

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "experiments.md").read_text()
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
