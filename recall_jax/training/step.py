"""One step of training: the gradients of a few micro-batches, one update, nothing else.

What is trained is a tree, whatever it holds: all parameters, or a LoRA beside a frozen base. A
method is an `Objective` and the two trees `trainable` and `frozen` that it is a function of; step,
loop, sharding and checkpoints are the same for all.
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
    """Right-padded rows, int32 (B, T) each; `loss_mask` is 1 on the tokens to be predicted.

    A row without tokens only fills a batch.
    """

    input_ids: Any
    attention_mask: Any
    loss_mask: Any


class Loss(Protocol):
    """The loss of a batch, to be differentiated in `trainable`."""

    def __call__(
        self, trainable: Tree, frozen: Tree, batch: TrainingBatch, key: Array | None
    ) -> tuple[Array, Array]:
        """Summed loss and number of tokens counted, float32 scalars; without `key`, no dropout."""


@dataclass(frozen=True)
class Objective:
    """What is minimised: mean of `loss` over the counted tokens + penalty(trainable, frozen).

    `frozen` is a tree that no step changes: the base of a LoRA, the anchor and Fisher information
    of EWC, or nothing. What is named as a decoder's parameters in it, or in the trainable tree, is
    cut over a mesh by `recall_jax.parallel.mesh`; all else is repeated on every device.
    """

    loss: Loss
    penalty: Callable[[Tree, Tree], Array] | None = None


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes; `step` is the number of steps made, int32."""

    trainable: Tree
    optimizer_state: Tree
    step: Array


class Metrics(NamedTuple):
    """Of one step, float32 scalars: `loss` is the mean per counted token, without the penalty."""

    loss: Array
    penalty: Array
    gradient_norm: Array  # before clipping
    tokens: Array  # counted


Step = Callable[[TrainState, Tree, TrainingBatch, Array], tuple[TrainState, Metrics]]
EvaluationStep = Callable[[Tree, Tree, TrainingBatch], tuple[Array, Array]]


def init_state(trainable: Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(trainable, optimizer.init(trainable), jnp.int32(0))


def make_step(
    objective: Objective, optimizer: optax.GradientTransformation, shardings: TrainState | None
) -> Step:
    """A compiled function (state, frozen, batch, key) -> (state, metrics); `state` is donated.

    The batch is A micro-batches, (A, B, T) each. Their gradients are summed and divided by the
    number of tokens counted in all of them, so that the update is that of one batch of A * B rows.
    `shardings` are where the state's leaves live, and stay.
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
        updates, memory = optimizer.update(gradients, state.optimizer_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, updates)
        metrics = Metrics(loss / tokens, penalty, norm, tokens)
        return TrainState(trainable, memory, state.step + 1), metrics

    return step


def make_evaluation(objective: Objective) -> EvaluationStep:
    """A compiled function of a batch (B, T): summed loss and tokens counted, without dropout."""
    return jax.jit(lambda trainable, frozen, batch: objective.loss(trainable, frozen, batch, None))


def _summed(
    objective: Objective, trainable: Tree, frozen: Tree, batch: TrainingBatch, key: Array
) -> tuple[Array, Array, Tree]:
    """Loss, tokens and gradients, summed over the micro-batches (A, B, T) of `batch`."""
    gradient = jax.value_and_grad(objective.loss, has_aux=True)

    def add(
        totals: tuple[Array, Array, Tree], part: tuple[Array, TrainingBatch]
    ) -> tuple[Any, None]:
        index, rows = part
        (loss, tokens), gradients = gradient(
            trainable, frozen, rows, jax.random.fold_in(key, index)
        )
        return jax.tree.map(jnp.add, totals, (loss, tokens, gradients)), None

    nothing = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    parts = (jnp.arange(batch.input_ids.shape[0]), batch)
    totals, _ = jax.lax.scan(add, nothing, parts)
    return totals
