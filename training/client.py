"""Scores requests over HTTP, as an ad ranker does, and shows the answer to a person."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import polars as pl

from bundle.encode import Request
from bundle.golden import body_of
from bundle.ids import Id
from training.events import EventLog


class ServiceError(ValueError):
    """The service did not answer with scores; the message has its own words."""


@dataclass(frozen=True)
class Answers:
    """Scores float64 [N] of each request, how long each took in ms, and the last answer whole."""

    scores: list[npt.NDArray[np.float64]]
    latency_ms: npt.NDArray[np.float64]
    last: dict[str, Any]


def score_over_http(url: str, requests: Sequence[Request]) -> Answers:
    """Scores requests one after the other over one connection.

    Raises:
        ServiceError: no service at `url`, or an answer other than 200.
    """
    scores, latency = [], []
    with httpx.Client(base_url=url, timeout=10.0) as client:
        for request in requests:
            body = body_of(request)
            start = time.perf_counter()
            answer = _post(client, url, body)
            latency.append((time.perf_counter() - start) * 1000)
            scores.append(np.array(answer["scores"]))
    return Answers(scores, np.array(latency), answer)


def _post(client: httpx.Client, url: str, body: dict[str, Any]) -> dict[str, Any]:
    try:
        response = client.post("/v1/score", json=body)
    except httpx.HTTPError as error:
        raise ServiceError(f"no answer from {url}: {error}; is 'ecdctr serve' running?") from error
    if response.status_code != 200:
        raise ServiceError(f"{url} answered {response.status_code}: {response.text[:500]}")
    answer: dict[str, Any] = response.json()
    return answer


def best_ads(
    log: EventLog,
    request: Request,
    scores: npt.NDArray[np.float64],
    num: int,
    taken: Collection[Id] = (),
) -> str:
    """The `num` best candidates with names and probabilities, a line each; those that turned out
    to be taken have a star."""
    items = pl.read_parquet(log.root / "items.parquet", columns=["item_id", "name"])
    names = dict(items.iter_rows())
    lines = []
    for place, row in enumerate(np.argsort(-scores, kind="stable")[:num], start=1):
        item = request.item_ids[int(row)]
        star = "*" if item in taken else " "
        name = names.get(item) or ""
        lines.append(f"{place:>3} {star} {scores[row]:>7.2%}  {item!s:>9}  {name}")
    return "\n".join(lines)
