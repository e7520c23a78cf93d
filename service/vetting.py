"""What a bundle has to pass before it goes live. All of it runs beside the bundle that is live."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from bundle.artifact import Artifact, open_artifact
from bundle.encode import Arrays, FeatureError, Request
from bundle.golden import TOLERANCE, Golden
from bundle.manifest import BundleError, Manifest, Tensor, read_manifest
from embeddings_store import (
    Reader,
    RequestWindows,
    StoreCorrupt,
    StoreError,
    WindowNotFound,
    WindowRef,
    Windows,
)
from embeddings_store.cache import CachedReader
from service.background import in_background
from service.graphs import OUTPUT, PART, Graphs, Scores, open_session
from service.scorer import Scorer, absent_windows, item_inputs, user_inputs
from service.windows import WindowSource

log = logging.getLogger(__name__)

Reason = Literal[
    "registry",
    "unavailable",
    "bundle",
    "model",
    "inputs",
    "golden",
    "constant",
    "window",
    "store",
    "internal",
]
"""registry: current.json, or the bundle that it names, is not there. unavailable: the bundle could
not be fetched for now, or its copy was damaged, so it is tried again. bundle: files, checksums,
spec. model: onnxruntime can't load it. inputs: the graph is not what the manifest says. golden:
recorded scores are not reproduced. constant: all scores are equal. window: the store has no such
window. store: it gave no answer, so the bundle is tried again. internal: a fault in the service."""

PASSING: frozenset[Reason] = frozenset({"store", "unavailable"})
"""What may pass by itself."""
WARM_UP_SIZES = (1, 50, 200, 500)
"""Candidates per warm-up request: the first run of a shape is slow."""
_SAME_SCORE = 1e-6
"""Relative spread up to which scores count as equal: float32 noise is a tenth of it."""
_DTYPES: Mapping[str, str] = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class RefusedError(Exception):
    """A bundle must not go live: `kind` is for a metric, the text for people."""

    def __init__(self, kind: Reason, text: str) -> None:
        super().__init__(text)
        self.kind: Reason = kind


async def load(
    folder: Path, source: WindowSource, store_deadline_ms: float, *, may_wait: bool = False
) -> Scorer:
    """Opens, checks and warms the bundle in `folder`; the event loop stays free meanwhile. Its
    reader is to be let go to the source in the end.
    `may_wait`: it may go live although its store gives no answer yet.

    Raises:
        RefusedError: it must not go live; nothing of it is left open.
    """
    reader = None
    try:
        manifest = read_manifest(folder)
        # First, because it is cheap: a store that is away is asked again and again.
        reader = await _open_reader(manifest, source, may_wait)
        scorer = await in_background(_build, folder, manifest, reader, store_deadline_ms)
        await _warm_cache(scorer)
        return scorer
    except BaseException as error:
        if reader is not None:
            await source.let_go(reader)
        if isinstance(error, BundleError):
            raise RefusedError("bundle", str(error)) from error
        if isinstance(error, FeatureError):
            raise RefusedError("golden", f"{folder.name}: {error}") from error
        raise


async def _open_reader(manifest: Manifest, source: WindowSource, may_wait: bool) -> Reader:
    window = manifest.window
    try:
        ref = WindowRef(window.month, window.build)
        reader = await source.reader(ref, window.dim, may_wait=may_wait)
    except (WindowNotFound, StoreCorrupt, ValueError) as error:
        raise RefusedError("window", f"{manifest.id}: {error}") from error
    except StoreError as error:
        raise RefusedError("store", f"{manifest.id}: {error}") from error
    if reader.dim != window.dim:
        await source.let_go(reader)
        raise RefusedError(
            "window", f"{manifest.id}: needs vectors of {window.dim}, not {reader.dim}"
        )
    return reader


async def _warm_cache(scorer: Scorer) -> None:
    """Fetches the items of the bundle's table; without them it only begins more slowly."""
    if isinstance(scorer.reader, CachedReader):
        try:
            await scorer.reader.warm(scorer.artifact.encoder.items.keys)
        except StoreError as error:
            log.warning("%s: the item cache begins empty: %s", scorer.id, error)


def _build(folder: Path, manifest: Manifest, reader: Reader, store_deadline_ms: float) -> Scorer:
    artifact = open_artifact(folder)
    if artifact.manifest != manifest or manifest.id != folder.name:
        raise BundleError(f"{folder.name}: its manifest is that of {artifact.manifest.id!r}")
    scores, items = (_open_model(artifact, p) for p in (artifact.model, artifact.item_model))
    _check_inputs(artifact, scores, items)
    graphs = Graphs(manifest, scores, items)
    scorer = Scorer(artifact, graphs, reader, store_deadline_ms)
    _check_golden(scorer)
    _warm_up(scorer)
    return scorer


def _open_model(artifact: Artifact, path: Path) -> ort.InferenceSession:
    try:
        return open_session(path)
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise RefusedError("model", f"{artifact.manifest.id}: {path.name}: {error}") from error


