"""Factor one side: into as many columns as samples, and into principal components."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from recall_jax.similarity.alignment import center as centred
from recall_jax.similarity.kernels import inner_products, unit_norm


@jax.custom_jvp
def gram_factor(X: jax.Array) -> jax.Array:
    """Return a factor (n, min(n, E)) with the Gram matrix X X^T of X (n, E); X itself if n >= E.

    It is for functions of that Gram matrix, which do not change when the factor's columns are
    rotated; only for those is the gradient right. It exists for X of any rank. Cost n^2 E.
    """
    return jnp.linalg.qr(X.T, mode="r").T if X.shape[0] < X.shape[1] else X


@gram_factor.defjvp
def _gram_factor_jvp(
    primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    # X = R^T Q^T. Up to a rotation of the factor's columns, its tangent is that of X in the basis
    # Q; a derivative of the QR factorisation would divide by R, which centring makes singular.
    (X,), (tangent,) = primals, tangents
    if X.shape[0] >= X.shape[1]:
        return X, tangent
    Q, R = jnp.linalg.qr(X.T)
    return R.T, inner_products(tangent, Q.T)


class Components(NamedTuple):
    """Hold principal components of a side scaled to norm one: X / ||X|| = basis diag(values) V^T.

    The basis (n, k) is orthonormal and k = min(n, E); basis and values (k,), in descending order,
    are zero beyond the numerical rank.
    """

    basis: jax.Array
    values: jax.Array

    @property
    def rank(self) -> jax.Array:
        """Return the numerical rank (), as a float."""
        return jnp.sum((self.values > 0).astype(self.values.dtype))


def components(X: jax.Array, center: bool = True) -> Components:
    """Return the principal components of X (n, E), centred unless `center` is false.

    Singular values count towards the rank above k eps of the largest, where k = min(n, E) but at
    least ten: rounding does not grow with the number of samples. Gradients are finite if the values
    up to the rank are distinct, n > E and the rank is full. Cost n E min(n, E).
    """
    points = unit_norm(centred(X) if center else X)
    basis, values, _ = jnp.linalg.svd(gram_factor(points), full_matrices=False)
    floor = jnp.finfo(X.dtype).eps * max(10, *values.shape) * values[:1]
    kept = ~(values <= floor)  # written so that NaN stays NaN
    return Components(jnp.where(kept[None, :], basis, 0), jnp.where(kept, values, 0))
