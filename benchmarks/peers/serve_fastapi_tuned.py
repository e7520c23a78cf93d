"""FastAPI well tuned: columns by orjson and no model of pydantic, one thread, uvloop, gc frozen.

python serve_fastapi_tuned.py FOLDER PORT shared|tiled
"""

from __future__ import annotations

import sys
from pathlib import Path

import orjson
import uvicorn
from conventional import Model, answer
from fastapi import FastAPI, Request, Response

app = FastAPI()
model = Model(Path(sys.argv[1]), sys.argv[3])
client = model.client()


@app.post("/v1/score")
async def score(request: Request) -> Response:
    body = orjson.loads(await request.body())
    found = await client.mget(model.keys(body))
    return Response(answer(model.scores(body, found)), media_type="application/json")


if __name__ == "__main__":
    with model.blocking_client() as once:
        model.warm_up(once)
    port = int(sys.argv[2])
    uvicorn.run(app, port=port, log_level="warning", loop="uvloop", http="httptools")
