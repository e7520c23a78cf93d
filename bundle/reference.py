"""How a bundle's scores are spread when it is made: what the scores that it gives later are held
against. Bins are the same for all bundles, so that counts of several can be added and compared."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bundle.manifest import REFERENCE

EDGES = tuple(float(f"{10 ** (quarter / 4):.3g}") for quarter in range(-28, 1))
"""Upper ends of the bins, rising, 0.0000001 .. 1: four to each power of ten."""
_EDGES = np.asarray(EDGES, np.float32)

Scores = npt.NDArray[np.float32] | npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def histogram(scores: Scores) -> Counts:
    """How many of the scores [N], each in 0 .. 1, fall into each bin: int64 [len(EDGES)]."""
    bins = _EDGES.searchsorted(scores.astype(np.float32, copy=False))
    return np.bincount(bins, minlength=len(EDGES))


def write_reference(path: Path, golden: Scores, whole: Scores) -> None:
    """golden: scores [N] of the golden requests, kept as 0 .. 100 % quantiles. whole: scores [M]
    of whole requests as they are served, kept as counts in the bins of `EDGES`."""
    quantiles = np.quantile(golden, np.linspace(0, 1, 21))
    document = {
        "quantiles": quantiles.tolist(),
        "count": len(golden),
        "edges": EDGES,
        "histogram": histogram(whole).tolist(),
    }
    path.write_text(json.dumps(document))


def read_histogram(folder: Path) -> Counts | None:
    """int64 [len(EDGES)]; None for bundles that have none, or have it in other bins."""
    try:
        found = json.loads((folder / REFERENCE).read_text())
        counts = np.asarray(found["histogram"], np.int64)
        fits = tuple(found["edges"]) == EDGES and counts.shape == (len(EDGES),)
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return counts if fits and counts.min() >= 0 and counts.sum() > 0 else None
