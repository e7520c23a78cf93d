"""How vectors are stored: what comes back, and what is seen not to fit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from embeddings_store.precision import PRECISIONS, row_shape, to_float32, to_stored

DIM = 6
usual = st.floats(-1000, 1000, width=32).filter(lambda value: value == 0 or abs(value) > 1e-2)
values = arrays(
    np.float32, st.tuples(st.integers(0, 5), st.just(3), st.just(DIM + 1)), elements=usual
)


@settings(max_examples=200, deadline=None)
@given(given_values=values, precision=st.sampled_from(PRECISIONS))
def test_what_comes_back_is_as_near_as_the_precision_allows(
    given_values: Any, precision: Any
) -> None:
    back = to_float32(to_stored(given_values, precision))
    assert back.shape == given_values.shape
    assert back.dtype == np.float32
    vectors, biases = np.abs(given_values[..., :-1]), np.abs(given_values[..., -1])
    # Half a level, and what rounding the scale to half precision moves the largest one by.
    level = vectors.max(axis=-1, keepdims=True) * (0.5 / 127 + 2**-11)
    error = {"float32": 0 * vectors, "float16": vectors * 2**-11, "int8": level}[precision]
    assert (np.abs(back - given_values)[..., :-1] <= error * 1.001).all()
    bias_error = 0 if precision == "float32" else 2**-11
    assert (np.abs(back - given_values)[..., -1] <= biases * bias_error).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_vector_of_zeros_stays_one_and_keeps_its_bias(precision: Any) -> None:
    zeros = np.zeros((2, 3, DIM + 1), np.float32)
    zeros[..., -1] = 0.5
    assert (to_float32(to_stored(zeros, precision)) == zeros).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_stored_shape_and_bytes_are_those_that_are_announced(precision: Any) -> None:
    stored = to_stored(np.ones((4, 3, DIM + 1), np.float32), precision)
    dtype, shape = row_shape(DIM, precision, 3)
    assert (stored.dtype, stored.shape[1:]) == (dtype, shape)
    per_month = {"float32": 4 * (DIM + 1), "float16": 2 * (DIM + 1), "int8": DIM + 4}[precision]
    assert stored[0].nbytes == 3 * per_month


@pytest.mark.parametrize("precision", ["float16", "int8"])
@pytest.mark.parametrize("place", [0, DIM])
def test_a_value_beyond_half_precision_comes_back_as_no_number(precision: Any, place: int) -> None:
    large = np.ones((1, 3, DIM + 1), np.float32)
    large[0, 1, place] = 1e9
    back = to_float32(to_stored(large, precision))
    assert not np.isfinite(back[0, 1]).all()
    assert np.isfinite(back[0, [0, 2]]).all()
