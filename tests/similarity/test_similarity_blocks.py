"""Work in blocks of samples: as exact as at once."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.similarity.blocks import condense, map_blocks, order_statistics, sum_blocks

BLOCKS = st.sampled_from([1, 4, 11, 12])
condensed = jax.jit(condense, static_argnums=2)


@partial(jax.jit, static_argnums=(1, 2))
def ranked(values, block_size, ranks):
    return order_statistics(lambda index: values[index], len(values), block_size, ranks)


@given(BLOCKS)
def test_blocks_cover_every_sample_once(block_size):
    values = jnp.arange(11.0) ** 2
    mapped = map_blocks(lambda index: {"square": values[index]}, 11, block_size)
    np.testing.assert_array_equal(mapped["square"], values)
    assert sum_blocks(lambda index: values[index].sum(), 11, block_size) == values.sum()


@given(st.integers(0, 2**32 - 1), BLOCKS, st.sampled_from([np.float32, np.float64]))
def test_order_statistics_are_those_of_the_sorted_numbers(seed, block_size, dtype):
    rng = np.random.default_rng(seed)
    values = np.abs(rng.standard_normal((11, 7)) * 10.0 ** rng.integers(-30, 30, (11, 1)))
    values = np.where(rng.random((11, 7)) < 0.3, rng.choice([0.0, 1.0, 3.5]), values).astype(dtype)
    ranks = (0, 37, 38, 76)
    with jax.enable_x64(dtype == np.float64):
        found = ranked(jnp.asarray(values), block_size, ranks)
        assert found.dtype == dtype
        np.testing.assert_array_equal(found, np.sort(values, axis=None)[list(ranks)])


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 4, 30]), st.sampled_from([0.0, 1000.0]))
def test_condensed_sides_have_the_same_centred_products(seed, block_size, offset):
    rng = np.random.default_rng(seed)
    X = (rng.standard_normal((30, 3)) + offset).astype(np.float32)
    Y = rng.standard_normal((30, 4)).astype(np.float32)
    Y[:, 1] = 7.0  # constant
    x, y = (np.asarray(side, np.float64) for side in condensed(X, Y, block_size))
    assert x.shape == (8, 3) and y.shape == (8, 4)
    assert np.abs(np.concatenate([x, y], axis=1).mean(axis=0)).max() < 1e-5
    X64, Y64 = (side.astype(np.float64) - side.mean(axis=0, dtype=np.float64) for side in (X, Y))
    for ours, whole in [(x.T @ x, X64.T @ X64), (x.T @ y, X64.T @ Y64), (y.T @ y, Y64.T @ Y64)]:
        assert ours == pytest.approx(whole, abs=2e-5 * 30)
    assert np.abs(y[:, 1]).max() < 1e-5
