"""What every server beside this one does with a request, whatever framework is around it.

It is written as favourably as a conventional graph allows: the project's own encoder, an item table
in memory, one MGET of packed vectors, one run with one thread. It needs numpy, onnxruntime, orjson,
redis, and the package `bundle`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
import orjson
import redis
import redis.asyncio

from bundle.encode import Arrays, Encoder
from bundle.golden import request_of
from bundle.items import ItemTable
from bundle.spec import read_spec

SETUP = "peers.json"
"""{bundle, store, dim, examples}: folder, URL, D of the vectors, bodies to warm up with."""
GRAPHS = {"shared": "shared.onnx", "tiled": "tiled.onnx"}
PREFIX = {"users": "user:", "items": "item:"}
"""Of the keys of packed vectors, before the id. A value is float16 [3 + 3 (D + 1)]: which months
are present, then the months."""
WARM_UP = 20

Scores = npt.NDArray[np.float32]
Body = dict[str, Any]


class _ColumnsOnly(Encoder):
    """The graph matches the history by itself, so the encoder must not spend time on it."""

    def _history(self, *_: object) -> None:
        pass


class Model:
    """Encodes, looks up, and runs one of the two graphs."""

    def __init__(self, folder: Path, graph: str, threads: int | None = 1) -> None:
        setup = json.loads((folder / SETUP).read_text())
        bundle, self.url, self._dim = Path(setup["bundle"]), setup["store"], setup["dim"]
        self._tiled = graph == "tiled"
        vocabulary = json.loads((bundle / "vocabulary.json").read_text())
        items = ItemTable.read(bundle / "items")
        self._encoder = _ColumnsOnly(read_spec(bundle / "features.toml"), vocabulary, items)
        self._given = {kind: _given(self._encoder, kind) for kind in ("cat", "num")}
        self._session = _session(folder / GRAPHS[graph], threads)
        self._inputs = [node.name for node in self._session.get_inputs()]
        self._absent = bytes(2 * (3 + 3 * (self._dim + 1)))
        self._examples = setup["examples"]

    def warm_up(self, client: redis.Redis) -> None:
        """Some requests of each size; then what is alive is no longer walked by collections."""
        for body in self._examples:
            for _ in range(WARM_UP):
                self.scores(body, cast(list[bytes | None], client.mget(self.keys(body))))
        gc.collect()
        gc.freeze()

    def blocking_client(self) -> redis.Redis:
        return redis.Redis.from_url(self.url)

    def client(self) -> redis.asyncio.Redis:
        return redis.asyncio.Redis.from_url(self.url)

    def keys(self, body: Body) -> list[str]:
        """What MGET is asked for: the user, then the candidates."""
        items = [f"{PREFIX['items']}{item}" for item in body["candidates"]["id"]]
        return [f"{PREFIX['users']}{body['user']['id']}", *items]

    def scores(self, body: Body, found: Sequence[bytes | None]) -> Scores:
        """Probabilities float32 [N] of a body with columns, given what MGET gave for its keys."""
        inputs = {**self._columns(body), **self._windows(found)}
        if self._tiled:
            num = len(inputs["item_cat"])
            for name, array in inputs.items():
                if not name.startswith("item_"):
                    inputs[name] = np.repeat(array, num, axis=0)
        scores: Scores = self._session.run(None, {n: inputs[n] for n in self._inputs})[0]
        return scores

    def _columns(self, body: Body) -> Arrays:
        encoder, request = self._encoder, request_of(body)
        encoded = encoder.request(request)
        inputs = encoder.item_inputs(encoded, np.arange(len(request.item_ids)))
        for kind, places in self._given.items():
            if places:
                inputs[f"item_{kind}"][:, places] = encoded.inputs[f"given_{kind}"]
        inputs["item_key"] = encoded.item_keys.astype(np.int64)
        # The graphs were exported with more steps than are attended to.
        least = encoder.spec.history.attend + 1
        history = {n: _padded(a, least) for n, a in encoder.whole_history(request).items()}
        return {**encoded.inputs, **inputs, **history}

    def _windows(self, found: Sequence[bytes | None]) -> Arrays:
        packed = b"".join([value or self._absent for value in found])
        rows = np.frombuffer(packed, np.float16).reshape(len(found), -1)
        present, vectors = rows[:, :3] != 0, rows[:, 3:].astype(np.float32)
        vectors = vectors.reshape(len(found), 3, self._dim + 1)
        return {
            "user_window": vectors[:1],
            "user_window_present": present[:1],
            "item_window": vectors[1:],
            "item_window_present": present[1:],
        }


def answer(scores: Scores) -> bytes:
    """The answer's JSON, with what the load generator reads of it."""
    document = {"model": "peer", "scores": scores, "degraded": []}
    return orjson.dumps(document, option=orjson.OPT_SERIALIZE_NUMPY)


def _session(path: Path, threads: int | None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _given(encoder: Encoder, kind: str) -> list[int]:
    """Columns of the items' inputs of the features that only a request knows."""
    whole, width = {"cat": ("categorical", 1), "num": ("numeric", 2)}[kind]
    features = encoder.spec.of("item", whole)  # type: ignore[arg-type]
    places = [place for place, feature in enumerate(features) if feature.given]
    return [width * place + i for place in places for i in range(width)]


def _padded(steps: npt.NDArray[np.generic], least: int) -> npt.NDArray[np.generic]:
    lacking = max(0, least - steps.shape[1])
    return np.pad(steps, [(0, 0), (0, lacking), *[(0, 0)] * (steps.ndim - 2)])
