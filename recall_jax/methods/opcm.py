"""OPCM: task vectors added one after the other, each off the accumulated of those before it."""

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
    """`opcm`: the share of a spectrum that counts as taken."""

    alpha: Annotated[Number, Field(ge=0, le=1)] = 0.5


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

    in the order of the models; the norms are of the whole models. P_{t-1} is `project_out` with
    A_{t-1} as the accumulated where `values` holds `alpha` (), which is for the weights of linear
    layers; all else is added as it stands. The authors divide by lambda_t at every step and
    multiply by it at the next, which leaves this sum, as no scale changes singular vectors. Base
    and K models are of one shape, whole where there is `alpha`; `values` holds `lambda_` ().
    """
    del reference
    accumulated, _ = sequential_sum(models, values, base)
    return add_to_base(base, accumulated / values["lambda_"], dtype)


def sequential_sum(
    models: Sequence[jax.Array], values: Mapping[str, jax.Array], base: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """A_K, and the squared norms (K + 1,) of D_1 … D_K and A_K: float32, arguments as in `opcm`."""
    vectors = task_vectors(models, base)
    accumulated = vectors[0]
    for vector in vectors[1:]:
        accumulated += (
            project_out(vector, accumulated, values["alpha"]) if "alpha" in values else vector
        )
    return accumulated, jnp.stack([tree_sum(jnp.square(each)) for each in (*vectors, accumulated)])


def project_out(vector: jax.Array, accumulated: jax.Array, alpha: jax.Array) -> jax.Array:
    """D without its part in the leading singular subspaces of A, both (m, n) float32.

    A = U S V^T, and U^T D V loses its diagonal and its leading r x r block: r is how many of the
    largest singular values sum up to `alpha` of all at most. So does the authors' code (in
    tanganke/fusion_bench), but for singular values of zero, of which low-rank changes have many:
    these have no vectors of their own whose part could be taken out.
    """
    left, singular, right = jnp.linalg.svd(accumulated, full_matrices=False)
    sums = jnp.cumsum(singular)
    has_vectors = singular > max(accumulated.shape) * jnp.finfo(jnp.float32).eps * singular[0]
    leading = has_vectors & (sums <= alpha * sums[-1])
    own = jnp.diag(has_vectors) | (leading[:, None] & leading[None, :])
    inside = _product(_product(left.T, vector), right.T)
    return vector - _product(_product(left, jnp.where(own, inside, 0)), right)


def _product(one: jax.Array, other: jax.Array) -> jax.Array:
    return jnp.matmul(one, other, precision="highest")


@dataclass(frozen=True)
class OpcmScale:
    """What the journal keeps: lambda, of the whole models."""

    scale: float


def prepare(merge: Merge[OpcmParameters, Parameters]) -> Prepared:
    """Take one pass over the models for lambda, or lambda from the journal.

    It is that of the whole merged model, so that nothing can be written before all is summed.
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
    scaled = {name: {**own, "lambda_": scale} for name, own in values.items()}
    rule = values_by_tensor(scaled, dict.fromkeys(scaled, share), walk.specs)
    return Prepared(rule, merging_bytes(walk))


def _scale(merge: Merge[OpcmParameters, Parameters], values: Mapping[str, Values]) -> float:
    """lambda: the norm of the sum over the mean norm of the task vectors, of the whole models."""
    walk = merge.checkpoints
    plan, layout, units = walk.plan, walk.layout, walk.units
    squares = np.zeros(len(merge.names) + 1)
    for done, (unit, names) in enumerate(units.items()):
        read = sum(model.bytes_read for model in plan.inputs.all)
        merge.progress(f"first pass: {unit}", done, len(units), read=read, written=0)
        for name in names:
            spec = plan.specs[name]
            if not is_float(spec.dtype) or not spec.nbytes:
                continue  # none is merged
            stored: Inputs[Any] = plan.inputs.map(partial(layout.read, name=name))
            squares += layout.sum_chunks(
                _squares, stored, values[name], spec, full="alpha" in values[name]
            )
            if not np.isfinite(squares).all():
                told = layout.fault(plan.inputs.map(lambda model: model.name), name, stored)
                raise InputError(told or f"tensor {name}: its changes overflow float32")
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
