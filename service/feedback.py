"""What became of the scores: who was clicked, as callers report it, against what was predicted.

The report carries the score and the model, as the answer gave them (decision 14): any process of
any pod can take it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from hashlib import blake2b
from itertools import compress
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from bundle.ids import Id
from service.recent import Counts, Recent
from service.schemas import Event

Outcome = Literal["counted", "duplicate", "unknown_model"]
WINDOW_S = 3600.0
SLICE_S = 60.0
SEEN_SLOTS = 1 << 20
"""Of 8 bytes, so 8 MiB for all processes together."""
_EDGES = 1 / (1 + np.exp(-np.linspace(-14, 14, 401)))
"""Ends of the bins by which AUC is computed: scores whose odds differ by less than 7 % may be tied.
"""


@dataclass(frozen=True)
class Observed:
    """One model in the last hour. Not a number where there is nothing to divide by."""

    num: int
    ctr: float
    """Clicks per event."""
    pcoc: float
    """Predicted over observed clicks."""
    auc: float


class Feedback:
    """Takes events and says what they show, over all processes that share the folder."""

    def __init__(self, recent: Recent, shared: Path | None = None) -> None:
        self._recent, self._seen = recent, Seen(shared)
        self.known: Set[str] = frozenset()
        """Ids of the models that there are; others are taken for a mistake, and make no label."""

    def take(self, events: Sequence[Event]) -> dict[Outcome, int]:
        """Counts events; how many had which outcome."""
        known = [event for event in events if event.model in self.known]
        is_new = self._seen.add([(event.request_id, event.item) for event in known])
        counted: dict[str, list[Event]] = {}
        for event in compress(known, is_new.tolist()):
            counted.setdefault(event.model, []).append(event)
        for model, of_model in counted.items():
            scores = np.array([event.score for event in of_model])
            clicked = np.array([event.clicked for event in of_model])
            spread = np.stack([_spread(scores[~clicked]), _spread(scores[clicked])])
            self._recent.add(f"events {model}", spread)
            self._recent.add(f"predicted {model}", scores.sum())
        num_new = int(is_new.sum())
        return {
            "counted": num_new,
            "duplicate": len(known) - num_new,
            "unknown_model": len(events) - len(known),
        }

    def observed(self) -> Iterator[tuple[str, Observed]]:
        """By model, of those that had events in the last hour."""
        total = self._recent.total()
        for name, counts in total.items():
            kind, _, model = name.partition(" ")
            if kind == "events":
                yield model, _observed(counts, float(total[f"predicted {model}"]))


class Seen:
    """Which (request, item) had feedback already: a table of hashes with one place for each, in
    which a newer one displaces an older one. Bounded, and the same for all processes of a folder.
    """

    def __init__(self, shared: Path | None = None) -> None:
        self._hashes = np.zeros(SEEN_SLOTS, np.uint64) if shared is None else _mapped(shared)

    def add(self, events: Sequence[tuple[str, Id]]) -> npt.NDArray[np.bool_]:
        """Which of the events, by request and item, come for the first time: [N]."""
        hashes = np.array([_hash(*event) for event in events], np.uint64)
        places = hashes % SEEN_SLOTS
        is_new: npt.NDArray[np.bool_] = self._hashes[places] != hashes
        self._hashes[places] = hashes
        _, first = np.unique(hashes, return_index=True)
        is_first = np.zeros(len(hashes), np.bool_)
        is_first[first] = True
        return is_new & is_first


def _mapped(folder: Path) -> npt.NDArray[np.uint64]:
    """The folder's table: empty for whoever comes first, as it is for the others."""
    path = folder / "feedback-seen.bin"
    with path.open("ab") as file:
        file.truncate(SEEN_SLOTS * 8)
    return np.memmap(path, np.uint64, "r+", shape=(SEEN_SLOTS,))


def _hash(request_id: str, item: Id) -> int:
    digest = blake2b(f"{request_id}\0{item}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) or 1  # 0 is an empty place


def _spread(scores: Counts) -> npt.NDArray[np.int64]:
    """How many scores [N] are in each bin: [B]."""
    return np.bincount(np.searchsorted(_EDGES, scores), minlength=len(_EDGES) + 1)


def _observed(counts: Counts, predicted: float) -> Observed:
    """counts: [2, B], events that were not and that were clicked, by bin of the score."""
    num, clicks = float(counts.sum()), float(counts[1].sum())
    pcoc = predicted / clicks if clicks else np.nan
    return Observed(int(num), clicks / num, pcoc, auc(counts[0], counts[1]))


def auc(negatives: Counts, positives: Counts) -> float:
    """Share of pairs in which the positive has the higher bin, ties by half; [B] each."""
    pairs = negatives.sum() * positives.sum()
    if not pairs:
        return float("nan")
    below = np.cumsum(negatives) - negatives / 2
    return float((positives * below).sum() / pairs)
