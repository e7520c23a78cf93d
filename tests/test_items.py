"""The item table: looked up by key, from memory and from disk, and refused when it doesn't fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.ids import hash_distinct, hash_ids
from bundle.items import ItemTable, ItemTableError


def table_of(ids: list[int]) -> ItemTable:
    """Item i has i in its one category and its one number."""
    column = np.array(ids, np.int32).reshape(len(ids), 1)
    numeric = np.concatenate([column, np.ones_like(column)], axis=1).astype(np.float32)
    return ItemTable.build(hash_distinct(ids), column, numeric)


@settings(deadline=None)
@given(st.lists(st.integers(1, 10**6), unique=True, max_size=40), st.lists(st.integers(1, 60)))
def test_every_item_has_its_own_row_and_any_other_the_row_of_zeros(
    known: list[int], others: list[int]
) -> None:
    table, asked = table_of(known), [*reversed(known), *others, *known]
    rows = table.rows(hash_ids(asked))
    expected = [i if i in known else 0 for i in asked]
    assert table.categorical[rows][:, 0].tolist() == expected
    assert table.numeric[rows].tolist() == [[i, float(i > 0)] for i in expected]
    assert all(
        (row == table.missing_row) == (i == 0) for row, i in zip(rows, expected, strict=True)
    )


@pytest.mark.parametrize("num", [0, 1, 100])
def test_a_table_comes_back_from_disk_as_it_was_and_mapped(tmp_path: Path, num: int) -> None:
    ids = list(range(1, num + 1))
    written = table_of(ids)
    written.write(tmp_path / "items")
    read = ItemTable.read(tmp_path / "items")
    for name in ("keys", "categorical", "numeric"):
        array = getattr(read, name)
        assert np.array_equal(array, getattr(written, name))
        assert array.dtype == getattr(written, name).dtype
        assert array.size == 0 or isinstance(array.base, np.memmap)
        assert not array.flags.writeable
    keys = hash_ids([*ids, 999])
    assert read.rows(keys).tolist() == written.rows(keys).tolist()


def test_a_table_without_categories_or_numbers_can_be_read(tmp_path: Path) -> None:
    nothing = np.empty((3, 0))
    table = ItemTable.build(hash_ids([1, 2, 3]), nothing.astype(np.int32), nothing.astype("f4"))
    table.write(tmp_path)
    assert ItemTable.read(tmp_path).categorical.shape == (4, 0)


def test_what_is_gathered_is_a_copy_and_the_file_stays_as_it_is(tmp_path: Path) -> None:
    table_of([1, 2]).write(tmp_path)
    table = ItemTable.read(tmp_path)
    gathered = table.numeric.take(table.rows(hash_ids([1])), axis=0)
    gathered[:] = 7
    assert ItemTable.read(tmp_path).numeric.max() == 2


@pytest.mark.parametrize("name", ["keys", "categorical", "numeric"])
def test_a_file_that_is_absent_cut_or_no_array_is_refused(tmp_path: Path, name: str) -> None:
    table_of(list(range(1, 50))).write(tmp_path)
    path = tmp_path / f"{name}.npy"
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:20], b"", b"not an array at all"):
        path.write_bytes(content)
        with pytest.raises(ItemTableError, match="unreadable item table"):
            ItemTable.read(tmp_path)
    path.unlink()
    with pytest.raises(ItemTableError, match=f"{name}.npy"):
        ItemTable.read(tmp_path)


def test_arrays_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    table = table_of([1, 2, 3])
    table.write(tmp_path)
    np.save(tmp_path / "categorical.npy", table.categorical[:-1])
    with pytest.raises(ItemTableError, match="3 keys need 4 rows, there are 3 categorical and 4"):
        ItemTable.read(tmp_path)


@pytest.mark.parametrize(
    ("name", "dtype", "ndim"),
    [
        ("keys", "int64", 1),
        ("keys", "uint64", 2),
        ("categorical", "int64", 2),
        ("categorical", "int32", 1),
        ("numeric", "float64", 2),
        ("numeric", "float32", 3),
    ],
)
def test_an_array_of_another_type_or_rank_is_refused(
    tmp_path: Path, name: str, dtype: str, ndim: int
) -> None:
    table = table_of([1, 2, 3])
    table.write(tmp_path)
    np.save(
        tmp_path / f"{name}.npy", np.zeros((len(getattr(table, name)),) + (1,) * (ndim - 1), dtype)
    )
    with pytest.raises(ItemTableError, match=f"{dtype} in {ndim} dimensions, not"):
        ItemTable.read(tmp_path)


def test_keys_that_are_not_sorted_or_repeat_are_refused(tmp_path: Path) -> None:
    table = table_of([1, 2, 3])
    for keys in (table.keys[::-1], table.keys[[0, 1, 1]]):
        table.write(tmp_path)
        np.save(tmp_path / "keys.npy", keys)
        with pytest.raises(ItemTableError, match="do not rise"):
            ItemTable.read(tmp_path)
