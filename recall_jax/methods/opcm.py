"""Merge by OPCM: add task vectors in order, each projected off the sum of those before it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from pydantic import Field

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.engine.kernel import Values, fixed
from recall_jax.engine.merge import Merge, Prepared, merging_bytes, values_by_tensor
from recall_jax.engine.needs import Needs, linear_weights
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Number, Parameters
from recall_jax.methods.sparsify import tree_sum
from recall_jax.methods.task_vectors import add_to_base, task_vectors


class OpcmParameters(Parameters):
    """Hold the parameters of `opcm`: the share of the spectrum that is projected out."""

    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.5


def opcm(
    models: Sequence[jax.Array],
    values: Mapping[str, jax.Array],
    *,
    base: jax.Array,
    reference: int = -1,
    dtype: DTypeLike,
) -> jax.Array:
    """Return B + A_K / lambda, by orthogonal projection-based continual merging (arXiv:2501.09522).

        A_1 = D_1      A_t = A_{t-1} + P_{t-1}(D_t)      lambda = ||A_K|| / mean ||D_i||

    in the order of the models, with norms over the full models. P_{t-1} is `project_out` for
    A_{t-1} if `values` holds `alpha` (), as it does for the weights of linear layers, else the
    identity. The authors divide by lambda_t at every step and multiply by it at the next, which
    gives the same sum, since scaling does not change singular vectors. The base and the K models
    have one shape, and are full tensors if there is `alpha`; `values` holds `lambda_` ().
    """
    del reference
    accumulated, _ = sequential_sum(models, values, base)
    return add_to_base(base, accumulated / values["lambda_"], dtype)


def sequential_sum(
    models: Sequence[jax.Array], values: Mapping[str, jax.Array], base: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return A_K, and the squared norms (K + 1,) of D_1 … D_K and A_K, in float32.

    The arguments are those of `opcm`.
    """
    vectors = task_vectors(models, base)
    accumulated = vectors[0]
    for vector in vectors[1:]:
        accumulated += (
            project_out(vector, accumulated, values["alpha"]) if "alpha" in values else vector
        )
    return accumulated, jnp.stack([tree_sum(jnp.square(each)) for each in (*vectors, accumulated)])


def project_out(vector: jax.Array, accumulated: jax.Array, alpha: jax.Array) -> jax.Array:
    """Return D without its part in the leading singular subspaces of A, both (m, n) float32.

    With A = U S V^T, the diagonal and the leading r x r block of U^T D V become zero, where r
    counts the largest singular values whose sum is at most `alpha` of the total. The authors' code
    (tanganke/fusion_bench) does the same, except for singular values of zero, which low-rank
    changes have many of: they have no singular vectors of which a part could be removed.
    """
    left, singular, right = jnp.linalg.svd(accumulated, full_matrices=False)
    sums = jnp.cumsum(singular)
    has_vectors = singular > max(accumulated.shape) * jnp.finfo(jnp.float32).eps * singular[0]
    leading = has_vectors & (sums <= alpha * sums[-1])
    removed = jnp.diag(has_vectors) | (leading[:, None] & leading[None, :])
    inside = _product(_product(left.T, vector), right.T)
    return vector - _product(_product(left, jnp.where(removed, inside, 0)), right)


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="highest")


@dataclass(frozen=True)
class OpcmScale:
    """Record lambda, over the full models, in the journal."""

    scale: float


def prepare(merge: Merge[OpcmParameters, Parameters]) -> Prepared:
    """Return the rule, with lambda from one pass over the models, or from the journal.

    lambda is that of the full merged model, so nothing can be written before everything is summed.
    """
    walk, parameters = merge.checkpoints, merge.parameters
    alpha = {"alpha": np.float32(parameters.alpha)}
    values: dict[str, Values] = {
        name: alpha if linear_weights(name, spec) else {} for name, spec in walk.specs.items()
    }
    found = merge.journal.find_prepared(OpcmScale)
    if found is None:
        found = OpcmScale(_scale(merge, values))
        merge.journal.record_prepared(found)
    scale = np.float32(found.scale)
    share = np.full(len(merge.names), 1 / scale, np.float32)
    scaled = {name: {**each, "lambda_": scale} for name, each in values.items()}
    rule = values_by_tensor(scaled, dict.fromkeys(scaled, share), walk.specs)
    return Prepared(rule, merging_bytes(walk))


def _scale(merge: Merge[OpcmParameters, Parameters], values: Mapping[str, Values]) -> float:
    """Return lambda: the norm of the sum of the task vectors, over their mean norm."""
    walk = merge.checkpoints
    plan, layout, units = walk.plan, walk.layout, walk.units
    squares = np.zeros(len(merge.names) + 1)
    for done, (unit, names) in enumerate(units.items()):
        read = sum(model.bytes_read for model in plan.inputs.all)
        merge.progress(f"first pass: {unit}", done, len(units), read=read, written=0)
        for name in names:
            spec = plan.specs[name]
            if not is_float(spec.dtype) or not spec.nbytes:
                continue  # not merged
            stored: Inputs[Any] = plan.inputs.map(partial(layout.read, name=name))
            squares += layout.sum_chunks(
                _squares, stored, values[name], spec, full="alpha" in values[name]
            )
            if not np.isfinite(squares).all():
                fault = layout.fault(plan.inputs.map(lambda model: model.name), name, stored)
                raise InputError(fault or f"tensor {name}: its changes overflow float32")
            if plan.larger_than_memory:
                for model in plan.inputs.all:
                    model.drop(name)
    *norms, total = np.sqrt(squares)
    return float(total / np.mean(norms)) if total else 1.0


def _squares(models: Sequence[jax.Array], values: Values, base: jax.Array) -> jax.Array:
    return sequential_sum(models, values, base)[1]


METHOD = Method(
    lambda parameters: fixed(opcm),
    parameters=OpcmParameters,
    needs=Needs(base=True, passes=2, full_tensors=linear_weights, replicated=True, scratch=3),
    prepare=prepare,
    equation="θ = θ_base + Σₖ Pₖ(θₖ − θ_base) / λ, Pₖ off what came before",
)
