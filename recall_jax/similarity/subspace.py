"""What one side's features can say of the other's: regression, overlap of spans, GULP."""

from functools import partial

import jax
import jax.numpy as jnp

from recall_jax.similarity.factors import Components, components
from recall_jax.similarity.kernels import inner_products
from recall_jax.similarity.measure import Sides, checked


@checked()
def linear_regression(X: jax.Array, Y: jax.Array) -> jax.Array:
    """R^2 of X regressed on Y: the share of X's variance that a linear map of Y explains.

    1 - min_B ||X - Y B||^2 / ||X||^2 = ||Q_Y^T X||^2 / ||X||^2, the columns centred and Q_Y an
    orthonormal basis of Y's. Not symmetric. Range [0, 1]; 0 where a side is constant, 1 wherever Y
    has n - 1 independent features. Invariant to translation, to invertible maps of Y, and to
    rotation and isotropic scaling of X. Differentiable where Y, with n > E2, is of full rank.
    Source: Kornblith et al. 2019, arXiv 1905.00414. Cost as `mean_cca`, without the SVD of a pair.
    """
    return LINEAR_REGRESSION.evaluate(X, Y)


@checked(static=("center",))
def eigenspace_overlap(X: jax.Array, Y: jax.Array, center: bool = False) -> jax.Array:
    """Eigenspace overlap: ||U_X^T U_Y||_F^2 / max(rank X, rank Y), U the left singular vectors.

    Range [0, 1], 1 for equal spans; 0 where a side is zero. Invariant to invertible linear maps, if
    `center` also to translation. Differentiable where n > E is of full rank. Source: May et al.
    2019, arXiv 1909.01264, definition 2. Cost as `linear_regression`.
    """
    return EIGENSPACE_OVERLAP.evaluate(X, Y, center=center)


@checked()
def gulp(X: jax.Array, Y: jax.Array, regularization: float = 1e-2) -> jax.Array:
    """GULP, squared: how far apart ridge regressions on X and on Y come in their predictions.

    ||P_X - P_Y||_F^2 with P_X = X (X^T X + lambda I)^-1 X^T, each side centred and of norm one, so
    that lambda, the `regularization`, is a share of the variance. It bounds the mean squared
    difference in the predictions of every target of variance one. Range [0, rank X + rank Y].
    Invariant to rotation, isotropic scaling and translation; the smaller lambda, the nearer to
    invariant to invertible maps. Source: Boix-Adserà et al. 2022, arXiv 2210.06545, with the
    scaling of the authors' code. Differentiable where singular values are distinct. Cost as
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
        """P = A A^T and its squared norm."""
        squared = side.values * side.values
        ridge = jnp.where(squared <= 0, 1, squared + regularization)  # tiny, it may vanish
        shrinkage = squared / ridge
        A = side.basis * (side.values / jnp.sqrt(ridge))[None, :]
        return A, jnp.sum(shrinkage * shrinkage)

    (a, own_x), (b, own_y) = shrunk(x), shrunk(y)
    product = inner_products(a.T, b.T)
    return jnp.maximum(own_x + own_y - 2 * jnp.sum(product * product), 0)


LINEAR_REGRESSION = Sides(components, _explained, moments=True)
EIGENSPACE_OVERLAP = Sides(partial(components, center=False), _overlap)
GULP = Sides(components, _between_predictors, moments=True)
