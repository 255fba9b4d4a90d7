"""OPCM: task vectors added one after the other, each off the ground of those before it."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recall_jax.methods.sparsify import total
from recall_jax.methods.task_vectors import add_to_base, task_vectors


def opcm(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Orthogonal projection-based continual merging (arXiv 2501.09522): B + A_K / lambda.

        A_1 = D_1      A_t = A_{t-1} + P_{t-1}(D_t)      lambda = ||A_K|| / mean ||D_i||

    in the order of the models; the norms are of the whole models. P_{t-1} is `off_ground` with
    A_{t-1} as the ground where `values` holds `alpha` (), which is for the weights of linear
    layers; all else is added as it stands. The authors divide by lambda_t at every step and
    multiply by it at the next, which leaves this sum, as no scale changes singular vectors. Base
    and K models are of one shape, whole where there is `alpha`; `values` holds `lambda_` ().
    """
    del reference
    ground, _ = sequential_sum(models, values, base)
    return add_to_base(base, ground / values["lambda_"], dtype)


def sequential_sum(
    models: Sequence[jax.Array], values: Mapping[str, jax.Array], base: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A_K, and the squared norms (K + 1,) of D_1 … D_K and A_K: float32, arguments as in `opcm`."""
    vectors = task_vectors(models, base)
    ground = vectors[0]
    for vector in vectors[1:]:
        ground += off_ground(vector, ground, values["alpha"]) if "alpha" in values else vector
    return ground, jnp.stack([total(jnp.square(each)) for each in (*vectors, ground)])


def off_ground(vector: jax.Array, ground: jax.Array, alpha: jax.Array) -> jax.Array:
    """D without its part in the leading singular subspaces of A, both (m, n) float32.

    A = U S V^T, and U^T D V loses its diagonal and its leading r x r block: r is how many of the
    largest singular values sum up to `alpha` of all at most. So does the authors' code (in
    tanganke/fusion_bench), but for singular values of zero, of which low-rank changes have many:
    these have no vectors of their own whose part could be taken out.
    """
    left, singular, right = jnp.linalg.svd(ground, full_matrices=False)
    sums = jnp.cumsum(singular)
    has_vectors = singular > max(ground.shape) * jnp.finfo(jnp.float32).eps * singular[0]
    leading = has_vectors & (sums <= alpha * sums[-1])
    own = jnp.diag(has_vectors) | (leading[:, None] & leading[None, :])
    inside = _product(_product(left.T, vector), right.T)
    return vector - _product(_product(left, jnp.where(own, inside, 0)), right)


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="highest")
