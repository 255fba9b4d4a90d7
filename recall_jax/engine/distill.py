"""RECALL distilled: its weights refined before the walk, with all models in memory."""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import MIB, held_bytes
from recall_jax.engine.device import not_finite
from recall_jax.engine.findings import Findings, compare_representations
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.own_samples import own_samples
from recall_jax.engine.refine import Match, pooled_states, refine
from recall_jax.engine.rules import (
    Merge,
    Prepared,
    Rule,
    mean_by_unit,
    recall_comparison,
    values_by_tensor,
)
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.inputs.batches import padded_length
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.methods.parameters import DistillParameters, RecallParameters
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import tensor_shapes, to_flax
from recall_jax.models.forward import Params
from recall_jax.models.loss import TOKENS_AT_ONCE

_FLOAT32 = 4


def prepare_distill(merge: Merge) -> Prepared:
    """Refine the coefficients of the task vectors, or take them from the journal.

    The base and all models are in memory meanwhile, and gone before the walk. UnfinishedError
    where they do not fit, or an interrupted merge saw other texts; InputError where their
    parameters or the loss are not finite.
    """
    recipe, journal = merge.recipe, merge.journal
    parameters = recipe.parameters
    assert isinstance(parameters, DistillParameters)
    assert merge.base is not None
    checkpoints = [merge.base, *merge.models]
    arch = common_architecture(checkpoints, recipe.ignore_config)
    dtype = compute_dtype(recipe.compute_dtype, merge.models[-1])
    batch_size = (recipe.samples or Samples()).batch_size

    def check(lengths: Sequence[Sequence[int]], beside: int = 0) -> int:
        needed = beside + held_bytes()
        needed += distill_bytes(arch, checkpoints, lengths, batch_size, dtype)
        if needed > merge.budget:
            raise UnfinishedError(
                f"recall_distill keeps the base and all models in memory: it needs "
                f"{needed / MIB:,.0f} MiB and may take {merge.budget / MIB:,.0f} MiB: allow more, "
                "or take fewer or shorter samples (--memory, samples.count, samples.max_tokens)"
            )
        return needed

    with merge.clock.stage("select"):
        own = own_samples(merge, arch, check, with_base=True)
    needed = check([[len(ids) for ids in samples.token_ids] for samples in own])
    prepared = journal.prepared or {}
    if "coefficients" not in prepared:
        merge.announce(_describe(own, parameters, len(merge.models)))
        with merge.clock.stage("distill"):
            found, losses = _refined(merge, arch, checkpoints, own, batch_size, dtype)
        plain = {name: row.astype(np.float64).tolist() for name, row in found.items()}
        journal.record_prepared({**prepared, "coefficients": plain, "losses": losses.tolist()})
    assert journal.prepared is not None
    coefficients = {
        name: np.asarray(row, np.float32) for name, row in journal.prepared["coefficients"].items()
    }
    values = {
        name: {"weight": coefficients[name], "lambda_": np.float32(1)} for name in merge.plan.specs
    }
    findings = Findings(
        mean_by_unit(coefficients, merge.plan.specs),
        loss_curve=np.asarray(journal.prepared["losses"]),
    )
    by_tensor = values_by_tensor(values, merge.plan.specs)
    return Prepared(
        Rule(by_tensor.values, lambda: findings),
        merge.models,
        needed=max(needed, held_bytes() + merge.beside),
        cut={"batch_size": batch_size},
        compute_dtype=np.dtype(dtype).name,
        own=own[1:],
    )


