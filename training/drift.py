"""How far a month's vectors have moved from those of the month before, on what both months know.

A window joins three months' vectors, and the networks learned to read them: both need that one
month's axes mean what the last month's did. Months that continue from each other keep their axes;
months that are trained from nothing come out rotated at random, and one rotation undoes that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes

from embeddings_store import ENTITIES, Entity, Snapshot
from training.config import TpmConfig

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Drift:
    """From one snapshot of an entity to the next."""

    entity: Entity
    common: int
    """Ids that both snapshots have."""
    cosine: float
    """Mean cosine of an id's two vectors: 1 where nothing turned; NaN where nothing is common."""
    residual: float
    """What the best rotation (Schoenemann 1966) leaves, as a share of the earlier vectors' norm: 0
    where all turned alike, above 1 where the two have nothing to do with each other."""

    def reasons(self, config: TpmConfig) -> list[str]:
        """Why the later snapshot must not be served beside the earlier; empty where it may."""
        found = []
        if not self.cosine >= config.min_cosine:
            found.append(f"{self.entity}: cosine {self.cosine:.3f}, at least {config.min_cosine}")
        if not self.residual <= config.max_residual:
            limit = config.max_residual
            found.append(f"{self.entity}: residual {self.residual:.3f}, at most {limit}")
        return [f"{one} is right ({self.common:,} in common)" for one in found]


def measure_drift(entity: Entity, previous: Snapshot, current: Snapshot) -> Drift:
    """Compares the vectors of two snapshots of an entity; their biases, which no rotation changes,
    are not looked at."""
    before, after = _common(previous, current)
    if not len(before):
        return Drift(entity, 0, float("nan"), float("nan"))
    turned = after @ orthogonal_procrustes(after, before)[0]
    lengths = np.linalg.norm(before, axis=1) * np.linalg.norm(after, axis=1)
    cosines = np.einsum("nd,nd->n", before, after) / np.maximum(lengths, 1e-12)
    residual = np.linalg.norm(turned - before) / np.linalg.norm(before)
    return Drift(entity, len(before), float(cosines.mean()), float(residual))


def rotation(
    previous: Mapping[Entity, Snapshot], current: Mapping[Entity, Snapshot]
) -> npt.NDArray[np.float32]:
    """The orthogonal matrix float32 [D, D] that brings `current` closest to `previous` (orthogonal
    Procrustes, Schoenemann 1966): one for users and items, so that dot products stay; both
    entities weigh the same, however many they are."""
    pairs = [_common(previous[entity], current[entity]) for entity in ENTITIES]
    before, after = (
        np.concatenate([side / max(float(np.linalg.norm(side)), 1e-12) for side in sides])
        for sides in zip(*pairs, strict=True)
    )
    found: npt.NDArray[np.float32] = orthogonal_procrustes(after, before)[0].astype(np.float32)
    return found


def _common(previous: Snapshot, current: Snapshot) -> tuple[Floats, Floats]:
    """Vectors float64 [n, D] of the ids that both have, in the same order."""
    _, before, after = np.intersect1d(
        previous.ids, current.ids, assume_unique=True, return_indices=True
    )
    return previous.vectors[before].astype(np.float64), current.vectors[after].astype(np.float64)
