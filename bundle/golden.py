"""Golden requests: recorded inputs with the scores they must give, wherever the bundle is loaded.

They carry the TPM windows that they were scored with, so that the check needs no store.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from bundle.encode import Arrays, Request

TOLERANCE = 1e-5
"""Largest absolute difference of a probability between two machines."""


@dataclass(frozen=True)
class Golden:
    """A request, its windows and its scores float64 [N].

    windows: user_window float32 [1, 3, D + 1], user_window_present bool [1, 3],
    item_window float32 [N, 3, D + 1], item_window_present bool [N, 3].
    """

    request: Request
    windows: Arrays
    scores: npt.NDArray[np.float64]


def write_golden(path: Path, goldens: Sequence[Golden]) -> None:
    """Writes `golden.json`. float32 windows survive the way through decimal text unchanged."""
    document = [
        {
            "request": body_of(golden.request),
            "windows": {name: array.tolist() for name, array in golden.windows.items()},
            "scores": golden.scores.tolist(),
        }
        for golden in goldens
    ]
    path.write_text(json.dumps(document))


def read_golden(path: Path) -> list[Golden]:
    """Reads `golden.json`."""
    return [
        Golden(
            request_of(entry["request"]),
            {name: _window(name, values) for name, values in entry["windows"].items()},
            np.array(entry["scores"], np.float64),
        )
        for entry in json.loads(path.read_text())
    ]


def body_of(request: Request) -> dict[str, Any]:
    """The JSON body of `POST /v1/score` for a request."""
    return {
        "user": {
            "id": request.user_id,
            "features": dict(request.user_features),
            "history": {
                "items": list(request.history_items),
                "age_days": list(request.history_age_days),
                "count": list(request.history_count),
            },
        },
        "context": dict(request.context),
        "candidates": {
            "id": list(request.item_ids),
            "features": {name: list(column) for name, column in request.item_features.items()},
        },
    }


def request_of(body: dict[str, Any]) -> Request:
    """The request in a JSON body that is known to be well-formed."""
    user, candidates = body["user"], body["candidates"]
    history = user["history"]
    return Request(
        user_id=user["id"],
        item_ids=candidates["id"],
        user_features=user["features"],
        context=body["context"],
        item_features=candidates["features"],
        history_items=history["items"],
        history_age_days=history["age_days"],
        history_count=history["count"],
    )


def _window(name: str, values: list[Any]) -> npt.NDArray[np.generic]:
    return np.array(values, np.bool_ if name.endswith("_present") else np.float32)
