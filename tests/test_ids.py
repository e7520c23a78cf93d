"""Ids as keys: what the hash is, and that it stays what it is."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bundle.ids import IdCollisionError, hash_distinct, hash_ids

NUMS = (1, 3, 40)
"""Lengths of a column on either side of where another method is used."""

unhurried = settings(deadline=None)
texts = st.text(st.characters(exclude_categories=[]), max_size=30)


def reference(text: str) -> int:
    """FNV-1a, MurmurHash3's 64-bit finish and 63 bits, as their papers write them."""
    modulus = 2**64
    state = 14695981039346656037
    for letter in text.encode("utf-8", "surrogatepass"):
        state = ((state ^ letter) * 1099511628211) % modulus
    state ^= state >> 33
    state = (state * 0xFF51AFD7ED558CCD) % modulus
    state ^= state >> 33
    state = (state * 0xC4CEB9FE1A85EC53) % modulus
    state ^= state >> 33
    return state % 2**63 or 1


@unhurried
@given(st.lists(texts, max_size=40))
def test_every_id_gets_the_reference_hash_whatever_stands_beside_it(ids: list[str]) -> None:
    assert hash_ids(ids).tolist() == [reference(text) for text in ids]


@unhurried
@given(texts)
def test_an_id_has_the_same_key_alone_and_in_a_long_column(text: str) -> None:
    column = [text, *(f"filler-{i}" for i in range(100))]
    assert hash_ids([text]).tolist() == hash_ids(column)[:1].tolist() == [reference(text)]


@unhurried
@given(st.lists(st.integers(), max_size=40))
def test_an_integer_and_its_decimal_text_are_the_same_id(ids: list[int]) -> None:
    assert hash_ids(ids).tolist() == hash_ids([str(i) for i in ids]).tolist()


@pytest.mark.parametrize("num", NUMS)
@pytest.mark.parametrize(
    ("value", "key"),
    [
        ("", 8056974233673738534),
        (17, 6352112047898424620),
        ("17", 6352112047898424620),
        (-1, 3931816300471188059),
        (2**64, 312151134590271592),
        ("household-17", 192744465741916474),
        ("café", 8433869422665827046),
        ("日本", 1310764441268014659),
    ],
)
def test_keys_are_these_in_every_version(value: str | int, key: int, num: int) -> None:
    assert hash_ids([value] * num).tolist() == [key] * num


def test_another_process_with_another_hash_seed_gives_the_same_keys() -> None:
    code = "from bundle.ids import hash_ids; print(hash_ids(['a', 17, 'é']).tolist())"
    runs = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs == [f"{hash_ids(['a', 17, 'é']).tolist()}\n"] * 2


def test_a_trailing_zero_byte_and_a_leading_zero_are_part_of_the_id() -> None:
    ids = ["a", "a\0", "a\0\0", "", "\0", "07", "7"]
    for num in NUMS:
        assert len(set(hash_ids(ids * num).tolist())) == len(ids)


@pytest.mark.parametrize("num", NUMS)
def test_keys_are_uint64_that_fit_int64_and_are_never_the_padding(num: int) -> None:
    keys = hash_ids([f"id-{i}" for i in range(num * 100)])
    assert keys.dtype == np.uint64
    assert (keys.astype(np.int64) > 0).all()


def test_no_ids_give_no_keys() -> None:
    assert hash_ids([]).shape == hash_distinct([]).shape == (0,)
    assert hash_ids([]).dtype == np.uint64


def test_keys_spread_evenly_over_a_small_table() -> None:
    counts = np.bincount((hash_ids(range(100_000)) % np.uint64(100)).astype(np.int64))
    # Binomial: 1000 with a standard deviation of 31.
    assert len(counts) == 100
    assert (abs(counts - 1000) < 160).all()


def test_order_and_duplicates_are_kept() -> None:
    ids = ["b", "a", "long-long-long", "b", "ä", 7] * 10
    alone = {value: int(hash_ids([value])[0]) for value in ids}
    assert hash_ids(ids).tolist() == [alone[value] for value in ids]


@pytest.mark.parametrize("ids", [["a", "b", "a"], [7, *range(100, 200), "7"]])
def test_ids_that_share_a_key_are_refused_and_both_named(ids: list[str | int]) -> None:
    with pytest.raises(IdCollisionError) as caught:
        hash_distinct(ids)
    assert f"{ids[0]!r} and {ids[-1]!r}" in str(caught.value)


def test_distinct_ids_get_the_same_keys_as_any_others() -> None:
    ids = list(range(1000))
    assert hash_distinct(ids).tolist() == hash_ids(ids).tolist()
