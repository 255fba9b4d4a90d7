"""Align two models' representations before they are compared."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def center(X: jax.Array) -> jax.Array:
    """Subtract from X (n, E) its mean over the samples; exactly zero for a constant column."""
    moved = X - X[:1]
    return moved - jnp.mean(moved, axis=0, keepdims=True)


def procrustes(X: jax.Array, Y: jax.Array) -> jax.Array:
    """Rotate X (n, E) onto Y (n, E): X R, where R is the orthogonal matrix minimising ||X R - Y||.

    R = U V^T from the SVD of X^T Y (Schönemann 1966). The factorisations run on the thin QR factors
    of X^T and Y^T, so that the cost is n^2 E and not E^3.
    """
    r_x = jnp.linalg.qr(X.T, mode="r")
    q_y, r_y = jnp.linalg.qr(Y.T)
    with jax.default_matmul_precision("highest"):
        left, _, right = jnp.linalg.svd(r_x @ r_y.T)
        return r_x.T @ left @ right @ q_y.T


# Each maps a model's representations and the reference's to the model's, aligned.
ALIGNMENTS: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    "none": lambda X, Y: X,
    "center": lambda X, Y: center(X),
    "procrustes": procrustes,
}
