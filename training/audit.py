"""The requests that the service kept (`ECDCTR_AUDIT_DIR`), as Parquet and as requests again."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from bundle.encode import Request

SCHEMA = {
    "time": pl.Datetime("us", "UTC"),
    "request_id": pl.String(),
    "model": pl.String(),
    "request": pl.String(),
    "scores": pl.List(pl.Float32()),
    "degraded": pl.String(),
    "missing": pl.String(),
}
"""Of the Parquet files; `request`, `degraded` and `missing` are JSON, a row is a request."""


class AuditError(ValueError):
    """A file is not what the service writes; the message names file and line."""


@dataclass(frozen=True)
class Audited:
    """A request with what it was answered. scores: float32 [N], in the order of its items."""

    time: datetime
    request_id: str
    model: str
    request: Request
    scores: npt.NDArray[np.float32]
    degraded: dict[str, str]


def to_parquet(folder: Path, target: Path) -> int:
    """Writes each complete file of the service's folder as one of Parquet; returns how many
    requests were added. Those that are in `target` already are skipped, so it can be run again.

    Raises:
        AuditError: a line is not an audited request.
    """
    target.mkdir(parents=True, exist_ok=True)
    num = 0
    for source in sorted(folder.glob("audit-*.jsonl")):
        wanted = target / f"{source.stem}.parquet"
        if not wanted.exists():
            rows = [_row(line, f"{source}:{n}") for n, line in enumerate(_lines(source), 1)]
            temporary = wanted.with_suffix(f".{os.getpid()}.part")
            pl.DataFrame(rows, SCHEMA, orient="row").write_parquet(temporary)
            temporary.replace(wanted)
            num += len(rows)
    return num


def read_requests(folder: Path) -> Iterator[Audited]:
    """All requests in the Parquet files of `folder`, file by file."""
    for path in sorted(folder.glob("audit-*.parquet")):
        for row in pl.read_parquet(path).iter_rows(named=True):
            yield Audited(
                row["time"],
                row["request_id"],
                row["model"],
                _request(json.loads(row["request"])),
                np.asarray(row["scores"], np.float32),
                json.loads(row["degraded"]),
            )


def _lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        yield from file


def _row(line: bytes, where: str) -> tuple[object, ...]:
    try:
        found = json.loads(line)
        _request(found["request"])
        return (
            datetime.fromisoformat(found["time"]),
            found["request_id"],
            found["model"],
            json.dumps(found["request"], separators=(",", ":")),
            found["scores"],
            json.dumps(found["degraded"]),
            json.dumps(found["missing"]),
        )
    except (ValueError, LookupError, TypeError) as error:
        raise AuditError(f"{where}: {type(error).__name__}: {error}") from error


def _request(body: dict[str, Any]) -> Request:
    """A request from the JSON of `POST /v1/score`, which the service has found to be right."""
    user, candidates = body["user"], body["candidates"]
    history = user.get("history") or {}
    return Request(
        user_id=user["id"],
        item_ids=candidates["id"],
        user_features=user.get("features", {}),
        context=body.get("context", {}),
        item_features=candidates.get("features", {}),
        history_items=history.get("items", []),
        history_age_days=history.get("age_days", []),
        history_count=history.get("count", []),
    )
