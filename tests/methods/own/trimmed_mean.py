"""A data-free method that looks at full tensors: the mean of the largest half of the changes."""

import jax.numpy as jnp

from recall_jax.engine.needs import Needs, always
from recall_jax.methods.method import Method
from recall_jax.methods.task_vectors import add_to_base, task_vectors


def trimmed_mean(models, values, *, base, reference, dtype):
    """B + the mean over k of D_k = X_k - B where |D_k| is at least its median in the tensor."""
    kept = [
        # Not `>=`, which would turn NaN into 0.
        jnp.where(jnp.abs(vector) < jnp.median(jnp.abs(vector)), 0, vector)
        for vector in task_vectors(models, base)
    ]
    return add_to_base(base, sum(kept) / len(kept), dtype)


METHODS = {
    "trimmed_mean": Method(
        lambda parameters: trimmed_mean,
        needs=Needs(base=True, full_tensors=always, scratch=8),
        equation="θ = θ_base + mean trim(θₖ − θ_base)",
    )
}
