"""Compare what one side's features predict of the other's: regression, overlap of spans, GULP."""

from functools import partial

import jax
import jax.numpy as jnp

from recall_jax.similarity.factors import Components, components
from recall_jax.similarity.kernels import inner_products
from recall_jax.similarity.measure import SidePair, checked


@checked()
def linear_regression(X: jax.Array, Y: jax.Array) -> jax.Array:
    """R^2 of X regressed on Y: the fraction of X's variance that a linear map of Y explains.

    1 - min_B ||X - Y B||^2 / ||X||^2 = ||Q_Y^T X||^2 / ||X||^2, with centred columns and Q_Y an
    orthonormal basis of Y's. Not symmetric. Range [0, 1]; 0 if a side is constant, 1 if Y has n - 1
    independent features. Invariant to translation, to invertible maps of Y, and to rotation and
    isotropic scaling of X. Differentiable if n > E2 and Y has full rank. Source: Kornblith et al.
    2019, arXiv 1905.00414. Cost as `mean_cca`, without the SVD of a pair.
    """
    return LINEAR_REGRESSION.evaluate(X, Y)


@checked(static=("center",))
def eigenspace_overlap(X: jax.Array, Y: jax.Array, center: bool = False) -> jax.Array:
    """Eigenspace overlap: ||U_X^T U_Y||_F^2 / max(rank X, rank Y), U the left singular vectors.

    Range [0, 1], 1 for equal spans; 0 if a side is zero. Invariant to invertible linear maps, with
    `center` also to translation. Differentiable if n > E and the rank is full. Source: May et al.
    2019, arXiv 1909.01264, definition 2. Cost as `linear_regression`.
    """
    return EIGENSPACE_OVERLAP.evaluate(X, Y, center=center)


@checked()
def gulp(X: jax.Array, Y: jax.Array, regularization: float = 1e-2) -> jax.Array:
    """GULP, squared: how much predictions of ridge regressions on X and on Y differ.

    ||P_X - P_Y||_F^2 with P_X = X (X^T X + lambda I)^-1 X^T, each side centred and of norm one, so
    that lambda, the `regularization`, is a fraction of the variance. It bounds the mean squared
    difference in the predictions of every target of variance one. Range [0, rank X + rank Y].
    Invariant to rotation, isotropic scaling and translation; the smaller lambda, the closer to
    invariant to invertible maps. Source: Boix-Adserà et al. 2022, arXiv 2210.06545, with the
    scaling of the authors' code. Differentiable if singular values are distinct. Cost as
    `linear_regression`.
    """
    return GULP.evaluate(X, Y, regularization=regularization)


def _explained(x: Components, y: Components) -> jax.Array:
    weighted = inner_products(y.basis.T, (x.basis * x.values[None, :]).T)
    total = jnp.sum(x.values * x.values)
    return jnp.minimum(jnp.sum(weighted * weighted) / jnp.where(total > 0, total, 1), 1)


def _overlap(x: Components, y: Components) -> jax.Array:
    product = inner_products(x.basis.T, y.basis.T)
    larger = jnp.maximum(jnp.maximum(x.rank, y.rank), 1)
    return jnp.minimum(jnp.sum(product * product) / larger, 1)


def _between_predictors(
    x: Components, y: Components, regularization: float | jax.Array = 1e-2
) -> jax.Array:
    def shrunk(side: Components) -> tuple[jax.Array, jax.Array]:
        """Return A with P = A A^T, and the squared norm of P."""
        squared = side.values * side.values
        ridge = jnp.where(squared <= 0, 1, squared + regularization)  # a tiny one may vanish
        shrinkage = squared / ridge
        A = side.basis * (side.values / jnp.sqrt(ridge))[None, :]
        return A, jnp.sum(shrinkage * shrinkage)

    (a, norm_x), (b, norm_y) = shrunk(x), shrunk(y)
    product = inner_products(a.T, b.T)
    return jnp.maximum(norm_x + norm_y - 2 * jnp.sum(product * product), 0)


LINEAR_REGRESSION = SidePair(components, _explained, moments=True)
EIGENSPACE_OVERLAP = SidePair(partial(components, center=False), _overlap)
GULP = SidePair(components, _between_predictors, moments=True)
