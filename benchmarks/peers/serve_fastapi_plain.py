"""FastAPI as it is usually written: an object per ad, a blocking function, all else by default.

python serve_fastapi_plain.py FOLDER PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import uvicorn
from conventional import Model
from fastapi import FastAPI
from pydantic import BaseModel

Value = int | float | str | None


class Ad(BaseModel):
    id: int | str
    features: dict[str, Value] = {}


class History(BaseModel):
    items: list[int | str]
    age_days: list[float]
    count: list[float]


class User(BaseModel):
    id: int | str
    features: dict[str, Value] = {}
    history: History


class Body(BaseModel):
    user: User
    context: dict[str, Value] = {}
    candidates: list[Ad]


class Answer(BaseModel):
    model: str
    scores: list[float]
    degraded: list[str] = []


app = FastAPI()
model = Model(Path(sys.argv[1]), "tiled", threads=None)
client = model.blocking_client()


@app.post("/v1/score")
def score(body: Body) -> Answer:
    asked = _columns(body)
    found = client.mget(model.keys(asked))
    return Answer(model="peer", scores=[float(one) for one in model.scores(asked, found)])


def _columns(body: Body) -> dict[str, Any]:
    names = body.candidates[0].features
    return {
        "user": body.user.model_dump(),
        "context": body.context,
        "candidates": {
            "id": [ad.id for ad in body.candidates],
            "features": {name: [ad.features[name] for ad in body.candidates] for name in names},
        },
    }


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[2]), log_level="warning")
