"""LitServe, one worker, without batching.

python serve_litserve.py FOLDER PORT
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import litserve
from conventional import Model, answer
from fastapi import Response


class Api(litserve.LitAPI):
    def setup(self, device: str) -> None:
        self.model = Model(Path(sys.argv[1]), "shared")
        self.client = self.model.blocking_client()
        self.model.warm_up(self.client)

    def decode_request(self, request):  # its annotation would choose how the body is read
        return request

    def predict(self, body: dict[str, Any]) -> bytes:
        found = self.client.mget(self.model.keys(body))
        return answer(self.model.scores(body, found))

    def encode_response(self, output: bytes) -> Response:
        return Response(output, media_type="application/json")


if __name__ == "__main__":
    api = Api(api_path="/v1/score")
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, fast_queue=True)
    server.run(
        host="127.0.0.1",
        port=int(sys.argv[2]),
        num_api_servers=1,
        generate_client_file=False,
        log_level="warning",
    )
