"""Refine coefficients of task vectors by distillation: the merged model learns from its models.

`refine` is a pure function of arrays. It trains one number for each model and unit or tensor; the
models' parameters are constant.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.inputs.batches import padded_length
from recall_jax.methods.distillation import (
    DistillationBatches,
    Match,
    make_distillation_batches,
    teacher_distance,
)
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.convert import tensor_shapes, unit_params, unit_tensors
from recall_jax.models.forward import Params
from recall_jax.models.loss import TOKENS_AT_ONCE

Array = jax.Array
_FLOAT32 = 4
_ADAM = optax.scale_by_adam()


class Refined(NamedTuple):
    """Hold coefficients (K,) float32 of every tensor by its name on disk, and losses (steps + 1,).

    The losses are those before each step, and after the last one.
    """

    coefficients: dict[str, np.ndarray]
    losses: np.ndarray


def refine(
    arch: Architecture,
    models: Sequence[Params],
    samples: Sequence[Sequence[Sequence[int]]],
    start: np.ndarray,
    match: Match,
    *,
    anchor: float = 1.0,
    steps: int = 150,
    learning_rate: float = 0.02,
    by_tensor: bool = False,
    batch_size: int,
    dtype: DTypeLike = jnp.float32,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> Refined:
    """Return the coefficients c_k of the task vectors theta_k - B of K experts in a merged model.

        theta = B + sum over k of c_k (theta_k - B), c_k for each unit, or `by_tensor`
        loss  = mean over experts of D(k, theta) + anchor D(base, theta)
        D(t, theta) = mean over tokens of t's samples of T^2 (kl KL(p || q) + js JS(p, q))
                    + hidden mean over t's samples and units of |r_t - r|^2 / mean |r_t|^2

    p and q are the next-token distributions of teacher and merged model at temperature T, r their
    pooled states; JS(p, q) = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Lin 1991), which
    is at most log 2. The optimiser is Adam (Kingma and Ba 2015, arXiv:1412.6980) with a cosine
    decay (Loshchilov and Hutter 2017, arXiv:1608.03983); each step is on all samples.

    `models` are the base and the K experts, with the layout of `convert.to_flax`, all in memory;
    `samples` are token ids of rows of each, of which the base may have none; `start` (K, U) holds
    the initial coefficients. The numbers do not affect the program, and equal arguments give equal
    bits.
    """
    placed = [jax.device_put(model) for model in models]
    batches = make_distillation_batches(arch, placed, samples, anchor, batch_size, dtype)
    columns = dict(zip(arch.units, np.asarray(start, np.float32).T, strict=True))
    coefficients: Any = columns
    if by_tensor:
        coefficients = {
            name: column for unit, column in columns.items() for name in unit_tensors(arch, unit)
        }
    coefficients = jax.tree.map(jnp.asarray, coefficients)
    state = _ADAM.init(coefficients)
    unit = EMBED if arch.tie_word_embeddings else HEAD
    projections = {unit: jax.tree.map(lambda *each: jnp.stack(each), *(m[unit] for m in placed))}
    losses = []
    for step in range(steps + 1):
        last = coefficients
        rate = learning_rate * (1 + np.cos(np.pi * step / max(steps, 1))) / 2
        loss, coefficients, state = _step(
            arch,
            match,
            placed,
            projections,
            batches,
            coefficients,
            state,
            np.float32(rate),
            dtype,
        )
        losses.append(float(loss))
        progress(step, losses[-1])
    found = jax.tree.map(np.asarray, _of_tensors(arch, last))
    return Refined(found, np.asarray(losses))


def mix(arch: Architecture, models: Sequence[Params], coefficients: Mapping[str, Array]) -> Params:
    """Return the base plus the weighted task vectors, float32; arguments as in `refine`."""
    named = _of_tensors(arch, coefficients)
    embed, *layers, head = (unit_params(arch, unit, named) for unit in arch.units)
    stacked = jax.tree.map(lambda *each: jnp.stack(each, axis=1), *layers)  # (K, L)
    base, *experts = models

    def mixed(weights: Array, base: Array, *experts: Array) -> Array:
        wide = base.astype(jnp.float32)
        total = wide
        for weight, expert in zip(weights, experts, strict=True):
            spread = weight.reshape(weight.shape + (1,) * (wide.ndim - weight.ndim))
            total += spread * (expert.astype(jnp.float32) - wide)
        return total

    tree = {EMBED: embed, LAYERS: stacked, HEAD: head}
    return jax.tree.map(mixed, tree, base, *experts)


def _of_tensors(arch: Architecture, coefficients: Mapping[str, Array]) -> dict[str, Array]:
    """Return the coefficients of every tensor, given those of every tensor or every unit."""
    return {
        name: coefficients[unit if unit in coefficients else name]
        for unit in arch.units
        for name in unit_tensors(arch, unit)
    }


@partial(jax.jit, static_argnames=("arch", "match", "dtype"))
def _step(
    arch: Architecture,
    match: Match,
    models: Sequence[Params],
    projections: Params,
    batches: Sequence[DistillationBatches],
    coefficients: Any,
    state: Any,
    rate: Array,
    dtype: DTypeLike,
) -> tuple[Array, Any, Any]:
    """Return the loss, the coefficients after a step of Adam, and Adam's state.

    `projections` are the models' units with the output projection, (K + 1, …).
    """
    merged, pull_back = jax.vjp(partial(mix, arch, models), coefficients)

    def add(totals: tuple[Array, Params], batch: DistillationBatches) -> tuple[Any, None]:
        teacher = jax.tree.map(lambda each: each[batch.teacher], projections)
        distance = partial(teacher_distance, arch, match, dtype=dtype)
        found = jax.value_and_grad(distance)(merged, teacher, batch)
        return jax.tree.map(jnp.add, totals, found), None

    # Gradients are summed batch by batch, so that no batch is kept for the backward pass.
    totals: Any = (jnp.float32(0), jax.tree.map(jnp.zeros_like, merged))
    for group in batches:
        totals, _ = jax.lax.scan(add, totals, group)
    loss, gradients = totals
    (gradients,) = pull_back(gradients)
    with jax.numpy_dtype_promotion("standard"):  # optax counts steps in integers
        updates, state = _ADAM.update(gradients, state)
    moved = jax.tree.map(lambda value, update: value - rate * update, coefficients, updates)
    return loss, moved, state


def refining_bytes(
    arch: Architecture,
    stored_bytes: int,
    lengths: Sequence[Sequence[int]],
    batch_size: int,
    dtype: DTypeLike,
) -> int:
    """Return an upper bound on the bytes of memory that `refine` takes.

    `stored_bytes` is the size of all models as stored; `lengths` are those of each model's samples,
    in tokens. Besides the models, memory holds the merged model and its gradient in float32, the
    teachers' outputs, and the activations of a batch.
    """
    shapes = tensor_shapes(arch)
    numbers = sum(math.prod(shape) for shape in shapes.values())
    itemsize = np.dtype(dtype).itemsize
    length = padded_length(max(each for rows in lengths for each in rows))
    rows = sum(-(-len(each) // batch_size) * batch_size for each in lengths)
    projections = len(lengths) * arch.vocab_size * arch.hidden_size * _FLOAT32
    # A recomputed block: its states, those of the feed-forward layer, and attention scores.
    states = 4 * arch.hidden_size + 4 * arch.intermediate_size + arch.num_attention_heads * length
    inputs = arch.num_hidden_layers * arch.hidden_size * itemsize
    batch = batch_size * length * (2 * states * _FLOAT32 + inputs)
    logits = 8 * batch_size * min(length, TOKENS_AT_ONCE) * arch.vocab_size * _FLOAT32
    return (
        2 * stored_bytes  # on the host and on the device
        + 3 * numbers * _FLOAT32
        + projections
        + rows * length * arch.hidden_size * itemsize
        + batch
        + logits
    )
