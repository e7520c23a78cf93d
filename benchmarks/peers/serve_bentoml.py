"""BentoML, one worker, without batching.

SERVED=FOLDER bentoml serve serve_bentoml:Scorer --port PORT
"""

from __future__ import annotations

import os
from pathlib import Path

import bentoml
import orjson
from conventional import Model, answer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

model = Model(Path(os.environ["SERVED"]), "shared")
client = model.client()


async def score(request: Request) -> Response:
    body = orjson.loads(await request.body())
    found = await client.mget(model.keys(body))
    return Response(answer(model.scores(body, found)), media_type="application/json")


# Its own way to declare a function builds a model of pydantic for every body; this one does not.
@bentoml.asgi_app(Starlette(routes=[Route("/v1/score", score, methods=["POST"])]), path="/")
@bentoml.service(workers=1, traffic={"timeout": 60}, metrics={"enabled": False})
class Scorer:
    def __init__(self) -> None:
        with model.blocking_client() as once:
            model.warm_up(once)
