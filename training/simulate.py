"""Replays history: on every day the update of that day, then its requests scored by what is live.

A day's scores come from a bundle that has learned from earlier days alone (progressive
validation), and are computed as the service does it: by the bundle's graph, its item table and its
window.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt

from bundle.artifact import open_artifact
from bundle.encode import Request
from bundle.spec import Domain
from embeddings_store import WindowRef
from training.checks import check_inputs
from training.client import ServiceError, score_over_http
from training.config import Schedule
from training.demo import running_service
from training.events import Ints, days_between
from training.examples import DayCache, builder_for, partitions
from training.metrics import Metrics, has_gauc, measure
from training.parallel import progress
from training.recipes import Recipe
from training.requests import RequestMaker
from training.scoring import BundleScorer, Scores, logits_of
from training.update import TIERS, TolerantLog, run_update
from training.workspace import Workspace, WorkspaceError

Line = dict[str, Any]
DOMAINS: tuple[Domain, ...] = ("ad", "natural")
SERVED_TOLERANCE = 1e-5
"""How far a score over HTTP may be from the one computed here."""
WEEK = 7
_NUM_SERVED = 20
_KEPT_BUNDLES = 10
_PATIENCE_S = 60.0


@dataclass(frozen=True)
class DayScores:
    """A day's requests with the live bundle's scores float64 [N] each; label float32 [n] and
    user_row int64 [n] of all their candidates together; the month of the window they were made
    with."""

    window: str
    requests: list[Request]
    scores: list[Scores]
    label: npt.NDArray[np.float32]
    user_row: Ints


def run_simulation(
    workspace: Workspace,
    first: date,
    last: date,
    recipe: Recipe,
    schedule: Schedule,
    out: Path,
    per_day: int | None = None,
    seed: int = 0,
    allow_missing_days: int = 0,
    serve: bool = False,
) -> list[Line]:
    """Replays first .. last and returns their lines of `out`, oldest first; days that have their
    line already are not replayed.

    per_day: how many requests of a day are scored, None is all. serve: a service follows the
    registry, and some requests are scored by it too. A day is a line of JSON in `out`, and
    `scores_path(out, day)`: logit float32 [n], label int8 [n], user_row int32 [n].

    Raises:
        WorkspaceError: what is live has learned from days that are to be replayed.
    """
    done = read_lines(out)
    days = [d for d in days_between(first, last) if str(d) not in {line["date"] for line in done}]
    if days:
        _refuse_later(workspace, days[0])
        log = TolerantLog(workspace.data, _missing(workspace, last))
        workspace.cache = DayCache(log, last + timedelta(days=1))
    url = None
    with ExitStack() as stack:
        for day in progress(days, "simulate", unit="day"):
            start = time.monotonic()
            outcome = run_update(
                workspace, day, recipe, schedule, seed, allow_missing_days=allow_missing_days
            )
            line: Line = {"date": str(day), **asdict(outcome)}
            if outcome.live and (scored := score_day(workspace, outcome.live, day, per_day)):
                line |= keep_scores(scored, scores_path(out, day))
                if serve:
                    url = url or stack.enter_context(running_service(workspace))
                    line["served"] = _served(url, outcome.live, scored)
            if outcome.live:  # a bundle a day would fill the disk
                for bundle_id in workspace.registry.prunable(_KEPT_BUNDLES):
                    workspace.registry.remove(bundle_id)
            line["seconds"] = round(time.monotonic() - start, 2)
            _append(out, line)
            done.append(line)
    asked = [line for line in done if f"{first}" <= line["date"] <= f"{last}"]
    return sorted(asked, key=lambda line: str(line["date"]))


def _missing(workspace: Workspace, last: date) -> set[date]:
    """Days that the log lacks up to `last`; how many of them an update bears is its own matter."""
    log, missing = workspace.log(), set()
    for domain in DOMAINS:
        first = partitions(log, domain)[0]
        allowed = (last - first).days
        missing |= set(check_inputs(log.root, domain, first, last, allowed))
    return missing


def read_lines(out: Path) -> list[Line]:
    """The days in `out`; half a line at its end, of a run that was killed, is cut off."""
    if not out.is_file():
        return []
    text = out.read_text()
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        out.write_text(whole)
    return [json.loads(line) for line in whole.splitlines()]


def _append(out: Path, line: Line) -> None:
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")


def scores_path(out: Path, day: date | str) -> Path:
    """Where the scores of a day are kept: beside `out`, in a folder of its name."""
    return out.with_name(f"{out.name}.days") / f"{day}.npz"


def _refuse_later(workspace: Workspace, day: date) -> None:
    current = workspace.registry.current()
    if current and (asof := workspace.registry.read(current.current).asof) > f"{day}":
        raise WorkspaceError(
            f"{current.current} is live, made for {asof}: {day} can't be replayed in"
            f" {workspace.root} any more; use another workspace with the same data"
        )


def score_day(
    workspace: Workspace, bundle_id: str, day: date, per_day: int | None
) -> DayScores | None:
    """All candidates of a day's first `per_day` requests; None where it has none."""
    log = workspace.log()
    builder = builder_for(workspace, log, day, day, with_tpm=False)
    requests, rows = RequestMaker(log, builder, day).whole(per_day)
    if not requests:
        return None
    artifact = open_artifact(workspace.registry.path(bundle_id), check=False)
    window = artifact.manifest.window
    reader = workspace.store.open_now(WindowRef(window.month, window.build))
    return DayScores(
        window.month,
        requests,
        BundleScorer(artifact.encoder, artifact.folder).score_all(reader, requests),
        rows["label"].to_numpy().astype(np.float32),
        log.users.rows(rows["user_id"].to_numpy()),
    )


