"""What the network makes of each item alone, whoever the user is.

It is computed once, when a bundle is exported, for all items of its table, and read from there.
Items that are not in the table, and those for which a request has other values than the table, are
run through the bundle's item graph when they are asked for: slower, with equal scores.

A part is a row of numbers that only the bundle's two graphs understand, but for the last one: it is
0 where the item has no TPM window.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from bundle.encode import Arrays, Encoded, Encoder

Floats = npt.NDArray[np.float32]
Places = npt.NDArray[np.int64]
Run = Callable[[Arrays], Floats]
"""Runs the item graph: its named inputs of m items -> parts float32 [m, P]."""


class PartsError(ValueError):
    """The parts on disk are not usable; the message names the file and what is wrong."""


class ItemParts:
    """Parts of the candidates of a request."""

    def __init__(self, encoder: Encoder, table: Floats | None, run: Run) -> None:
        """table: float32 [n + 1, P], a row per row of the item table; None computes all of them."""
        self._encoder, self._table, self._run = encoder, table, run

    def lacking(self, encoded: Encoded) -> Places:
        """Places of the candidates that have to be run through the item graph, whose windows are
        needed: int64 [m], rising."""
        own_values = encoded.item_cat is not None or encoded.item_num is not None
        if self._table is None or own_values:
            return np.arange(len(encoded.item_rows))
        return np.flatnonzero(encoded.item_rows == self._encoder.items.missing_row)

    def of(self, encoded: Encoded, lacking: Places, windows: Arrays) -> Floats:
        """float32 [N, P]. windows: those of the m candidates that are lacking, as the item graph
        takes them; not read where there are none."""
        if self._table is None or len(lacking) == len(encoded.item_rows):
            return self._run({**self._encoder.item_inputs(encoded, lacking), **windows})
        parts: Floats = self._table.take(encoded.item_rows, axis=0)
        if len(lacking):
            parts[lacking] = self._run({**self._encoder.item_inputs(encoded, lacking), **windows})
        return parts


def read_parts(path: Path, num_items: int) -> Floats:
    """Memory-maps the parts of `num_items` items and of the missing one.

    Raises:
        PartsError: absent, truncated, or of another number of items.
    """
    try:
        parts: Floats = np.asarray(np.load(path, mmap_mode="r"))
    except (OSError, ValueError, EOFError) as error:
        raise PartsError(f"{path}: unreadable: {error}") from error
    if parts.dtype != np.float32 or parts.ndim != 2 or len(parts) != num_items + 1:
        found = f"{parts.dtype} {list(parts.shape)}"
        raise PartsError(f"{path}: {found}, must be float32 [{num_items + 1}, P]")
    return parts
