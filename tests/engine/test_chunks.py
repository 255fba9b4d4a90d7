"""Merging in pieces is merging."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.engine.chunks import merge_tensor, spans
from recall_jax.engine.sources import Inputs
from recall_jax.methods.average import average
from recall_jax.methods.linear import linear_sum


@given(size=st.integers(1, 5000), chunk=st.integers(0, 10).map(lambda bits: 1 << bits))
def test_spans_cover_everything_once_in_few_lengths(size, chunk):
    covered, lengths = [], set()
    for start, length, skip in spans(size, chunk):
        assert start >= 0 and start + length <= size and 0 <= skip < length
        covered += range(start + skip, start + length)
        lengths.add(length)
    assert covered == list(range(size))
    assert len(lengths) == 1
    (length,) = lengths
    assert length.bit_count() == 1 and length <= chunk and (length == chunk or 2 * length > size)


@pytest.mark.parametrize("kernel", [average, linear_sum])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 43), (64, 64), (0, 4)])
def test_pieces_laid_end_to_end_are_the_whole(kernel, dtype, shape):
    draws = np.random.default_rng(0)
    models = [draws.standard_normal(shape).astype(dtype) for _ in range(3)]
    models[0] = models[2].copy()
    weights = np.asarray([0.5, 0.2, 0.3], np.float32)
    pieces = list(
        merge_tensor(
            Inputs(models),
            {"weight": weights},
            np.dtype(dtype),
            kernel=kernel,
            reference=1,
            chunk=64,
        )
    )
    merged = np.concatenate([np.asarray(piece.elements)[piece.skip :] for piece in pieces])
    whole = jax.jit(kernel, static_argnames=("reference", "dtype"))(
        [jnp.asarray(model) for model in models],
        {"weight": jnp.asarray(weights)},
        reference=1,
        dtype=dtype,
    )
    assert merged.dtype == dtype
    np.testing.assert_array_equal(
        merged.view(np.uint8), np.asarray(whole).reshape(-1).view(np.uint8)
    )
    assert all(bool(piece.finite) for piece in pieces)


def test_a_piece_that_is_not_finite_says_so():
    models = [np.ones(256, np.float32) for _ in range(2)]
    models[1][200] = np.nan
    weights = np.asarray([0.5, 0.5], np.float32)
    pieces = merge_tensor(
        Inputs(models),
        {"weight": weights},
        np.dtype(np.float32),
        kernel=average,
        reference=-1,
        chunk=64,
    )
    assert [bool(piece.finite) for piece in pieces] == [True, True, True, False]


def test_integers_are_the_newest_models():
    models = [np.arange(5), np.arange(5) + 7]
    (piece,) = merge_tensor(
        Inputs(models),
        {"weight": np.zeros(2, np.float32)},
        models[0].dtype,
        kernel=average,
        reference=0,
    )
    np.testing.assert_array_equal(piece.elements, models[1])


def test_float64_is_merged_from_float64():
    models = [np.asarray([1e300, 1 + 1e-12]), np.asarray([1e300, 1 + 1e-12])]
    (piece,) = merge_tensor(
        Inputs(models),
        {"weight": np.asarray([0.5, 0.5], np.float32)},
        np.dtype(np.float64),
        kernel=average,
        reference=1,
    )
    np.testing.assert_array_equal(np.asarray(piece.elements), models[0])
