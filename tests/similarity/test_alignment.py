"""Alignments against SciPy's."""

import jax
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes

from recall_jax.similarity.alignment import center, procrustes

align = jax.jit(procrustes)


@pytest.mark.parametrize("shape", [(6, 9), (20, 5), (7, 7), (2, 3)])
@pytest.mark.parametrize("seed", [0, 1])
def test_procrustes_is_scipys(shape, seed):
    rng = np.random.default_rng(seed)
    X, Y = rng.standard_normal((2, *shape)).astype(np.float32)
    rotation, _ = orthogonal_procrustes(X.astype(np.float64), Y.astype(np.float64))
    np.testing.assert_allclose(align(X, Y), X @ rotation, atol=2e-5)


@pytest.mark.parametrize("shape", [(6, 9), (20, 5)])
def test_a_rotated_model_comes_back(shape):
    rng = np.random.default_rng(0)
    Y = rng.standard_normal(shape).astype(np.float32)
    rotation, _ = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))
    X = (Y @ rotation).astype(np.float32)
    np.testing.assert_allclose(align(X, Y), Y, atol=1e-5)


def test_a_rotation_keeps_lengths_even_of_units_padded_with_zeros():
    X, Y = np.random.default_rng(0).standard_normal((2, 8, 10)).astype(np.float32)
    X[:, 3:] = 0
    aligned = align(X, Y)
    np.testing.assert_allclose(aligned @ aligned.T, X @ X.T, atol=1e-5)
    narrow, _ = orthogonal_procrustes(X.astype(np.float64), Y.astype(np.float64))
    ours, theirs = np.linalg.norm(aligned - Y), np.linalg.norm(X @ narrow - Y)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_center():
    X = np.random.default_rng(0).standard_normal((8, 3)).astype(np.float32) + 5
    np.testing.assert_allclose(center(X), X - X.mean(axis=0), atol=1e-6)