def distill_bytes(
    arch: Architecture,
    models: Sequence[Checkpoint],
    lengths: Sequence[Sequence[int]],
    batch_size: int,
    dtype: DTypeLike,
) -> int:
    """The memory that refining takes, a bound from above; `lengths` are of each model's samples.

    All models as stored, the merged one and its gradient in float32, the teachers' outputs, and
    what a batch computes with.
    """
    shapes = tensor_shapes(arch)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    itemsize = np.dtype(dtype).itemsize
    length = padded_length(max(each for own in lengths for each in own))
    rows = sum(-(-len(own) // batch_size) * batch_size for own in lengths)
    projections = len(models) * arch.vocab_size * arch.hidden_size * _FLOAT32
    # A block computed again: its states, those of the feed-forward, and the attention's scores.
    states = 4 * arch.hidden_size + 4 * arch.intermediate_size + arch.num_attention_heads * length
    inputs = arch.num_hidden_layers * arch.hidden_size * itemsize
    batch = batch_size * length * (2 * states * _FLOAT32 + inputs)
    logits = 8 * batch_size * min(length, TOKENS_AT_ONCE) * arch.vocab_size * _FLOAT32
    return (
        2 * sum(spec.nbytes for model in models for spec in model.specs.values())  # host, device
        + 3 * numbers * _FLOAT32
        + projections
        + rows * length * arch.hidden_size * itemsize
        + batch
        + logits
    )


def _refined(
    merge: Merge,
    arch: Architecture,
    checkpoints: Sequence[Checkpoint],
    own: Sequence[Tokenized],
    batch_size: int,
    dtype: DTypeLike,
) -> tuple[Mapping[str, np.ndarray], np.ndarray]:
    parameters = merge.recipe.parameters
    assert isinstance(parameters, DistillParameters)
    models = [_loaded(model, arch) for model in checkpoints]
    start = _recall_weights(merge, arch, models[1:], own[-1], batch_size, dtype)
    asked = {name: parameters.match.get(name, 0.0) for name in ("kl", "js", "hidden")}
    found = refine(
        arch,
        models,
        [samples.token_ids for samples in own],
        start,
        Match(**asked, temperature=parameters.temperature),
        anchor=parameters.anchor,
        steps=parameters.steps,
        learning_rate=parameters.learning_rate,
        by_tensor=parameters.coefficients == "tensor",
        batch_size=batch_size,
        dtype=dtype,
        progress=lambda step, loss: merge.progress(
            f"distillation: loss {loss:.4f}", step, parameters.steps + 1
        ),
    )
    if not np.isfinite(found.losses).all():
        raise InputError(
            "the distillation's loss is not finite: lower parameters.learning_rate, or set "
            "compute_dtype: float32"
        )
    return found.coefficients, found.losses


def _loaded(model: Checkpoint, arch: Architecture) -> Params:
    """A whole model, as stored. Raises InputError where a parameter is not finite."""
    tensors = {name: model.read(name) for name in tensor_shapes(arch)}
    if fault := not_finite(model.name, tensors):
        raise InputError(fault)
    return to_flax(arch, tensors)


def _recall_weights(
    merge: Merge,
    arch: Architecture,
    experts: Sequence[Params],
    newest: Tokenized,
    batch_size: int,
    dtype: DTypeLike,
) -> np.ndarray:
    """RECALL's weights (K, U) of the experts, compared on the newest one's samples."""
    defaults = RecallParameters()
    comparison = recall_comparison(defaults, [entry.model for entry in merge.recipe.models])
    reps = np.stack(
        [pooled_states(arch, model, newest.token_ids, batch_size, dtype) for model in experts]
    )
    try:
        found = compare_representations(
            reps, comparison, defaults.weighing, units=list(merge.plan.units)
        )
    except InputError as error:  # what it advises are parameters of recall's
        if not np.isfinite(reps).all():
            raise
        raise InputError(
            f"the samples of {merge.models[-1].name} are too few or too much alike for RECALL's "
            "weights, which the coefficients start from: give more varied data, or samples.prompts"
        ) from error
    return found.weights


def _describe(own: Sequence[Tokenized], parameters: DistillParameters, num_experts: int) -> str:
    rows = sum(len(samples.rows) for samples in own[1:])
    return (
        f"distillation: {parameters.steps} steps on {rows} rows of {num_experts} models and "
        f"{len(own[0].rows)} of the base, all of them in memory"
    )
