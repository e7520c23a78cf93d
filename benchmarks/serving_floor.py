"""The floor of this service: what it does with a request, in one process and without HTTP.

    python -m benchmarks.serving_floor FOLDER BUNDLE STORE SECONDS

reads bodies-N.json in FOLDER, and prints requests per second by N, and the milliseconds that the
parts of a request of the largest N take.
"""

from __future__ import annotations

import asyncio
import gc
import json
import statistics
import sys
import time
from collections.abc import Sequence
from itertools import cycle
from pathlib import Path

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

AT_ONCE = (1, 4)
"""Requests under way; the better one counts. With several, the wait for the store costs nothing."""
TIMED = 10
"""How often each body is taken apart."""


def main(folder: Path, bundle: Path, store: str, seconds: float) -> None:
    settings = Settings(registry=str(bundle.parent), store=store, store_deadline_ms=2000.0)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        print(json.dumps(runner.run(_measure(folder, bundle, settings, seconds))))


async def _measure(
    folder: Path, bundle: Path, settings: Settings, seconds: float
) -> dict[str, dict[str, float]]:
    source = WindowSource(settings)
    scorer = await load(bundle, source, settings.store_deadline_ms)
    gc.collect()
    gc.freeze()
    bodies = {
        int(path.stem.split("-")[1]): [
            orjson.dumps(body) for body in orjson.loads(path.read_bytes())
        ]
        for path in folder.glob("bodies-*.json")
    }
    rates = {}
    for num, contents in sorted(bodies.items()):
        await _rate(scorer, settings, contents, 1, seconds / 4)
        found = [await _rate(scorer, settings, contents, n, seconds) for n in AT_ONCE]
        rates[str(num)] = max(found)
    parts = await _parts(scorer, settings, bodies[max(bodies)])
    await source.let_go(scorer.reader)
    source.close()
    return {"rates": rates, "parts_ms": parts}


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
            answer = {
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


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], float(sys.argv[4]))
