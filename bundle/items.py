"""The item table: encoded features of all items, so that a request may send ids alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from bundle.ids import Keys

_FILES = ("keys", "categorical", "numeric", "absent")
_DTYPES = (np.dtype(np.uint64), np.dtype(np.int32), np.dtype(np.float32), np.dtype(np.uint8))
_NDIMS = (1, 2, 2, 2)
_T = TypeVar("_T", bound=np.generic)


class ItemTableError(ValueError):
    """The item table on disk is not usable; the message names the file and what is wrong."""


@dataclass(frozen=True)
class ItemTable:
    """Encoded item features, sorted by key, with a last row of zeros that stands for *missing*.

    keys: uint64 [n], rising. categorical: int32 [n + 1, F]. numeric: float32 [n + 1, 2 G], a value
    and a presence mark per feature. absent: uint8 [n + 1, ceil((F + G) / 8)], a bit per feature,
    set where it has no value, as `numpy.packbits` packs them. Columns stand in the order of the
    spec, categorical features first.
    """

    keys: Keys
    categorical: npt.NDArray[np.int32]
    numeric: npt.NDArray[np.float32]
    absent: npt.NDArray[np.uint8]

    @classmethod
    def build(
        cls, keys: Keys, categorical: npt.NDArray[np.int32], numeric: npt.NDArray[np.float32]
    ) -> ItemTable:
        """A table of n rows in any order: categorical int32 [n, F], numeric float32 [n, 2 G]."""
        order = np.argsort(keys)
        columns, numbers = _with_missing(categorical[order]), _with_missing(numeric[order])
        absent = np.concatenate([columns == 0, numbers[:, 1::2] == 0], axis=1)
        return cls(keys[order], columns, numbers, np.packbits(absent, axis=1))

    @classmethod
    def read(cls, folder: Path) -> ItemTable:
        """Memory-maps the table in `folder`.

        Raises:
            ItemTableError: a file is absent, truncated, or does not fit the others.
        """
        try:
            # Plain views of the maps: every look-up through np.memmap costs microseconds more.
            arrays = [np.asarray(np.load(folder / f"{n}.npy", mmap_mode="r")) for n in _FILES]
        except (OSError, ValueError, EOFError) as error:
            raise ItemTableError(f"{folder}: unreadable item table: {error}") from error
        keys, categorical, numeric, absent = arrays
        for array, dtype, ndim in zip(arrays, _DTYPES, _NDIMS, strict=True):
            if (array.dtype, array.ndim) != (dtype, ndim):
                raise ItemTableError(
                    f"{folder}: {array.dtype} in {array.ndim} dimensions, not {dtype} in {ndim}"
                )
        if not (keys[1:] > keys[:-1]).all():
            raise ItemTableError(f"{folder}: keys do not rise")
        num_rows = {len(categorical), len(numeric), len(absent)}
        if num_rows != {len(keys) + 1}:
            raise ItemTableError(
                f"{folder}: {len(keys)} keys need {len(keys) + 1} rows, there are"
                f" {len(categorical)} categorical and {len(numeric)} numeric ones"
            )
        num_bits = categorical.shape[1] + numeric.shape[1] // 2
        if absent.shape[1] != -(-num_bits // 8):
            raise ItemTableError(f"{folder}: absent marks are not of {num_bits} features")
        return cls(keys, categorical, numeric, absent)

    def write(self, folder: Path) -> None:
        """Writes the table into `folder`, which is created."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in _FILES:
            np.save(folder / f"{name}.npy", getattr(self, name))

    def rows(self, keys: Keys) -> npt.NDArray[np.int64]:
        """Row numbers int64 [m] of the given keys [m]; an unknown key gets the row of zeros."""
        if not len(self.keys):
            return np.zeros(len(keys), np.int64)
        found = np.searchsorted(self.keys, keys)
        inside = np.minimum(found, len(self.keys) - 1)
        return np.where(self.keys[inside] == keys, inside, len(self.keys))

    @property
    def missing_row(self) -> int:
        return len(self.keys)


def _with_missing(rows: npt.NDArray[_T]) -> npt.NDArray[_T]:
    return np.concatenate([rows, np.zeros((1, rows.shape[1]), rows.dtype)])
