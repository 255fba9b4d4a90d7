"""Pooling: the mean over the tokens that the mask marks, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.representations.pooling import masked_mean

pool = jax.jit(masked_mean)


@given(st.integers(0, 2**32 - 1), st.sampled_from(["float32", "bfloat16", "float16"]))
def test_the_mean_of_each_row_over_its_tokens(seed, dtype):
    rng = np.random.default_rng(seed)
    mask = rng.integers(0, 2, (4, 6)).astype(np.int32)
    hidden = np.asarray(jnp.asarray(rng.standard_normal((4, 6, 3)), dtype))
    pooled = pool(hidden, mask)
    assert pooled.dtype == jnp.float32 and pooled.shape == (4, 3)
    for row in range(4):
        tokens = hidden[row].astype(np.float64)[mask[row] == 1]
        expected = tokens.mean(axis=0) if len(tokens) else np.zeros(3)
        np.testing.assert_allclose(pooled[row], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rest", [np.nan, np.inf, 1e38])
def test_padding_does_not_leak(rest):
    hidden = np.ones((2, 3, 4), np.float32)
    mask = np.array([[1, 1, 0], [0, 0, 0]], np.int32)
    hidden[mask == 0] = rest
    np.testing.assert_array_equal(pool(hidden, mask), [[1.0] * 4, [0.0] * 4])


@pytest.mark.parametrize("kind", [np.bool_, np.int8, np.int32, np.float32])
def test_a_mask_of_any_kind_counts_each_token_once(kind):
    hidden = np.arange(12, dtype=np.float32).reshape(1, 4, 3)
    mask = np.array([[7, 0, 1, 1]]).astype(kind)
    np.testing.assert_allclose(masked_mean(hidden, mask), hidden[:, [0, 2, 3]].mean(axis=1))


def test_a_pooled_array_passes_in_float32():
    pooled = masked_mean(jnp.full((3, 2), 0.5, jnp.bfloat16), None)
    assert pooled.dtype == jnp.float32
    np.testing.assert_array_equal(pooled, np.full((3, 2), 0.5))


@pytest.mark.parametrize(
    ("shape", "mask_shape", "message"),
    [
        ((2, 3, 4), None, "need a mask"),
        ((2, 3, 4), (2, 4), r"mask has shape \(2, 4\).*\(2, 3, 4\)"),
        ((3,), (3,), r"shape \(3,\); return \(B, T, E\)"),
        ((1, 2, 3, 4), (1, 2), r"shape \(1, 2, 3, 4\)"),
    ],
)
def test_shapes_that_do_not_fit(shape, mask_shape, message):
    mask = None if mask_shape is None else np.ones(mask_shape, np.int32)
    with pytest.raises(InputError, match=message):
        masked_mean(np.ones(shape, np.float32), mask)
