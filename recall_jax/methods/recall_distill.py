"""Merge by RECALL distilled: refine RECALL's weights before the walk, with all models in memory.

θ = θ_base + Σₖ cₖ (θₖ − θ_base)        c refined from RECALL's weights by `refine`
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field, Strict

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import MIB, held_bytes
from recall_jax.engine.device import find_not_finite
from recall_jax.engine.findings import Findings
from recall_jax.engine.kernel import Values, fixed
from recall_jax.engine.merge import Merge, Prepared, mean_by_unit, values_by_tensor
from recall_jax.engine.needs import Needs, Observation
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Number, Parameters, Positive
from recall_jax.methods.recall import RecallParameters, compare_representations, recall_comparison
from recall_jax.methods.task_arithmetic import task_arithmetic

if TYPE_CHECKING:
    from recall_jax.inputs.samples import Tokenized
    from recall_jax.models.forward import Params


class DistillParameters(Parameters):
    """Hold the parameters of `recall_distill`: the coefficients, and how they are refined.

    `match` weighs the distances of the merged model's outputs to those of its teachers: `js` or
    `kl` of its next-token distributions at `temperature`, `hidden` of its pooled states. `anchor`
    weighs the base among the teachers.
    """

    coefficients: Literal["unit", "tensor"] = "unit"
    match: Annotated[dict[Literal["js", "kl", "hidden"], Positive], Field(min_length=1)] = Field(
        {"js": 1.0}
    )
    anchor: Annotated[Number, Field(ge=0)] = 1.0
    temperature: Positive = 1.0
    steps: Annotated[int, Strict(), Field(ge=0)] = 150
    learning_rate: Positive = 0.02


@dataclass(frozen=True)
class Coefficients:
    """Record in the journal the coefficients (K,) by tensor name, and the loss at each step."""

    by_tensor: dict[str, list[float]]
    losses: list[float]


def prepare(merge: Merge[DistillParameters, Parameters]) -> Prepared:
    """Return the rule of the refined coefficients of the task vectors, or those in the journal.

    The base and all models are in memory while they are refined, and released before the walk.
    Raises UnfinishedError if they do not fit, or an interrupted merge used other texts; InputError
    if a parameter or the loss is not finite.
    """
    from recall_jax.engine.per_model_samples import per_model_samples
    from recall_jax.inputs.settings import Samples
    from recall_jax.methods.refine import refining_bytes

    walk, journal, parameters = merge.checkpoints, merge.journal, merge.parameters
    batch_size = (merge.samples or Samples()).batch_size
    specs = [spec for model in walk.inputs.all for spec in model.specs.values()]
    stored = sum(spec.nbytes for spec in specs)

    def check(lengths: Sequence[Sequence[int]], overhead: int = 0) -> int:
        needed = overhead + held_bytes()
        needed += refining_bytes(walk.arch, stored, lengths, batch_size, walk.dtype)
        if needed > walk.budget:
            raise UnfinishedError(
                f"recall_distill keeps the base and all models in memory: it needs "
                f"{needed / MIB:,.0f} MiB and may take {walk.budget / MIB:,.0f} MiB: allow more, "
                "or take fewer or shorter samples (--memory, samples.count, samples.max_tokens)"
            )
        return needed

    with merge.progress.stage("select"):
        model_samples = per_model_samples(merge, check, with_base=True)
    needed = check([[len(ids) for ids in samples.token_ids] for samples in model_samples])
    found = journal.find_prepared(Coefficients)
    if found is None:
        merge.progress.announce(_describe(model_samples, parameters, len(merge.names)))
        with merge.progress.stage("distill"):
            found = _refine_coefficients(merge, model_samples, batch_size)
        journal.record_prepared(found)
    coefficients = {name: np.asarray(row, np.float32) for name, row in found.by_tensor.items()}
    values: dict[str, Values] = {
        name: {"weight": coefficients[name], "lambda_": np.float32(1)} for name in walk.specs
    }
    findings = Findings(mean_by_unit(coefficients, walk.specs), loss_curve=np.asarray(found.losses))
    rule = values_by_tensor(values, coefficients, walk.specs)
    return Prepared(
        replace(rule, findings=lambda: findings),
        max(needed, held_bytes() + walk.overhead),
        batching={"batch_size": batch_size},
        compute_dtype=np.dtype(walk.dtype).name,
        per_model_samples=model_samples[1:],
    )


def _refine_coefficients(
    merge: Merge[DistillParameters, Parameters],
    model_samples: "Sequence[Tokenized]",
    batch_size: int,
) -> Coefficients:
    """Refine the coefficients, starting from RECALL's weights."""
    from recall_jax.methods.distillation import Match
    from recall_jax.methods.refine import refine
    from recall_jax.models.convert import tensor_shapes, to_flax

    walk, parameters = merge.checkpoints, merge.parameters
    shapes = tensor_shapes(walk.arch)
    models = [to_flax(walk.arch, _read(model, shapes)) for model in walk.inputs.all]
    start = _recall_weights(merge, models[1:], model_samples[-1], batch_size)
    weights = {name: parameters.match.get(name, 0.0) for name in ("kl", "js", "hidden")}
    found = refine(
        walk.arch,
        models,
        [samples.token_ids for samples in model_samples],
        start,
        Match(**weights, temperature=parameters.temperature),
        anchor=parameters.anchor,
        steps=parameters.steps,
        learning_rate=parameters.learning_rate,
        by_tensor=parameters.coefficients == "tensor",
        batch_size=batch_size,
        dtype=walk.dtype,
        progress=lambda step, loss: merge.progress(
            f"distillation: loss {loss:.4f}", step, parameters.steps + 1
        ),
    )
    if not np.isfinite(found.losses).all():
        raise InputError(
            "the distillation's loss is not finite: lower parameters.learning_rate, or set "
            "compute_dtype: float32"
        )
    plain = {name: row.astype(np.float64).tolist() for name, row in found.coefficients.items()}
    return Coefficients(plain, found.losses.tolist())


