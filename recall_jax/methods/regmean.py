"""RegMean: the linear layer nearest to all models' outputs on their own inputs."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recall_jax.methods.average import weighted_average
from recall_jax.methods.task_vectors import add_to_base


def regmean(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array | None = None,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """RegMean (arXiv 2212.09849): the W of least sum_k w_k ||X_k W^T - X_k W_k^T||^2.

        W = (sum w_k W_k G_k) (sum w_k G_k)^-1        G_k = X_k^T X_k, off its diagonal times alpha

    `models` are K whole tensors (out, in), or pieces of those without a `gram`; `values` holds
    `gram` (K, in, in) of the layer's inputs, `alpha` () below 1, which makes the sum invertible,
    and `weight` (K,) or nothing for equal ones. Inputs that are zero in every sample decide
    nothing: their columns are averaged, as all tensors are that come without a `gram`. The sum is
    solved as a correction of the `reference` model, with inputs of unit scale, so that models that
    agree pass bit for bit and float32 is enough.
    """
    del base
    weights = values.get("weight", jnp.ones(len(models), jnp.float32))
    if "gram" not in values:
        shares = weights / jnp.sum(weights)
        return weighted_average(models, shares, reference=reference, dtype=dtype)
    grams = values["gram"].astype(jnp.float32)
    diagonals = jnp.diagonal(grams, axis1=1, axis2=2)  # (K, in)
    unseen = jnp.all(diagonals == 0, axis=0)
    diagonals = jnp.where(unseen[None, :], 1, diagonals)
    off_diagonal = 1 - jnp.eye(grams.shape[1], dtype=jnp.float32)
    scale = jax.lax.rsqrt(jnp.sum(weights[:, None] * diagonals, axis=0))  # (in,)
    anchor = models[reference].astype(jnp.float32)
    system = jnp.zeros(grams.shape[1:], jnp.float32)
    moved = jnp.zeros_like(anchor)
    for model, weight, gram, diagonal in zip(models, weights, grams, diagonals, strict=True):
        gram = values["alpha"] * gram * off_diagonal + jnp.diag(diagonal)
        gram = weight * gram * scale[:, None] * scale[None, :]
        system += gram
        difference = (model.astype(jnp.float32) - anchor) / scale[None, :]
        moved += jnp.matmul(difference, gram, precision="highest")
    with jax.default_matmul_precision("highest"):
        solved = jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(system), moved.T).T
    return add_to_base(models[reference], solved * scale[None, :], dtype)