def _check_inputs(
    artifact: Artifact, scores_graph: ort.InferenceSession, item_graph: ort.InferenceSession
) -> None:
    """The graphs take what the manifest lists, and the encoder makes it in that type and shape."""
    manifest, request = artifact.manifest, _golden_request(artifact, 2)
    encoded, dim = artifact.encoder.request(request), artifact.manifest.window.dim
    windows, places = absent_windows(2, dim), np.arange(2)
    items: Arrays = {
        **artifact.encoder.item_inputs(encoded, places),
        **item_inputs(windows.items),
    }
    made: Arrays = {
        **encoded.inputs,
        **user_inputs(windows.user),
        "item_part": artifact.parts[:2],
    }
    _check_graph(manifest.id, item_graph, manifest.item_inputs, items, PART, 2)
    _check_graph(manifest.id, scores_graph, manifest.inputs, made, OUTPUT, 1)


def _check_graph(
    bundle_id: str,
    session: ort.InferenceSession,
    expected: Sequence[Tensor],
    made: Arrays,
    output: str,
    num_axes: int,
) -> None:
    listed = {tensor.name: tensor for tensor in expected}
    graph = {node.name: _tensor(node) for node in session.get_inputs()}
    if listed.keys() != graph.keys():
        differ = ", ".join(sorted(listed.keys() ^ graph.keys()))
        raise RefusedError(
            "inputs", f"{bundle_id}: in the manifest or the graph, not in both: {differ}"
        )
    outputs = [_tensor(node) for node in session.get_outputs()]
    if [(o.name, o.dtype, len(o.shape)) for o in outputs] != [(output, "float32", num_axes)]:
        right = f"{output} float32 in {num_axes} dimensions"
        raise RefusedError("inputs", f"{bundle_id}: output is {outputs}, must be {right}")
    for name, tensor in graph.items():
        if name not in made:
            raise RefusedError("inputs", f"{bundle_id}: nothing makes the graph's input {name!r}")
        for wanted in (tensor, listed[name]):
            _check_fits(bundle_id, name, made[name].dtype.name, made[name].shape, wanted)


def _tensor(node: ort.NodeArg) -> Tensor:
    # onnxruntime gives None for a dimension without a name.
    shape = tuple("?" if size is None else size for size in node.shape)
    return Tensor(node.name, _DTYPES.get(node.type, node.type), shape)


def _check_fits(
    bundle_id: str, name: str, dtype: str, shape: tuple[int, ...], expected: Tensor
) -> None:
    sizes = zip(shape, expected.shape, strict=False)
    fits = len(shape) == len(expected.shape) and all(
        isinstance(right, str) or left == right for left, right in sizes
    )
    if dtype != expected.dtype or not fits:
        raise RefusedError(
            "inputs",
            f"{bundle_id}: {name} is {dtype} {list(shape)}, must be"
            f" {expected.dtype} {list(expected.shape)}",
        )


def _check_golden(scorer: Scorer) -> None:
    """The recorded requests give the recorded scores, here too, and not one and the same score."""
    given = []
    for place, golden in enumerate(scorer.artifact.golden):
        # Both with parts of the table and with computed ones: they are to give equal scores.
        for from_table in (False, True):
            where = f"{scorer.id}: golden request {place}{', from the table' * from_table}"
            given.append(_golden_scores(scorer, golden, from_table, where))
    everything = np.concatenate(given)
    if np.ptp(everything) <= _SAME_SCORE * everything.max():
        raise RefusedError("constant", f"{scorer.id}: all golden scores are {everything.max():.6g}")


def _golden_scores(scorer: Scorer, golden: Golden, from_table: bool, where: str) -> Scores:
    try:
        windows = _recorded_windows(golden)
        scores = scorer.score_now(golden.request, windows, from_table=from_table)
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise RefusedError("golden", f"{where}: {error}") from error
    if scores.shape != golden.scores.shape:
        raise RefusedError("golden", f"{where}: {len(scores)} scores, not {len(golden.scores)}")
    worst = float(np.abs(scores - golden.scores).max(initial=0.0))
    if not worst <= TOLERANCE:
        raise RefusedError("golden", f"{where}: a score is off by {worst:.2g}, above {TOLERANCE:g}")
    return scores


def _recorded_windows(golden: Golden) -> RequestWindows:
    """The windows that a golden request was recorded with."""
    return RequestWindows(*(_windows_of(golden.windows, side) for side in ("user", "item")))


def _windows_of(arrays: Arrays, side: str) -> Windows:
    vectors, present = arrays[f"{side}_window"], arrays[f"{side}_window_present"]
    return Windows(vectors.astype(np.float32), present.astype(np.bool_))


def _warm_up(scorer: Scorer) -> None:
    """Runs every size without windows, which also shows that a degraded answer has scores."""
    dim = scorer.artifact.manifest.window.dim
    for num in WARM_UP_SIZES:
        request = _golden_request(scorer.artifact, num)
        try:
            for from_table in (False, True):
                scorer.score_now(request, absent_windows(num, dim), from_table=from_table)
        except Exception as error:  # onnxruntime's errors have no base of their own
            text = f"{scorer.id}: {num} candidates without windows: {error}"
            raise RefusedError("model", text) from error


def _golden_request(artifact: Artifact, num: int) -> Request:
    """The first golden request that has candidates, with `num` of them, in turn."""
    for golden in artifact.golden:
        if len(golden.request.item_ids):
            ids = golden.request.item_ids
            repeated = [ids[i % len(ids)] for i in range(num)]
            return replace(golden.request, item_ids=repeated, item_features={})
    raise RefusedError(
        "golden", f"{artifact.manifest.id}: golden.json has no request with candidates"
    )
