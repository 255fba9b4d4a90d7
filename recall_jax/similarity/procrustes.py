"""Compare shapes: how close two sides are once one of them is rotated onto the other.

Under the best orthogonal map, <X R, Y> is the nuclear norm of X^T Y (Schönemann 1966). If the
sides' widths differ, the narrower is padded with zeros. A side wider than it has samples is first
reduced to their number, so that the singular values are of a matrix (min(n, E1), min(n, E2)).

The nuclear norm has rounding errors, which the distances' square root enlarges: equal sides are at
a distance near the root of eps, 1e-3 in float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.similarity.alignment import center as centred
from recall_jax.similarity.factors import gram_factor
from recall_jax.similarity.kernels import inner_products, safe_sqrt, unit_norm
from recall_jax.similarity.measure import SidePair, checked


@checked(static=("center", "squared"))
def procrustes_distance(
    X: jax.Array, Y: jax.Array, center: bool = True, squared: bool = False
) -> jax.Array:
    """Procrustes distance: sqrt(2 - 2 ||X^T Y||_*), each side centred and of norm one.

    Range [0, sqrt(2)], or [0, 2] if `squared`; the upper end if a side is constant. A metric.
    Invariant to rotation, isotropic scaling and translation. Differentiable if squared; else with a
    kink at distance zero, where the gradient is set to zero. Source: Williams et al. 2021, arXiv
    2110.14739; Ding et al. 2021. Cost n E1 E2, or n^2 (E1 + E2), and an SVD.
    """
    return DISTANCE.evaluate(X, Y, center=center, squared=squared)


@checked(static=("center",))
def angular_procrustes(X: jax.Array, Y: jax.Array, center: bool = True) -> jax.Array:
    """Angle between shapes: arccos ||X^T Y||_*, each side centred and of norm one.

    Range [0, pi / 2]; the upper end if a side is constant. A metric. Invariances, kink, source and
    cost as `procrustes_distance`.
    """
    return ANGLE.evaluate(X, Y, center=center)


@checked(static=("center", "squared"))
def size_and_shape_distance(
    X: jax.Array, Y: jax.Array, center: bool = True, squared: bool = False
) -> jax.Array:
    """Procrustes distance without scaling: min ||X R - Y|| over orthogonal R, centred.

    sqrt(||X||^2 + ||Y||^2 - 2 ||X^T Y||_*). Range [0, inf); the norm of the other side if one is
    constant. A metric. Invariant to rotation and translation. Kink, source and cost as
    `procrustes_distance`.
    """
    return SIZE_AND_SHAPE.evaluate(X, Y, center=center, squared=squared)


@checked()
def aligned_cosine(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Mean over samples of the cosine between x_i R and y_i, R the rotation of X onto Y.

    R minimises ||X R - Y||; nothing is centred. Range [-1, 1], 1 for equal shapes; a row of zeros
    has cosine 0. Invariant to rotation and isotropic scaling. If X^T Y has a lower rank than both
    sides there are several such rotations: the value is that of one of them, and the gradient is
    not defined, though finite. Source: Schönemann 1966; Hamilton et al. 2016, arXiv 1605.09096.
    Cost as `procrustes_distance`, with singular vectors.
    """
    return ALIGNED_COSINE.evaluate(X, Y)


def _shape(X: jax.Array, center: bool = True) -> jax.Array:
    """Return points (n, min(n, E)) of norm one."""
    return gram_factor(unit_norm(centred(X) if center else X))


class _SizeAndShape(NamedTuple):
    """Hold points (n, min(n, E)) of norm one, and the norm () before scaling."""

    shape: jax.Array
    size: jax.Array


def _size_and_shape(X: jax.Array, center: bool = True) -> _SizeAndShape:
    points = centred(X) if center else X
    shape = unit_norm(points)
    # Computed as <X, X / ||X||>, which leaves the range of the dtype only if the norm does.
    return _SizeAndShape(gram_factor(shape), jnp.sum(points * shape))


def _nuclear_norm(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ||x^T y||_*, the sum of the singular values."""
    return jnp.sum(jnp.linalg.svd(inner_products(x.T, y.T), compute_uv=False))


def _distance(x: jax.Array, y: jax.Array, squared: bool = False) -> jax.Array:
    return _from_squared(2 - 2 * _nuclear_norm(x, y), squared)


def _angle(x: jax.Array, y: jax.Array) -> jax.Array:
    cosine = _nuclear_norm(x, y)
    equal = cosine >= 1  # rounding may give a value above one
    return jnp.where(equal, 0, jnp.arccos(jnp.where(equal, 0, cosine)))


def _size_and_shape_distance(
    x: _SizeAndShape, y: _SizeAndShape, squared: bool = False
) -> jax.Array:
    larger = jax.lax.stop_gradient(jnp.maximum(x.size, y.size))
    a, b = (side.size / jnp.where(larger == 0, 1, larger) for side in (x, y))
    value = _from_squared(a * a + b * b - 2 * a * b * _nuclear_norm(x.shape, y.shape), squared)
    return value * (larger * larger if squared else larger)


def _from_squared(value: jax.Array, squared: bool) -> jax.Array:
    """Return the distance for a squared distance, which rounding may have made negative."""
    return jnp.maximum(value, 0) if squared else safe_sqrt(value)


class _Rows(NamedTuple):
    """Hold points (n, min(n, E)), and their rows scaled to norm one."""

    points: jax.Array
    directions: jax.Array


def _rows(X: jax.Array) -> _Rows:
    points = gram_factor(unit_norm(X))
    return _Rows(points, jax.vmap(unit_norm)(points))


def _aligned_cosine(x: _Rows, y: _Rows) -> jax.Array:
    rotated = inner_products(x.directions, _rotation(inner_products(x.points.T, y.points.T)).T)
    return jnp.sum(rotated * y.directions) / len(rotated)


@jax.custom_jvp
def _rotation(M: jax.Array) -> jax.Array:
    """Return the orthogonal factor U V^T (a, b) of M (a, b) = U diag(s) V^T."""
    left, _, right = jnp.linalg.svd(M, full_matrices=False)
    return inner_products(left, right.T)


@_rotation.defjvp
def _rotation_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # U K V^T with K_ij = (T_ij - T_ji) / (s_i + s_j) for T = U^T dM V: unlike those of U and of V,
    # it divides by no difference of singular values. Outside both ranges dM / s adds to it.
    (M,), (tangent,) = primals, tangents
    left, values, right = jnp.linalg.svd(M, full_matrices=False)
    sums = values[:, None] + values[None, :]
    scale = jnp.where(values > 0, values, 1)
    with jax.default_matmul_precision("highest"):
        rows, columns = tangent @ right.T, left.T @ tangent
        inside = left.T @ rows
        turned = left @ ((inside - inside.T) / jnp.where(sums > 0, sums, 1)) @ right
        if M.shape[0] > M.shape[1]:
            turned = turned + (rows - left @ inside) / scale[None, :] @ right
        if M.shape[1] > M.shape[0]:
            turned = turned + left @ ((columns - inside @ right) / scale[:, None])
        return left @ right, turned


DISTANCE = SidePair(_shape, _distance, moments=True)
ANGLE = SidePair(_shape, _angle, moments=True)
SIZE_AND_SHAPE = SidePair(_size_and_shape, _size_and_shape_distance, moments=True)
ALIGNED_COSINE = SidePair(_rows, _aligned_cosine, min_samples=1)
