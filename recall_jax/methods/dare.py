"""Merge by DARE: drop elements of task vectors at random, rescale the rest (arXiv:2311.03099)."""

import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field, Strict

from recall_jax.engine.kernel import Kernel, fixed
from recall_jax.engine.needs import Needs, always
from recall_jax.methods.method import Method
from recall_jax.methods.sparsify import keep_at_random, rescaled
from recall_jax.methods.task_vectors import (
    TaskVectorModelParameters,
    TaskVectorParameters,
    add_to_base,
    task_vectors,
    weighted_vectors,
)

# True rescales to the original L1 norm; "density" by 1 / density, as in the paper.
Rescale = bool | Literal["density"]


class DareParameters(TaskVectorParameters):
    """Hold the parameters of `dare_linear` and `dare_ties`; `seed` is that of the draw."""

    rescale: Annotated[bool, Strict()] | Literal["density"] = True  # type: ignore[assignment]
    seed: Annotated[int, Strict(), Field(ge=0)] = 0

    def adjusted(self, values: Mapping[str, Any], tensor: str) -> dict[str, Any]:
        """Add `seed` () uint32, which differs between tensors."""
        return {**values, "seed": np.uint32(zlib.crc32(f"{self.seed} {tensor}".encode()))}


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
    """Return B + lambda sum w_i S_i; S_i keeps each element of D_i with probability `density`.

    S_i is rescaled to ||D_i||_1, or by 1 / density if `rescale` is "density", as in the paper (Yu
    et al., arXiv:2311.03099), so that its expectation is D_i. With `consensus` (`dare_ties`), signs
    are elected as in TIES. `models` are K full tensors of one shape; `values` holds `weight` and
    `density` (K,), `lambda_` (), and `seed` () uint32, which determines the draw together with the
    model's index, the same on every device.
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


def _kernel(parameters: DareParameters, *, consensus: bool) -> Kernel:
    return fixed(
        dare, consensus=consensus, normalize=parameters.normalize, rescale=parameters.rescale
    )


_NEEDS = Needs(base=True, full_tensors=always, scratch=5)

LINEAR = Method(
    partial(_kernel, consensus=False),
    parameters=DareParameters,
    model_parameters=TaskVectorModelParameters,
    needs=_NEEDS,
    equation="θ = θ_base + λ Σₖ wₖ drop(θₖ − θ_base)",
)
TIES = Method(
    partial(_kernel, consensus=True),
    parameters=DareParameters,
    model_parameters=TaskVectorModelParameters,
    needs=_NEEDS,
    equation="θ = θ_base + λ Σₖ wₖ drop(θₖ − θ_base), of the elected signs",
)