def _read(model: Checkpoint, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return all tensors of a model as stored; raises InputError if one is not finite."""
    tensors = {name: model.read(name) for name in names}
    if fault := find_not_finite(model.name, tensors):
        raise InputError(fault)
    return tensors


def _recall_weights(
    merge: Merge[DistillParameters, Parameters],
    experts: "Sequence[Params]",
    newest: "Tokenized",
    batch_size: int,
) -> np.ndarray:
    """Return RECALL's weights (K, U) of the experts, compared on the newest one's samples."""
    from recall_jax.methods.distillation import pooled_states_in_memory

    walk, defaults = merge.checkpoints, RecallParameters()
    comparison = recall_comparison(defaults, merge.names)
    reps = np.stack(
        [
            pooled_states_in_memory(walk.arch, model, newest.token_ids, batch_size, walk.dtype)
            for model in experts
        ]
    )
    try:
        found = compare_representations(reps, comparison, defaults.weighing, units=list(walk.units))
    except InputError as error:  # its advice is for parameters of recall
        if not np.isfinite(reps).all():
            raise
        raise InputError(
            f"the samples of {walk.inputs.newest.name} are too few or too much alike for RECALL's "
            "weights, which the coefficients start from: give more varied data, or samples.prompts"
        ) from error
    return found.weights


def _describe(
    model_samples: "Sequence[Tokenized]", parameters: DistillParameters, num_experts: int
) -> str:
    rows = sum(len(samples.rows) for samples in model_samples[1:])
    return (
        f"distillation: {parameters.steps} steps on {rows} rows of {num_experts} models and "
        f"{len(model_samples[0].rows)} of the base, all of them in memory"
    )


METHOD = Method(
    lambda parameters: fixed(task_arithmetic, normalize=False),
    parameters=DistillParameters,
    needs=Needs(
        models=2,
        base=True,
        samples="each",
        observes=frozenset({Observation.LOGITS, Observation.GRADIENTS}),
        by_unit=True,
        resident=True,
    ),
    prepare=prepare,
    equation="θ = θ_base + Σₖ cₖ (θₖ − θ_base), c refined from RECALL's weights",
)
