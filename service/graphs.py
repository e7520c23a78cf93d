"""The two graphs of a bundle, in onnxruntime."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from bundle.encode import Arrays
from bundle.manifest import Manifest
from service.errors import ImpossibleScoreError

Scores = npt.NDArray[np.float32]
OUTPUT = "score"
PART = "part"


class Graphs:
    """Runs both. Refers to nothing that refers to it, so that a bundle which was replaced is freed
    at once, and not by some garbage collection."""

    def __init__(
        self, manifest: Manifest, scores: ort.InferenceSession, items: ort.InferenceSession
    ) -> None:
        self._id = manifest.id
        self._sessions: tuple[ort.InferenceSession, ort.InferenceSession] | None = (scores, items)
        self._inputs = [tensor.name for tensor in manifest.inputs]
        self._item_inputs = [tensor.name for tensor in manifest.item_inputs]

    def scores(self, inputs: Arrays) -> Scores:
        """float32 [N], of the manifest's inputs.

        Raises:
            ImpossibleScoreError: not one finite number in 0 .. 1 per candidate.
        """
        assert self._sessions is not None, "a released bundle was used"
        feed = {name: inputs[name] for name in self._inputs}
        (scores,) = self._sessions[0].run([OUTPUT], feed)
        # Comparisons are false for NaN, so this refuses NaN and infinities too.
        expected = (len(inputs["item_part"]),)
        if scores.shape != expected or not ((scores >= 0) & (scores <= 1)).all():
            raise ImpossibleScoreError(
                f"{self._id}: scores outside 0 .. 1, or not one per candidate"
            )
        result: Scores = scores
        return result

    def item_parts(self, inputs: Arrays) -> Scores:
        """float32 [m, P], of the manifest's item inputs."""
        assert self._sessions is not None, "a released bundle was used"
        feed = {name: inputs[name] for name in self._item_inputs}
        (part,) = self._sessions[1].run([PART], feed)
        result: Scores = part
        return result

    def release(self) -> None:
        """Frees the sessions and their models; takes a while, so not on the event loop."""
        self._sessions = None


def open_session(path: Path) -> ort.InferenceSession:
    """A session over the model at `path`; its external data stays on disk, memory-mapped.

    onnxruntime itself refuses external data outside the model's folder, and links out of it.
    """
    options = ort.SessionOptions()
    # More than one thread costs a small model more in hand-overs than it gains, and threads that
    # spin while they wait take the processor from everything else.
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    # Denormals make some inputs many times slower. The calling thread flushes them from now on.
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
