"""Shape measures against scipy, in float64 unless said otherwise."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import orthogonal_procrustes
from scipy.spatial import procrustes
from two_sides import MIXED, NARROW, SHAPES, WIDE, float64, sides  # noqa: F401

from recall_jax.similarity import (
    aligned_cosine,
    angular_procrustes,
    procrustes_distance,
    size_and_shape_distance,
)
from recall_jax.similarity.blocks import condense
from recall_jax.similarity.procrustes import ANGLE, SIZE_AND_SHAPE
from recall_jax.similarity.procrustes import DISTANCE as PROCRUSTES


def padded(X, Y):
    """Zero columns to one width."""
    width = max(X.shape[1], Y.shape[1])
    return [np.pad(Z, [(0, 0), (0, width - Z.shape[1])]) for Z in (X, Y)]


@partial(jax.jit, static_argnames="center")
def distances(X, Y, center=True):
    """All of them in one compilation."""
    of = {"center": center}
    return jnp.stack(
        [
            procrustes_distance(X, Y, **of),
            procrustes_distance(X, Y, squared=True, **of),
            angular_procrustes(X, Y, **of),
            size_and_shape_distance(X, Y, **of),
            size_and_shape_distance(X, Y, squared=True, **of),
        ]
    )


@pytest.mark.parametrize(
    ("shape", "center"), [(NARROW, True), (MIXED, True), (WIDE, True), (MIXED, False)]
)
def test_each_is_the_distance_after_scipys_rotation(shape, center):
    X, Y = sides(shape)
    if center:
        x, y = padded(X - X.mean(axis=0), Y - Y.mean(axis=0))
    else:
        x, y = padded(X, Y)
    rotation, _ = orthogonal_procrustes(x, y)
    unscaled = np.linalg.norm(x @ rotation - y)
    x, y = x / np.linalg.norm(x), y / np.linalg.norm(y)
    distance = np.linalg.norm(x @ rotation - y)
    angle = np.arccos(np.sum(x @ rotation * y))
    expected = [distance, distance**2, angle, unscaled, unscaled**2]
    np.testing.assert_allclose(distances(X, Y, center), expected, rtol=1e-12)


@SHAPES
def test_aligned_cosine_is_of_the_rows_after_scipys_rotation(shape):
    X, Y = sides(shape)
    x, y = padded(X, Y)
    rotated = x @ orthogonal_procrustes(x, y)[0]
    norms = np.linalg.norm(rotated, axis=1) * np.linalg.norm(y, axis=1)
    expected = np.mean(np.sum(rotated * y, axis=1) / norms)
    assert aligned_cosine(X, Y) == pytest.approx(expected, abs=1e-12)


def test_scipys_disparity_is_that_of_the_nuclear_norm():
    X, Y = sides((30, 7, 7))
    disparity = procrustes(X, Y)[2]
    nuclear = 1 - procrustes_distance(X, Y, squared=True) / 2
    assert 1 - nuclear**2 == pytest.approx(disparity, abs=1e-12)


def test_zero_columns_change_nothing():
    X, Y = sides(MIXED)
    wider = np.pad(Y, [(0, 0), (0, 17)])
    np.testing.assert_allclose(distances(X, wider), distances(X, Y), rtol=1e-12)
    assert aligned_cosine(X, wider) == pytest.approx(float(aligned_cosine(X, Y)), abs=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("shape", [(30, 7), (10, 25)])
def test_equal_shapes_are_at_no_distance(shape, dtype):
    rng = np.random.default_rng(3)
    X = rng.standard_normal(shape)
    X /= np.linalg.norm(X)
    rotation, _ = np.linalg.qr(rng.standard_normal((shape[1], shape[1])))
    moved, turned = (X @ rotation + 1).astype(dtype), (3 * X @ rotation).astype(dtype)
    eps = float(np.finfo(dtype).eps)
    distance, squared, angle, unscaled, unscaled_squared = distances(
        X.astype(dtype), moved
    ).tolist()
    for near_root in (distance, angle, unscaled):
        assert 0 <= near_root < 10 * np.sqrt(eps)
    for near in (squared, unscaled_squared):
        assert 0 <= near < 100 * eps
    assert float(aligned_cosine(X.astype(dtype), turned)) == pytest.approx(1, abs=100 * eps)


@pytest.mark.parametrize("shape", [(6, 4, 4), (4, 6, 6)])
def test_a_constant_side_has_no_shape(shape):
    X, Y = sides(shape)
    constant = np.ones_like(X)
    for other in (Y, constant):
        norm = np.linalg.norm(other - other.mean(axis=0))
        expected = [np.sqrt(2), 2, np.pi / 2, norm, norm**2]
        np.testing.assert_allclose(distances(constant, other), expected, atol=1e-12)
        assert aligned_cosine(0 * constant, other) == 0


def test_no_scale_leaves_the_range_of_float32():
    X, Y = (Z.astype(np.float32) for Z in sides(WIDE))
    for measure in (procrustes_distance, angular_procrustes, aligned_cosine):
        value = float(measure(X, Y))
        assert measure(X * np.float32(1e25), Y * np.float32(1e-25)) == pytest.approx(
            value, rel=1e-5
        )


def test_condensed_samples_have_the_same_shape():
    X, Y = sides((200, 6, 9))
    few = condense(jnp.asarray(X), jnp.asarray(Y), 64)
    assert PROCRUSTES.moments and ANGLE.moments and SIZE_AND_SHAPE.moments
    np.testing.assert_allclose(distances(*few), distances(X, Y), rtol=1e-12)


@jax.jit
def all_measures(X, Y):
    return jnp.append(distances(X, Y), aligned_cosine(X, Y))


def check_gradients(X, Y):
    rng = np.random.default_rng(1)
    x, y = rng.standard_normal(X.shape), rng.standard_normal(Y.shape)
    step = 1e-6
    numeric = all_measures(X + step * x, Y + step * y) - all_measures(X - step * x, Y - step * y)
    by_x, by_y = jax.jit(jax.jacrev(all_measures, argnums=(0, 1)))(X, Y)
    slopes = np.tensordot(by_x, x) + np.tensordot(by_y, y)
    np.testing.assert_allclose(slopes, numeric / (2 * step), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shape", [MIXED, WIDE], ids=["mixed", "wide"])
def test_gradients_are_those_of_finite_differences(shape):
    check_gradients(*sides(shape))


def test_gradients_exist_where_singular_values_coincide():
    X, others, more = np.split(np.linalg.qr(sides((20, 12, 1))[0])[0], [5, 10], axis=1)
    rotation, _ = np.linalg.qr(sides((5, 5, 1))[0])
    check_gradients(X, np.concatenate([X @ rotation + others, more], axis=1))


@pytest.mark.parametrize("shape", [(30, 7, 7), (10, 25, 25)])
def test_squared_distances_are_flat_between_equal_shapes_and_no_gradient_is_nan(shape):
    X, _ = sides(shape)
    gradients = jax.jit(jax.jacrev(all_measures, argnums=(0, 1)))
    for by_side in gradients(X, X):
        assert np.isfinite(by_side).all()
        assert np.abs(by_side[np.array([1, 4, 5])]).max() < 1e-12
    for by_side in (*gradients(X, 0 * X), *gradients(0 * X, X)):
        assert np.isfinite(by_side).all()
