"""DARE: drop elements of task vectors at random, and rescale what is left (arXiv 2311.03099)."""

from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from recall_jax.methods.sparsify import keep_at_random, rescaled
from recall_jax.methods.task_vectors import add_to_base, task_vectors, weighted_vectors

# True: to the L1 norm from before; "density": by 1 / density, the paper's.
Rescale = bool | Literal["density"]


def dare(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
    consensus: bool,
    normalize: bool = False,
    rescale: Rescale = True,
) -> jax.Array:
    """DARE: B + lambda sum w_i S_i, where S_i keeps each element of D_i with chance `density`.

    S_i is rescaled to ||D_i||_1 or by 1 / density, which leaves its mean over draws D_i. With
    `consensus` (`dare_ties`) signs are elected as in TIES. `models` are K whole tensors of one
    shape; `values` holds `weight` and `density` (K,), `lambda_` (), and `seed` (), uint32, which
    with the model's place among the K decides what is kept: the same on every device.
    """
    del reference
    key = jax.random.key(values["seed"], impl="threefry2x32")
    vectors = task_vectors(models, base)
    dropped = []
    for index, (vector, density) in enumerate(zip(vectors, values["density"], strict=True)):
        kept = keep_at_random(vector, density, jax.random.fold_in(key, index))
        sparse = jnp.where(kept, vector, 0)
        if rescale == "density":
            sparse = sparse / jnp.clip(density, jnp.finfo(jnp.float32).tiny, 1)
        elif rescale:
            sparse = rescaled(sparse, vector)
        dropped.append(sparse)
    total = weighted_vectors(dropped, values["weight"], normalize=normalize, consensus=consensus)
    return add_to_base(base, values["lambda_"] * total, dtype)
