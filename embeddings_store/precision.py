"""How a vector and its bias are stored: float16, float32, or int8 with a scale per vector.

int8: a vector of D numbers takes D bytes, its scale and its bias a float16 each. The scale is
chosen so that the largest magnitude of the vector becomes 127, so a number is off by at most half a
scale: 1/254 of that magnitude.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias, cast, get_args

import numpy as np
from numpy.typing import NDArray

Precision = Literal["float16", "float32", "int8"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

Floats: TypeAlias = NDArray[np.float32]
Block: TypeAlias = NDArray[np.float16] | NDArray[np.float32] | NDArray[np.int8]

_DTYPES: Mapping[str, np.dtype[np.generic]] = {
    "float16": np.dtype("<f2"),
    "float32": np.dtype("<f4"),
    "int8": np.dtype("i1"),
}
_HALF = np.dtype("<f2")
_LEVELS = 127
_TAIL = 2 * _HALF.itemsize  # scale and bias of an int8 vector
# numpy converts float16 one value at a time; a table of all 65,536 of them is twice as fast.
_HALF_TO_FLOAT: Floats = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


def row_shape(
    dim: int, precision: str, months: int
) -> tuple[np.dtype[np.generic], tuple[int, int]]:
    """Type and shape of what is stored for one entity; KeyError for an unknown precision."""
    return _DTYPES[precision], (months, dim + (_TAIL if precision == "int8" else 1))


def to_stored(values: Floats, precision: Precision) -> Block:
    """float32 [..., D + 1], the bias last -> what is stored. A value that does not fit becomes an
    infinity or NaN in `to_float32`, for the caller to refuse."""
    with np.errstate(over="ignore", invalid="ignore"):
        if precision == "int8":
            return _quantised(values)
        stored: Block = values.astype(_DTYPES[precision])
        return stored


def to_float32(stored: Block) -> Floats:
    """What is stored -> float32 [..., D + 1], a copy."""
    if stored.dtype == np.float16:
        # Every uint16 has a row, so nothing wraps; to check that costs a fifth of the time.
        return _HALF_TO_FLOAT.take(stored.view(np.uint16), mode="wrap")
    if stored.dtype == np.int8:
        return _dequantised(cast("NDArray[np.int8]", stored))
    return stored.astype(np.float32)


def _quantised(values: Floats) -> Block:
    vectors, biases = values[..., :-1], values[..., -1:]
    largest = np.abs(vectors).max(axis=-1, keepdims=True, initial=0.0)
    scales = (largest / _LEVELS).astype(_HALF)
    # The scale as it is stored, rounded to half precision; a level beyond 127 is cut.
    steps = np.divide(vectors, scales, out=np.zeros_like(vectors), where=scales > 0)
    levels = np.rint(np.nan_to_num(steps)).clip(-_LEVELS, _LEVELS).astype(np.int8)
    tail = np.concatenate([scales, biases.astype(_HALF)], axis=-1)
    return np.concatenate([levels, tail.view(np.int8)], axis=-1)


def _dequantised(stored: NDArray[np.int8]) -> Floats:
    tail = to_float32(np.ascontiguousarray(stored[..., -_TAIL:]).view(_HALF))
    values = np.empty((*stored.shape[:-1], stored.shape[-1] - _TAIL + 1), np.float32)
    with np.errstate(invalid="ignore"):  # an infinite scale makes no numbers of zeros
        np.multiply(stored[..., :-_TAIL], tail[..., :1], out=values[..., :-1])
    values[..., -1] = tail[..., 1]
    return values
