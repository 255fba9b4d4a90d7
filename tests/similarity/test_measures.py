"""Measures against published values, scikit-learn and their definitions in float64."""

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics.pairwise import cosine_similarity, rbf_kernel

from recall_jax.similarity.measures import MEASURES, linear_cka, paired_rbf, row_cosine

rbf, cosine, cka = jax.jit(paired_rbf), jax.jit(row_cosine), jax.jit(linear_cka)


def float32(*arrays):
    return [array.astype(np.float32) for array in arrays]


def known_inputs():
    rng = np.random.default_rng(0)
    X = rng.standard_normal((64, 16))
    Y = rng.standard_normal((64, 24))
    return float32(X, Y, X + 0.1 * rng.standard_normal((64, 16)))


def pair(seed, offset=0.0):
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((12, 5)) + offset
    return float32(X, X + rng.choice([0.01, 0.3, 3.0]) * rng.standard_normal((12, 5)))


def cka_by_definition(X, Y):
    """Of the centred features, not of the Gram matrices."""
    X, Y = (Z.astype(np.float64) - Z.mean(axis=0, dtype=np.float64) for Z in (X, Y))
    return np.linalg.norm(X.T @ Y) ** 2 / (np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y))


def test_values_computed_with_other_software():
    X, Y, Z = known_inputs()
    assert rbf(X, Z, 1.0) == pytest.approx(0.922676199518, abs=1e-6)
    assert cosine(X, Z) == pytest.approx(0.994324410906, abs=1e-6)
    assert cka(X, Y) == pytest.approx(0.274512070083, abs=1e-6)


def test_linear_cka_published_with_its_original_code():
    rng = np.random.RandomState(1337)
    X = rng.randn(100, 10)
    Y = rng.randn(100, 10) + X
    assert cka(*float32(X, Y)) == pytest.approx(0.55761, abs=6e-6)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.05, 0.7, 20.0]))
def test_paired_rbf_is_the_diagonal_of_scikit_learns_kernel(seed, sigma):
    X, Y = pair(seed)
    kernel = rbf_kernel(X.astype(np.float64), Y.astype(np.float64), gamma=0.5 / sigma**2)
    assert rbf(X, Y, sigma) == pytest.approx(kernel.diagonal().mean(), rel=1e-4, abs=1e-7)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 10.0, 1000.0]))
def test_each_measure_is_its_definition(seed, offset):
    X, Y = pair(seed, offset)
    X64, Y64 = X.astype(np.float64), Y.astype(np.float64)
    squared = ((X64 - Y64) ** 2).sum(axis=1)
    # Direct differences keep their digits wherever the points lie.
    assert rbf(X, Y, 0.7) == pytest.approx(np.exp(-squared / 0.98).mean(), rel=1e-5, abs=1e-7)
    cosines = cosine_similarity(X64, Y64).diagonal()
    assert cosine(X, Y) == pytest.approx(cosines.mean(), abs=1e-6)
    if offset < 1000:
        assert cka(X, Y) == pytest.approx(cka_by_definition(X, Y), abs=1e-5)


@given(st.integers(0, 2**32 - 1))
def test_linear_cka_is_symmetric_and_blind_to_frame_and_scale(seed):
    rng = np.random.default_rng(seed)
    X, Y = float32(rng.standard_normal((12, 5)), rng.standard_normal((12, 7)))
    value = float(cka(X, Y))
    assert 0 <= value <= 1
    rotation, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    (moved,) = float32(X @ rotation * rng.choice([0.01, 30.0]) + rng.standard_normal(5))
    assert cka(Y, X) == pytest.approx(value, abs=1e-6)
    assert cka(moved, Y) == pytest.approx(value, abs=1e-5)
    assert cka(X, moved) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("name", MEASURES)
def test_no_measure_is_nan_where_a_side_is_constant(name):
    function, takes_sigma = MEASURES[name]
    X = np.zeros((4, 3), np.float32)
    Y = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
    sigma = (np.float32(1),) if takes_sigma else ()
    expected = {"rbf": 1.0, "cosine": 0.0, "linear_cka": 0.0}[name]
    assert function(X, X, *sigma) == expected
    assert 0 <= float(function(X, Y, *sigma)) < 1
    if name != "rbf":
        assert function(X, Y, *sigma) == 0
        assert function(X[:1], Y[:1], *sigma) == 0


@pytest.mark.parametrize("sigma", [1e-30, 1e-6, 1e6, 1e30])
def test_rbf_is_finite_for_any_sigma(sigma):
    X, Y = float32(np.zeros((3, 2)), np.ones((3, 2)))
    assert rbf(X, X, sigma) == 1
    assert rbf(X, Y, sigma) == (0.0 if sigma < 1 else 1.0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.01, 0.3, 1.0, 100.0]))
def test_rbf_lies_between_zero_and_one_and_only_differences_count(seed, sigma):
    X, Y = pair(seed)
    value = rbf(X, Y, sigma)
    assert 0 <= value <= 1 and rbf(X, X, sigma) == 1
    assert rbf(Y, X, sigma) == value
    scaled = rbf(4 * X, 4 * Y, 4 * np.float32(sigma))
    assert scaled == pytest.approx(float(value), rel=1e-6)
