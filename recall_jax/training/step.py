"""Make one step of training: accumulate the gradients of micro-batches, and update once.

A method is an `Objective` and the two trees `trainable` and `frozen` that it is a function of: all
parameters and nothing, or the factors of LoRA and the base model. Step, loop, sharding and
checkpoints are the same for all methods.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

Array = jax.Array
Tree = Any


class TrainingBatch(NamedTuple):
    """Hold right-padded rows, int32 (B, T) each; `loss_mask` is 1 on the tokens to be predicted.

    A row without tokens is padding.
    """

    input_ids: Any
    attention_mask: Any
    loss_mask: Any


class Loss(Protocol):
    """Compute the loss of a batch, differentiable in `trainable`."""

    def __call__(
        self, trainable: Tree, frozen: Tree, batch: TrainingBatch, key: Array | None
    ) -> tuple[Array, Array]:
        """Return the summed loss and the number of counted tokens, float32 ().

        There is no dropout without `key`.
        """


@dataclass(frozen=True)
class Objective:
    """Minimise the mean of `loss` over the counted tokens + penalty(trainable, frozen).

    `frozen` is a tree that no step changes: the base model of a LoRA, the anchors of EWC, or
    nothing. In both trees, leaves named as a decoder's parameters are sharded over a mesh by
    `recall_jax.parallel.mesh`; all others are replicated.
    """

    loss: Loss
    penalty: Callable[[Tree, Tree], Array] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Hold all that a step changes; `step` is the number of steps made, int32 ()."""

    trainable: Tree
    optimizer_state: Tree
    step: Array


class Metrics(NamedTuple):
    """Measure one step, float32 (): `loss` is the mean over counted tokens, without the penalty."""

    loss: Array
    penalty: Array
    gradient_norm: Array  # before clipping
    tokens: Array  # number of counted tokens


Step = Callable[[TrainState, Tree, TrainingBatch, Array], tuple[TrainState, Metrics]]
EvaluationStep = Callable[[Tree, Tree, TrainingBatch], tuple[Array, Array]]


def init_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """Return the state before the first step."""
    return TrainState(trainable, optimizer.init(trainable), jnp.int32(0))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, shardings: TrainState | None
) -> Step:
    """Return a compiled function (state, frozen, batch, key) -> (state, metrics).

    `state` is donated. The arrays of the batch are (A, B, T), for A micro-batches. Their gradients
    are summed and divided by the number of counted tokens in all of them, so that the update equals
    that of one batch of A * B rows. `shardings` are those of the state, before and after.
    """

    @partial(jax.jit, donate_argnums=0, out_shardings=shardings and (shardings, None))
    def step(
        state: TrainState, frozen: Tree, batch: TrainingBatch, key: Array
    ) -> tuple[TrainState, Metrics]:
        key = jax.random.fold_in(key, state.step)
        loss, tokens, gradients = _summed(objective, state.trainable, frozen, batch, key)
        gradients = jax.tree.map(lambda leaf: leaf / tokens, gradients)
        penalty = jnp.float32(0)
        if objective.penalty is not None:
            penalty, more = jax.value_and_grad(objective.penalty)(state.trainable, frozen)
            gradients = jax.tree.map(jnp.add, gradients, more)
        if shardings is not None:
            gradients = jax.lax.with_sharding_constraint(gradients, shardings.trainable)
        norm = optax.tree.norm(gradients)
        updates, optimizer_state = optimizer.update(
            gradients, state.optimizer_state, state.trainable
        )
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(loss / tokens, penalty, norm, tokens)
        return TrainState(trainable, optimizer_state, state.step + 1), metrics

    return step


def make_evaluation(objective: Objective) -> EvaluationStep:
    """Return a compiled function (trainable, frozen, batch) -> (summed loss, counted tokens).

    The arrays of the batch are (B, T). There is no dropout.
    """
    return jax.jit(lambda trainable, frozen, batch: objective.loss(trainable, frozen, batch, None))


def _summed(
    objective: Objective, trainable: Tree, frozen: Tree, batch: TrainingBatch, key: Array
) -> tuple[Array, Array, Tree]:
    """Return loss, tokens and gradients, summed over the micro-batches (A, B, T) of `batch`."""
    gradient = jax.value_and_grad(objective.loss, has_aux=True)

    def add(
        totals: tuple[Array, Array, Tree], micro_batch: tuple[Array, TrainingBatch]
    ) -> tuple[Any, None]:
        index, rows = micro_batch
        (loss, tokens), gradients = gradient(
            trainable, frozen, rows, jax.random.fold_in(key, index)
        )
        return jax.tree.map(jnp.add, totals, (loss, tokens, gradients)), None

    zeros = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    micro_batches = (jnp.arange(batch.input_ids.shape[0]), batch)
    totals, _ = jax.lax.scan(add, zeros, micro_batches)
    return totals
