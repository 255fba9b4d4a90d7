"""RegMean's closed form against float64, least squares, and its algebra."""

import float64_merges as float64
import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.methods.regmean import regmean

OUT, IN = 7, 12
seeds = st.integers(0, 2**32 - 1)
merged_of = jax.jit(regmean, static_argnames=("reference", "dtype"))


def toys(seed, rows=40, count=3):
    """Models (out, in), their inputs (K, rows, in) of scales from 1e-3 to 1e3, and weights."""
    rng = np.random.default_rng(seed)
    models = rng.standard_normal((count, OUT, IN)).astype(np.float32)
    inputs = rng.standard_normal((count, rows, IN)) * 10.0 ** rng.integers(-3, 4, IN)
    return list(models), inputs.astype(np.float32), np.float32(rng.uniform(0.2, 1, count))


def gram_of(inputs):
    wide = np.asarray(inputs, np.float64)
    return (wide.transpose(0, 2, 1) @ wide).astype(np.float32)


def outputs(merged, gram):
    """Of inputs as large as they are in the samples, one at a time, beside the largest of all."""
    scale = np.sqrt(np.diagonal(gram.sum(axis=0)))
    return np.asarray(merged, np.float64) * (scale / scale.max())


def values_of(gram, weights, alpha=0.9):
    return {"gram": gram, "alpha": np.float32(alpha), "weight": weights}


@given(seeds, st.sampled_from([0.0, 0.5, 0.9, 0.99]), st.sampled_from([3, 40]))
def test_the_closed_form_in_float64_also_with_few_samples_and_uneven_inputs(seed, alpha, rows):
    models, inputs, weights = toys(seed, rows)
    gram = gram_of(inputs)
    merged = merged_of(models, values_of(gram, weights, alpha), dtype=np.float32)
    expected = float64.regmean(models, gram.astype(np.float64), alpha, weights)
    found, expected = outputs(merged, gram), outputs(expected, gram)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 if alpha < 0.99 else 1e-4)


def test_is_the_layer_of_least_error_on_all_inputs():
    models, inputs, _ = toys(0, rows=60)
    inputs /= np.abs(inputs).max(axis=(0, 1))
    targets = np.concatenate([x @ m.T for x, m in zip(inputs, models, strict=True)])
    expected = np.linalg.lstsq(inputs.reshape(-1, IN), targets)[0].T
    values = values_of(gram_of(inputs), np.ones(3, np.float32), alpha=1.0)
    merged = merged_of(models, values, dtype=np.float32)
    np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-5)


@given(seeds, st.permutations(range(3)), st.integers(0, 2))
def test_neither_the_order_nor_the_reference_matters(seed, order, reference):
    models, inputs, weights = toys(seed)
    gram = gram_of(inputs)
    one = merged_of(models, values_of(gram, weights), dtype=np.float32)
    moved = values_of(gram[list(order)], weights[list(order)])
    other = merged_of([models[k] for k in order], moved, reference=reference, dtype=np.float32)
    np.testing.assert_allclose(outputs(one, gram), outputs(other, gram), rtol=0, atol=1e-5)


def test_inputs_that_no_sample_has_are_averaged():
    models, inputs, weights = toys(1)
    inputs[..., 4] = 0
    inputs[:2, :, 5] = 0  # seen by the last model alone
    merged = merged_of(models, values_of(gram_of(inputs), weights), dtype=np.float32)
    share = weights / weights.sum()
    expected = sum(w * m[:, 4] for w, m in zip(share, models, strict=True))
    np.testing.assert_allclose(merged[:, 4], expected, rtol=0, atol=1e-6)
    assert np.isfinite(merged).all()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_models_that_agree_pass_bit_for_bit(dtype):
    models, inputs, weights = toys(2)
    model = models[0].astype(dtype)
    model[0, :2] = -0.0, 1e-40
    for values in (values_of(gram_of(inputs), weights), {"weight": weights}, {}):
        merged = np.asarray(merged_of([model] * 3, values, dtype=dtype))
        assert merged.dtype == dtype and merged.tobytes() == model.tobytes()


def test_tensors_without_a_gram_are_averaged_by_the_weights():
    models, _, weights = toys(3)
    for given_, share in (({"weight": weights}, weights / weights.sum()), ({}, [1 / 3] * 3)):
        merged = merged_of(models, given_, dtype=np.float32)
        expected = sum(w * m.astype(np.float64) for w, m in zip(share, models, strict=True))
        np.testing.assert_allclose(merged, expected, rtol=0, atol=1e-6)
