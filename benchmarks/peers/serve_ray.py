"""Ray Serve, one replica, without batching; its HTTP proxy is a process of its own.

python serve_ray.py FOLDER PORT
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import orjson
import ray
from conventional import Model, answer
from ray import serve
from starlette.requests import Request
from starlette.responses import Response


@serve.deployment(num_replicas=1, max_ongoing_requests=64, ray_actor_options={"num_cpus": 0})
class Scorer:
    def __init__(self, folder: str) -> None:
        self.model = Model(Path(folder), "shared")
        with self.model.blocking_client() as once:
            self.model.warm_up(once)
        self.client = self.model.client()

    async def __call__(self, request: Request) -> Response:
        body = orjson.loads(await request.body())
        found = await self.client.mget(self.model.keys(body))
        return Response(answer(self.model.scores(body, found)), media_type="application/json")


if __name__ == "__main__":
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="error")
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
    serve.run(Scorer.bind(sys.argv[1]), route_prefix="/v1/score")
    while True:
        time.sleep(3600)
