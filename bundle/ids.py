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

_OFFSET = 0xCBF29CE484222325
_PRIME = 0x00000100000001B3
_MIX_1 = 0xFF51AFD7ED558CCD
_MIX_2 = 0xC4CEB9FE1A85EC53
_SHIFT = 33
# ONNX has no unsigned arithmetic to speak of: 63 bits fit its int64 without a sign.
_POSITIVE = (1 << 63) - 1
_64_BITS = (1 << 64) - 1
_FEW = 16
"""Up to so many ids, plain integers are faster than arrays."""


class IdCollisionError(ValueError):
    """Two different ids have the same 64-bit hash: one of them has to be renamed."""


def hash_ids(ids: Sequence[Id]) -> Keys:
    """Keys uint64 [n], each in 1 .. 2**63 - 1, of n ids. Key 0 is never returned: it pads."""
    texts = list(map(str, ids.tolist() if isinstance(ids, np.ndarray) else ids))
    if len(texts) <= _FEW:
        return np.array([_key(text) for text in texts], np.uint64)
    joined = "".join(texts)
    if joined.isascii():  # one encoding for all of them, and a character is a byte
        data, sizes = joined.encode(), map(len, texts)
    else:
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
        data, sizes = b"".join(encoded), map(len, encoded)
    letters = np.frombuffer(data, np.uint8)
    lengths = np.fromiter(sizes, np.int64, len(texts))
    # Longest first: those that still have a letter at a position are then the first so many, and
    # one long id costs its own length and not everyone's.
    order = np.argsort(-lengths, kind="stable")
    starts = (np.cumsum(lengths) - lengths)[order]
    num_ended = np.cumsum(np.bincount(lengths))
    state = np.full(len(texts), _OFFSET, np.uint64)
    for position, num in enumerate((len(texts) - num_ended[:-1]).tolist()):
        state[:num] = (state[:num] ^ letters.take(starts[:num] + position)) * _PRIME
    keys = np.empty_like(state)
    keys[order] = _finish(state)
    return keys


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
    shift = np.uint64(_SHIFT)
    for factor in (np.uint64(_MIX_1), np.uint64(_MIX_2)):
        state = (state ^ (state >> shift)) * factor
    keys: Keys = np.maximum((state ^ (state >> shift)) & np.uint64(_POSITIVE), np.uint64(1))
    return keys


def _key(text: str) -> int:
    """The same of one id, in Python's integers, which have to be told where they end."""
    state = _OFFSET
    for letter in text.encode("utf-8", "surrogatepass"):
        state = (state ^ letter) * _PRIME & _64_BITS
    for factor in (_MIX_1, _MIX_2):
        state = (state ^ (state >> _SHIFT)) * factor & _64_BITS
    return max((state ^ (state >> _SHIFT)) & _POSITIVE, 1)
