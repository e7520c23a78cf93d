"""The floor of this service: what it does with a request, in one process and without HTTP.

    python -m benchmarks.serving_floor FOLDER BUNDLE STORE

reads bodies-N.json in FOLDER, and answers each line of its input with one of its output:
["rate", N, AT_ONCE, SECONDS] with requests per second, ["parts", N] with the milliseconds that the
parts of a request take.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import orjson
import uvloop

from bundle.encode import Arrays, Encoded
from bundle.manifest import Tensor
from bundle.parts import Floats, ItemParts, Places, Run
from embeddings_store import Reader
from service.decode import decode
from service.graphs import open_session
from service.scorer import Deadline, Scorer, Stages, item_inputs, user_inputs
from service.settings import Settings
from service.vetting import load
from service.windows import WindowSource

TIMED = 10
"""How often each body is taken apart."""


def main(folder: Path, bundle: Path, store: str) -> None:
    settings = Settings(registry=str(bundle.parent), store=store, store_deadline_ms=2000.0)
    bodies = {
        int(path.stem.split("-")[1]): [
            orjson.dumps(body) for body in orjson.loads(path.read_bytes())
        ]
        for path in folder.glob("bodies-*.json")
    }
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        source = WindowSource(settings)
        scorer = runner.run(load(bundle, source, settings.store_deadline_ms))
        gc.collect()
        gc.freeze()
        for line in sys.stdin:
            what, num, *more = json.loads(line)
            found = runner.run(_MEASURES[what](scorer, settings, bodies[num], *more))
            print(json.dumps(found), flush=True)
        runner.run(source.let_go(scorer.reader))
        source.close()


async def _rate(
    scorer: Scorer, settings: Settings, contents: Sequence[bytes], at_once: int, seconds: float
) -> float:
    """Answers a second."""
    start_s, num, waiting = time.perf_counter(), 0, cycle(contents)

    async def answer_on() -> None:
        nonlocal num
        while time.perf_counter() < start_s + seconds:
            asked = decode(next(waiting), settings)
            found = await scorer.score(asked.to_encode(), Deadline(), Stages())
            answer: dict[str, object] = {
                "model": found.model,
                "scores": found.scores,
                "degraded": [],
                "missing": found.missing,
                "request_id": asked.request_id,
            }
            orjson.dumps(answer, option=orjson.OPT_SERIALIZE_NUMPY)
            num += 1

    await asyncio.gather(*(answer_on() for _ in range(at_once)))
    return num / (time.perf_counter() - start_s)


async def _parts(scorer: Scorer, settings: Settings, contents: Sequence[bytes]) -> dict[str, float]:
    """Median milliseconds of what a request consists of."""
    artifact, reader = scorer.artifact, scorer.reader
    scores_of = _runner(artifact.model, artifact.manifest.inputs)
    items_of = _runner(artifact.item_model, artifact.manifest.item_inputs)
    parts = ItemParts(artifact.encoder, artifact.parts, items_of)
    taken: dict[str, list[float]] = {}
    for content in list(contents) * TIMED:
        times = [time.perf_counter()]
        request = decode(content, settings).to_encode()
        times.append(time.perf_counter())
        encoded = artifact.encoder.request(request)
        lacking = parts.lacking(encoded)
        times.append(time.perf_counter())
        user, items = await _look_up(reader, encoded, lacking)
        times.append(time.perf_counter())
        part = parts.of(encoded, lacking, items)
        times.append(time.perf_counter())
        scores = scores_of({**encoded.inputs, **user, "item_part": part})
        times.append(time.perf_counter())
        orjson.dumps({"scores": scores}, option=orjson.OPT_SERIALIZE_NUMPY)
        times.append(time.perf_counter())
        stages = ("decode", "encode", "look up", "take parts", "run", "serialise")
        for stage, start, end in zip(stages, times, times[1:], strict=False):
            taken.setdefault(stage, []).append((end - start) * 1000)
    return {stage: statistics.median(ms) for stage, ms in taken.items()}


async def _look_up(reader: Reader, encoded: Encoded, lacking: Places) -> tuple[Arrays, Arrays]:
    """Windows of the user, and of the items whose parts are lacking, as the graphs take them."""
    user = await reader.lookup("users", encoded.user_key, deadline_ms=2000.0)
    if not len(lacking):
        return user_inputs(user), {}
    items = await reader.lookup("items", encoded.item_keys[lacking], deadline_ms=2000.0)
    return user_inputs(user), item_inputs(items)


def _runner(model: Path, inputs: Sequence[Tensor]) -> Run:
    session, names = open_session(model), [tensor.name for tensor in inputs]

    def run(arrays: Arrays) -> Floats:
        found: Floats = session.run(None, {name: arrays[name] for name in names})[0]
        return found

    return run


_MEASURES: Mapping[str, Callable[..., Coroutine[Any, Any, Any]]] = {"rate": _rate, "parts": _parts}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
