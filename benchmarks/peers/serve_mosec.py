"""mosec, one worker, without batching; its HTTP side is Rust in a process of its own.

SERVED=FOLDER python serve_mosec.py --address 127.0.0.1 --port PORT
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import orjson
from conventional import Model, answer
from mosec import Server, Worker


class Scorer(Worker):
    def __init__(self) -> None:
        self.model = Model(Path(os.environ["SERVED"]), "shared")
        self.client = self.model.blocking_client()
        self.model.warm_up(self.client)

    def deserialize(self, data: bytes) -> dict[str, Any]:
        return orjson.loads(data)

    def serialize(self, data: bytes) -> bytes:
        return data

    def forward(self, data: dict[str, Any]) -> bytes:
        return answer(self.model.scores(data, self.client.mget(self.model.keys(data))))


if __name__ == "__main__":
    server = Server()
    server.append_worker(Scorer, num=1, route="/v1/score")
    server.run()
