"""Merge by task arithmetic: add the changes of the fine-tunes to their base (arXiv:2212.04089)."""

from collections.abc import Mapping, Sequence

import jax
from jax.typing import DTypeLike

from recall_jax.engine.kernel import fixed
from recall_jax.engine.needs import Needs
from recall_jax.methods.method import Method
from recall_jax.methods.task_vectors import (
    TaskVectorModelParameters,
    TaskVectorParameters,
    add_to_base,
    task_vectors,
    weighted_vectors,
)


def task_arithmetic(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
    normalize: bool = False,
) -> jax.Array:
    """Return B + lambda sum w_i (X_i - B), divided by sum w_i if `normalize`.

    `models` are K arrays of one shape; `values` holds `weight` (K,) and `lambda_` ().
    """
    del reference
    total = weighted_vectors(
        task_vectors(models, base), values["weight"], normalize=normalize, consensus=False
    )
    return add_to_base(base, values["lambda_"] * total, dtype)


METHOD = Method(
    lambda parameters: fixed(task_arithmetic, normalize=parameters.normalize),
    parameters=TaskVectorParameters,
    model_parameters=TaskVectorModelParameters,
    needs=Needs(base=True),
    equation="θ = θ_base + λ Σₖ wₖ (θₖ − θ_base)",
)
