"""RECALL's weights: a softmax over models, and what the paper's rule bounds."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

from recall_jax.errors import InputError
from recall_jax.methods.weights import Weighing, layer_weights

seeds = st.integers(0, 2**32 - 1)


def similarity_of(seed, num_models=4, num_units=6):
    """In [0, 1], with the newest model, the last, at one."""
    values = np.random.default_rng(seed).uniform(0, 1, (num_models, num_units))
    return np.concatenate([values[:-1], np.ones((1, num_units))]).astype(np.float32)


@given(seeds, st.sampled_from([0.05, 1.0, 7.0]))
def test_weights_are_scipys_softmax_and_sum_to_one(seed, temperature):
    similarity = similarity_of(seed)
    weights = layer_weights(similarity, temperature=temperature)
    assert weights.dtype == jnp.float32 and weights.shape == similarity.shape
    expected = softmax(similarity.astype(np.float64) / temperature, axis=0)
    np.testing.assert_allclose(weights, expected, rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.sum(weights, axis=0), 1, atol=1e-6)
    np.testing.assert_allclose(
        layer_weights(similarity[:, 2], temperature=temperature), weights[:, 2], rtol=1e-6
    )


@given(seeds, st.integers(2, 6))
def test_the_newest_models_weight_is_bounded(seed, num_models):
    newest = np.asarray(layer_weights(similarity_of(seed, num_models)))[-1]
    assert (newest >= 1 / num_models - 1e-6).all()
    assert (newest <= np.e / (np.e + num_models - 1) + 1e-6).all()


def test_the_bounds_are_reached():
    alike, apart = np.ones((3, 1)), np.array([[0.0], [0.0], [1.0]])
    np.testing.assert_allclose(layer_weights(alike)[-1], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(layer_weights(apart)[-1], np.e / (np.e + 2), rtol=1e-6)
    np.testing.assert_allclose(layer_weights(apart)[0], 1 / (np.e + 2), rtol=1e-6)


@given(seeds)
def test_hot_is_uniform_and_cold_is_the_newest(seed):
    similarity = similarity_of(seed)
    similarity[:-1] *= 0.9
    for hot in (1e9, np.inf):
        np.testing.assert_allclose(layer_weights(similarity, temperature=hot), 0.25, atol=1e-6)
    for cold in (1e-3, 1e-30):
        one_hot = np.asarray(layer_weights(similarity, temperature=cold))
        np.testing.assert_allclose(one_hot[-1], 1, atol=1e-6)
        np.testing.assert_allclose(one_hot[:-1], 0, atol=1e-6)


@pytest.mark.parametrize("temperature", [0, -1.0, float("nan")])
def test_no_temperature(temperature):
    with pytest.raises(InputError, match=f"temperature is {temperature}: give a number above 0"):
        layer_weights(np.ones((2, 3)), temperature=temperature)


def weigh(similarity, weighing, reference=-1):
    """(K, U), as an engine that goes through the units has it."""
    num_units = similarity.shape[1]
    columns = [
        weighing.weights(column, unit=unit, num_units=num_units, reference=reference)
        for unit, column in enumerate(jnp.asarray(similarity).T)
    ]
    return np.stack(columns, axis=1)


@given(seeds, st.integers(3, 12))
def test_the_thirds_share_out_the_units(seed, num_units):
    similarity = similarity_of(seed, num_units=num_units)
    whole = weigh(similarity, Weighing(0.5))
    np.testing.assert_array_equal(whole, layer_weights(similarity, temperature=0.5))
    left = [[0], [0], [0], [1]]
    merged = []
    for third in ("first", "middle", "last"):
        weights = weigh(similarity, Weighing(0.5, merged_units=third))
        alone = (weights == left).all(axis=0)
        np.testing.assert_array_equal(weights[:, ~alone], whole[:, ~alone])
        merged.append(~alone)
    np.testing.assert_array_equal(np.sum(merged, axis=0), 1)
    for unit, third in ((0, 0), (num_units // 2, 1), (num_units - 1, 2)):
        assert merged[third][unit]


@given(seeds, st.sampled_from([0, 2, -1, None]))
def test_a_threshold_leaves_units_of_little_similarity_to_the_newest(seed, reference):
    similarity = similarity_of(seed)
    others = similarity if reference is None else np.delete(similarity, reference, axis=0)
    below = others.mean(axis=0) < 0.5
    weights = weigh(similarity, Weighing(threshold=0.5), reference)
    np.testing.assert_array_equal(weights[:, ~below], layer_weights(similarity)[:, ~below])
    assert (weights[:, below] == [[0], [0], [0], [1]]).all()
    np.testing.assert_array_equal(
        weigh(similarity, Weighing(threshold=0.0), reference), layer_weights(similarity)
    )