def keep_scores(scored: DayScores, path: Path) -> Line:
    """Keeps a day's scores in `path` and returns what is measured on them."""
    logits = logits_of(scored.scores)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}")
    with draft.open("wb") as file:
        np.savez_compressed(
            file,
            logit=logits.astype(np.float32),
            label=scored.label.astype(np.int8),
            user_row=scored.user_row.astype(np.int32),
        )
    draft.replace(path)
    line: Line = {"window": scored.window, "requests": len(scored.requests)}
    line["expected"] = float(np.concatenate(scored.scores).sum())
    if not has_gauc(scored.label, scored.user_row):
        return {**line, "rows": len(scored.label), "positives": int(scored.label.sum())}
    return {**line, **asdict(measure(logits, scored.label, scored.user_row))}


def _served(url: str, bundle_id: str, scored: DayScores) -> Line:
    """How far the service's scores are from ours, or what went wrong."""
    requests = scored.requests[:_NUM_SERVED]
    try:
        _wait_for(url, bundle_id)
        answers = score_over_http(url, requests)
    except (httpx.HTTPError, ServiceError) as error:
        return {"requests": 0, "error": str(error)}
    pairs = zip(answers.scores, scored.scores, strict=False)
    worst = max(float(np.abs(one - other).max()) for one, other in pairs)
    line: Line = {"requests": len(requests), "worst": worst}
    if worst > SERVED_TOLERANCE:
        line["error"] = (
            f"scores over HTTP differ by {worst:.1e}, at most {SERVED_TOLERANCE:.0e} is right"
        )
    return line


def _wait_for(url: str, bundle_id: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while True:
        models = httpx.get(f"{url}/v1/models", timeout=10.0).json()
        if models["live"] and models["live"]["id"] == bundle_id:
            return
        for refusal in models["refusals"]:
            if refusal["bundle"] == bundle_id:
                raise ServiceError(f"the service refuses {bundle_id}: {refusal['reason']}")
        if time.monotonic() > until:
            raise ServiceError(f"{bundle_id} was not live after {_PATIENCE_S:.0f} s")
        time.sleep(0.1)


def summary(lines: Sequence[Line], out: Path) -> str:
    """A table for people: by month and over all, from the scores that were kept."""
    scored = [line for line in lines if line.get("positives")]
    text = [
        f"{'month':<10}{'GAUC':>8}{'AUC':>8}{'log loss':>10}{'PCOC':>7}{'days':>6}{'positives':>11}"
    ]
    months = sorted({line["date"][:7] for line in scored})
    for name in [*months, *["all"][: len(months)]]:
        days = [line for line in scored if name in (line["date"][:7], "all")]
        text.append(_row(name, len(days), _measured(days, out)))
    if scored:
        low, high = weekly_pcoc(scored)
        text.append(f"PCOC of seven days on end: {low:.3f} to {high:.3f}")
    times = ", ".join(f"{sum(t in e['trained'] for e in lines)} {t}" for t in TIERS)
    text.append(f"trained: {times}; {sum(bool(e['refused']) for e in lines)} bundles refused")
    return "\n".join(text)


def _row(name: str, days: int, m: Metrics) -> str:
    quality = f"{m.gauc:>8.4f}{m.auc:>8.4f}{m.log_loss:>10.6f}{m.pcoc:>7.3f}"
    return f"{name:<10}{quality}{days:>6}{m.positives:>11,}"


def _measured(lines: Sequence[Line], out: Path) -> Metrics:
    days = [np.load(scores_path(out, line["date"])) for line in lines]
    logits, label, user_row = (
        np.concatenate([day[name] for day in days]) for name in ("logit", "label", "user_row")
    )
    return measure(logits.astype(np.float64), label.astype(np.float32), user_row.astype(np.int64))


def weekly_pcoc(lines: Sequence[Line]) -> tuple[float, float]:
    """The lowest and the highest PCOC of seven scored days on end; of all where they are fewer."""
    pcoc = weekly_sums(lines, "expected") / weekly_sums(lines, "positives")
    return float(pcoc.min()), float(pcoc.max())


def weekly_sums(lines: Sequence[Line], name: str) -> npt.NDArray[np.float64]:
    """Sums float64 of a figure over each seven lines on end; of all where they are fewer."""
    figures = np.array([line[name] for line in lines], np.float64)
    return np.convolve(figures, np.ones(min(WEEK, len(lines))), "valid")
