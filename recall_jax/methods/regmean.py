"""Merge by RegMean: the linear layer closest to all models' outputs on their inputs."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from pydantic import Field

from recall_jax.engine.findings import Findings
from recall_jax.engine.kernel import Values
from recall_jax.engine.merge import Merge, Prepared, mean_by_unit
from recall_jax.engine.needs import Needs, Observation, linear_weights
from recall_jax.methods.average import weighted_average
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Number, Parameters
from recall_jax.methods.task_vectors import add_to_base
from recall_jax.methods.values import tensor_values


class RegMeanParameters(Parameters):
    """Hold the parameters of `regmean` and `regmean_plusplus`: Grams' scale off the diagonal."""

    by_tensor = ("alpha",)
    alpha: Annotated[Number, Field(ge=0, lt=1)] = 0.9


def regmean(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array | None = None,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Return the W that minimises sum_k w_k ||X_k W^T - X_k W_k^T||^2 (arXiv:2212.09849).

        W = (sum w_k W_k G_k) (sum w_k G_k)^-1        G_k = X_k^T X_k, off its diagonal times alpha

    `models` are K full tensors (out, in), or chunks of tensors without a `gram`; `values` holds
    `gram` (K, in, in) of the layer's inputs, `alpha` () below 1, which makes the sum invertible,
    and `weight` (K,), by default equal. Inputs that are zero in every sample do not determine
    anything: their columns are averaged, as are all tensors without a `gram`. The sum is solved as
    a correction of the `reference` model, with inputs scaled to unit norm, so that elements on
    which models agree are passed on bit for bit, and float32 is accurate enough.
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


def prepare(merge: Merge[RegMeanParameters, Parameters], *, through_merged: bool) -> Prepared:
    """Return the rule with the `gram` of each linear layer, and the recipe's values.

    Jin et al. 2023 (arXiv:2212.09849); with `through_merged`, Nguyen et al. 2025
    (arXiv:2508.03121), where the samples of a model run through the merged units instead of the
    model's.
    """
    from recall_jax.engine.linear_inputs import prepare_linear_inputs

    walk = merge.walk
    fixed = tensor_values(merge.parameters, merge.entries.models, walk.specs)

    def values(unit: str, grams: Mapping[str, jax.Array]) -> dict[str, Values]:
        return {
            name: {**fixed[name], "gram": grams[name]} if name in grams else fixed[name]
            for name in walk.units[unit]
        }

    shares = {name: merge.parameters.shares(fixed[name]) for name in fixed}
    found = Findings(mean_by_unit(shares, walk.specs))
    return prepare_linear_inputs(merge, values, lambda: found, through_merged=through_merged)


_NEEDS = Needs(
    models=2,
    samples="each",
    observes=frozenset({Observation.LINEAR_INPUTS}),
    full_tensors=linear_weights,
    replicated=True,
    scratch=3,
)

METHOD = Method(
    lambda parameters: regmean,
    parameters=RegMeanParameters,
    needs=_NEEDS,
    prepare=partial(prepare, through_merged=False),
    equation="W = (Σₖ Gₖ)⁻¹ Σₖ Gₖ Wₖ, Gₖ = Xₖᵀ Xₖ of what a linear layer reads",
)
PLUSPLUS = Method(
    lambda parameters: regmean,
    parameters=RegMeanParameters,
    needs=_NEEDS,
    prepare=partial(prepare, through_merged=True),
    equation="W = (Σₖ Gₖ)⁻¹ Σₖ Gₖ Wₖ, Gₖ = Xₖᵀ Xₖ behind the merged units before",
)
