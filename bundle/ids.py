"""Entity ids as 64-bit integers: hashed once at the border, compared as integers everywhere else.

The hash is FNV-1a over the UTF-8 bytes of the id (Fowler, Noll, Vo), finished by MurmurHash3's
64-bit mixer so that its low bits can be taken modulo a table size. It depends on nothing but the
bytes: the same in every process, version and machine. Integers are hashed as their decimal text,
so 17 and "17" are the same id.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Id = str | int
Keys = npt.NDArray[np.uint64]

_OFFSET = np.uint64(0xCBF29CE484222325)
_PRIME = np.uint64(0x00000100000001B3)
_MIX_1 = np.uint64(0xFF51AFD7ED558CCD)
_MIX_2 = np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)
# ONNX has no unsigned arithmetic to speak of: 63 bits fit its int64 without a sign.
_POSITIVE = np.uint64((1 << 63) - 1)


class IdCollisionError(ValueError):
    """Two different ids have the same 64-bit hash: one of them has to be renamed."""


def hash_ids(ids: Sequence[Id]) -> Keys:
    """Keys uint64 [n], each in 1 .. 2**63 - 1, of n ids. Key 0 is never returned: it pads."""
    encoded = [str(value).encode("utf-8", "surrogatepass") for value in ids]
    if not encoded:
        return np.empty(0, np.uint64)
    lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    width = max(int(lengths.max()), 1)
    # Column-major, so that each step below reads one contiguous row of bytes.
    letters = np.array(encoded, f"S{width}").view(np.uint8).reshape(len(encoded), width).T.copy()
    state = np.full(len(encoded), _OFFSET)
    shortest = int(lengths.min())
    for position in range(width):
        mixed = (state ^ letters[position]) * _PRIME
        state = mixed if position < shortest else np.where(position < lengths, mixed, state)
    return _finish(state)


def hash_distinct(ids: Sequence[Id]) -> Keys:
    """Like `hash_ids`, for ids that all differ.

    Raises:
        IdCollisionError: two of them share a key (or are equal); the message names both.
    """
    keys = hash_ids(ids)
    order = np.argsort(keys, kind="stable")
    same = np.flatnonzero(np.diff(keys[order]) == 0)
    if same.size:
        first, second = ids[int(order[same[0]])], ids[int(order[same[0] + 1])]
        raise IdCollisionError(f"ids {first!r} and {second!r} have the same key; rename one")
    return keys


def _finish(state: Keys) -> Keys:
    state = (state ^ (state >> _SHIFT)) * _MIX_1
    state = (state ^ (state >> _SHIFT)) * _MIX_2
    state = (state ^ (state >> _SHIFT)) & _POSITIVE
    return np.maximum(state, np.uint64(1))
