"""Weighted averages against float64, and bit for bit where models agree."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.methods.average import weighted_average, weighted_sum

FLOATS = (
    np.float32,
    ml_dtypes.bfloat16,
    np.float16,
    ml_dtypes.float8_e4m3fn,
    ml_dtypes.float8_e5m2,
)
SHAPE = (7, 9)
seeds = st.integers(0, 2**32 - 1)

average = jax.jit(weighted_average, static_argnames=("reference", "dtype"))
total = jax.jit(weighted_sum, static_argnames="dtype")


def softmaxed(rng, num_models):
    return np.asarray(jax.nn.softmax(rng.standard_normal(num_models).astype(np.float32)))


def bits(array):
    array = np.asarray(array)
    return array.view(f"u{array.dtype.itemsize}")


def within_rounding(merged, expected, models):
    """One unit in the last place of the dtype, and four roundings of float32 of the largest."""
    dtype = np.asarray(merged).dtype
    largest = np.max([np.abs(np.asarray(model, np.float64)) for model in models], axis=0)
    magnitude = np.abs(expected).astype(dtype)
    unit = (np.nextafter(magnitude, dtype.type(np.inf)) - magnitude).astype(np.float64)
    allowed = unit + 4 * np.spacing(largest.astype(np.float32)).astype(np.float64)
    return np.abs(np.asarray(merged, np.float64) - expected) <= allowed


@given(seeds, st.integers(-3, 2), st.sampled_from(FLOATS[:3]))
def test_of_mixed_dtypes_to_rounding(seed, reference, dtype):
    rng = np.random.default_rng(seed)
    models = [
        (rng.standard_normal(SHAPE) * 10.0 ** rng.integers(-3, 3, SHAPE)).astype(kind)
        for kind in FLOATS[:3]
    ]
    weights = softmaxed(rng, 3)
    expected = sum(w * np.asarray(m, np.float64) for w, m in zip(weights, models, strict=True))
    merged = average(models, weights, reference=reference, dtype=dtype)
    assert merged.dtype == dtype and merged.shape == SHAPE
    assert within_rounding(merged, expected, models).all()
    summed = total(models, 3 * weights, dtype=dtype)
    assert summed.dtype == dtype
    assert within_rounding(summed, 3 * expected, [3 * np.asarray(m, float) for m in models]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_identical_models_of_any_bits_merge_to_themselves(dtype):
    width = np.dtype(dtype).itemsize * 8
    rng = np.random.default_rng(width)
    patterns = rng.integers(0, 2**width, 4000, dtype=np.uint64).astype(f"u{width // 8}")
    smallest = np.arange(16, dtype=patterns.dtype)  # zero and the smallest subnormals
    patterns = np.concatenate([patterns, smallest, smallest | (1 << (width - 1))])
    model = patterns.view(dtype)
    model = model[~np.isnan(model.astype(np.float32))]
    for num_models, reference in ((2, -1), (3, 0), (4, 2)):
        weights = softmaxed(rng, num_models)
        merged = average([model] * num_models, weights, reference=reference, dtype=dtype)
        assert merged.dtype == dtype
        np.testing.assert_array_equal(bits(merged), bits(model))


def test_where_models_agree_their_element_passes_and_elsewhere_it_moves():
    one = np.array([-0.0, 1e-40, 0.1, 3.0, np.inf], np.float32)
    other = np.array([-0.0, 1e-40, 0.1, 5.0, np.inf], np.float32)
    merged = average([other, one], np.float32([0.25, 0.75]), dtype=np.float32)
    np.testing.assert_array_equal(bits(merged)[[0, 1, 2, 4]], bits(one)[[0, 1, 2, 4]])
    assert merged[3] == 3.5


@given(seeds, st.permutations(range(3)))
def test_permuted_models(seed, order):
    rng = np.random.default_rng(seed)
    models, weights = rng.standard_normal((3, *SHAPE)).astype(np.float32), softmaxed(rng, 3)
    merged = average(list(models), weights, reference=2, dtype=np.float32)
    moved = [models[k] for k in order]
    again = average(moved, weights[list(order)], reference=order.index(2), dtype=np.float32)
    assert within_rounding(again, np.asarray(merged, np.float64), models).all()


@given(seeds, st.integers(0, 2))
def test_all_weight_on_one_model_gives_that_model(seed, chosen):
    rng = np.random.default_rng(seed)
    models = list(rng.standard_normal((3, *SHAPE)).astype(np.float32))
    weights = np.eye(3, dtype=np.float32)[chosen]
    merged = average(models, weights, reference=2, dtype=np.float32)
    assert within_rounding(merged, models[chosen].astype(np.float64), models).all()
    if chosen == 2:
        np.testing.assert_array_equal(merged, models[2])


def test_weights_for_each_entry_of_an_axis():
    rng = np.random.default_rng(0)
    models = list(rng.standard_normal((2, 4, 3)).astype(np.float32))
    weights = rng.uniform(0, 1, (4, 1)).astype(np.float32)
    stacked = np.stack([1 - weights, weights])
    merged = average(models, stacked, dtype=np.float32)
    for row in range(4):
        alone = average([m[row] for m in models], stacked[:, row, 0], dtype=np.float32)
        np.testing.assert_array_equal(merged[row], alone)


def test_a_sum_needs_no_weights_of_one():
    models = [np.float32([1.0, 2.0]), np.float32([10.0, 20.0])]
    summed = weighted_sum(models, np.float32([2, 0.5]), dtype=np.float32)
    np.testing.assert_array_equal(summed, [7.0, 14.0])


def test_float64_models_keep_their_bits_under_x64():
    with jax.enable_x64(True):
        model = np.random.default_rng(0).standard_normal(50)
        merged = average([model] * 2, np.float32([0.5] * 2), dtype=np.float64)
        assert merged.dtype == jnp.float64
        np.testing.assert_array_equal(bits(merged), bits(model))
