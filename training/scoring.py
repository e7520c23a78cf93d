"""Scores of a bundle without a service: the same encoder, windows and graph."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime
from scipy.special import logit

from bundle.encode import Arrays, Encoder, Request
from embeddings_store.embedded import EmbeddedReader

Scores = npt.NDArray[np.float64]
_MOST = 60.0
"""The graph's own bound of a logit: a probability of 1 has none."""


def open_session(model: Path) -> onnxruntime.InferenceSession:
    """A session of the exported graph with one thread."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def run_session(session: onnxruntime.InferenceSession, inputs: Arrays) -> Scores:
    """Probabilities float64 [N] of one request."""
    feed = {value.name: inputs[value.name] for value in session.get_inputs()}
    scores: Scores = session.run(["score"], feed)[0].astype(np.float64)
    return scores


def score_requests(
    encoder: Encoder, model: Path, reader: EmbeddedReader, requests: Sequence[Request]
) -> list[Scores]:
    """Probabilities float64 [N] of each request."""
    session = open_session(model)
    scores = []
    for request in requests:
        encoded = encoder.request(request)
        user = reader.lookup_now("users", encoded.user_key)
        items = reader.lookup_now("items", encoded.item_keys)
        windows: Arrays = {
            "user_window": user.vectors,
            "user_window_present": user.present,
            "item_window": items.vectors,
            "item_window_present": items.present,
        }
        scores.append(run_session(session, encoded.inputs | windows))
    return scores


def logits_of(scores: Sequence[Scores]) -> Scores:
    """Logits float64 [n] of the probabilities of several requests, one after the other."""
    return np.clip(logit(np.concatenate(scores)), -_MOST, _MOST)
