"""Rows by id: what was learnt is found, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle import known
from bundle.ids import Id
from bundle.known import UNKNOWN, KnownRows

INT64 = np.iinfo(np.int64)
# Multiples of a power of two have the same place in a small table, as often as not.
integers = st.integers(INT64.min, INT64.max) | st.integers(-50, 50).map(lambda n: n << 54)
kinds = st.sampled_from(["integers", "texts"])


def column(ids: Sequence[int], kind: str) -> Sequence[Id]:
    return np.array(ids, np.int64) if kind == "integers" else [str(value) for value in ids]  # type: ignore[return-value]


@settings(deadline=None)
@given(steps=st.lists(st.lists(st.tuples(integers, st.integers(0, 9)), max_size=40)), kind=kinds)
def test_each_id_has_the_row_that_was_learnt_last(
    steps: list[list[tuple[int, int]]], kind: str
) -> None:
    rows, right = KnownRows(), dict[int, int]()
    for step in steps:
        distinct = dict(step)
        rows.learn(column(list(distinct), kind), np.array(list(distinct.values()), np.int64))
        right |= distinct
        asked = [*right, *(value ^ 1 for value in right), 0]
        expected = [right.get(value, UNKNOWN) for value in asked]
        assert rows.find(column(asked, kind)).tolist() == expected


@pytest.mark.parametrize("kind", ["integers", "texts"])
def test_an_id_that_is_learnt_twice_at_once_is_one(kind: str) -> None:
    rows = KnownRows()
    rows.learn(column([7, 7, 8], kind), np.array([3, 3, 4]))
    assert rows.find(column([8, 7, 7, 9], kind)).tolist() == [4, 3, 3, UNKNOWN]


def test_a_number_and_its_text_are_remembered_apart() -> None:
    rows = KnownRows()
    rows.learn(["17"], np.array([1]))
    assert rows.find(np.array([17])).tolist() == [UNKNOWN]  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["integers", "texts"])
def test_it_grows_with_what_it_knows_and_no_further(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr(known, "MOST", 5000)
    rows = KnownRows()
    for start in range(0, 5000, 500):
        ids = column(range(start, start + 500), kind)
        rows.learn(ids, np.arange(start, start + 500))
    assert rows.find(column(range(5000), kind)).tolist() == list(range(5000))
    ids = column(range(6000, 9000), kind)
    rows.learn(ids, np.arange(3000))
    assert rows.find(ids).tolist() == list(range(3000))
    assert rows.find(column([0, 4999], kind)).tolist() == [UNKNOWN, UNKNOWN]
