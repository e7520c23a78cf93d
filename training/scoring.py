"""Scores of a bundle without a service: the same encoder, windows, parts and graphs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from scipy.special import logit

from bundle.encode import Arrays, Encoded, Encoder, Request
from bundle.manifest import ITEM_MODEL, MODEL, PARTS
from bundle.parts import ItemParts, Run, read_parts
from embeddings_store.embedded import EmbeddedReader

Scores = npt.NDArray[np.float64]
Floats = npt.NDArray[np.float32]
_MOST = 60.0
"""The graph's own bound of a logit: a probability of 1 has none."""


class BundleScorer:
    """The two graphs of a bundle's folder, with an encoder that need not be the bundle's own."""

    def __init__(self, encoder: Encoder, folder: Path, *, own_items: bool = True) -> None:
        """own_items: the encoder's item table is that of the bundle, so its parts are right."""
        self._encoder = encoder
        self._session = _open_session(folder / MODEL)
        run = item_run(folder / ITEM_MODEL)
        table = read_parts(folder / PARTS, len(encoder.items.keys)) if own_items else None
        self._parts, self._computed = ItemParts(encoder, table, run), ItemParts(encoder, None, run)

    def score(self, request: Request, windows: Arrays, *, from_table: bool = True) -> Scores:
        """Probabilities float64 [N] of one request with its four windows; `from_table` is False to
        compute the parts of all items instead of looking them up."""
        encoded = self._encoder.request(request)
        parts = self._parts if from_table else self._computed
        lacking = parts.lacking(encoded)
        of_items = {name: windows[name][lacking] for name in windows if name.startswith("item_")}
        part = parts.of(encoded, lacking, of_items)
        return self._run({**encoded.inputs, **windows, "item_part": part})

    def score_all(self, reader: EmbeddedReader, requests: Sequence[Request]) -> list[Scores]:
        """Probabilities float64 [N] of each request, with windows from the store."""
        return [self._looked_up(reader, self._encoder.request(one)) for one in requests]

    def _looked_up(self, reader: EmbeddedReader, encoded: Encoded) -> Scores:
        lacking = self._parts.lacking(encoded)
        user = reader.lookup_now("users", encoded.user_key)
        items = reader.lookup_now("items", encoded.item_keys[lacking])
        of_user = {"user_window": user.vectors, "user_window_present": user.present}
        of_items = {"item_window": items.vectors, "item_window_present": items.present}
        part = self._parts.of(encoded, lacking, of_items)
        return self._run({**encoded.inputs, **of_user, "item_part": part})

    def _run(self, inputs: Arrays) -> Scores:
        feed = {value.name: inputs[value.name] for value in self._session.get_inputs()}
        scores: Scores = self._session.run(["score"], feed)[0].astype(np.float64)
        return scores


def item_run(model: Path) -> Run:
    """Runs the item graph at `model`."""
    session = _open_session(model)
    names = [value.name for value in session.get_inputs()]

    def run(inputs: Arrays) -> Floats:
        part: Floats = session.run(["part"], {name: inputs[name] for name in names})[0]
        return part

    return run


def logits_of(scores: Sequence[Scores]) -> Scores:
    """Logits float64 [n] of the probabilities of several requests, one after the other."""
    return np.clip(logit(np.concatenate(scores)), -_MOST, _MOST)


def _open_session(model: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
