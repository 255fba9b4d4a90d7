"""Run the training loop: steps over shuffled batches, validation, checkpoints, early stopping.

A step depends only on its number, so that a resumed run makes the same steps as an uninterrupted
one.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from recall_jax.errors import UnfinishedError
from recall_jax.files.progress import Progress, silent
from recall_jax.parallel.mesh import parameter_shardings, put_parameters, put_rows
from recall_jax.training.checkpoints import History, TrainingCheckpoints
from recall_jax.training.examples import (
    Examples,
    make_training_batch,
    rows_of_step,
    validation_batches,
)
from recall_jax.training.optimizer import Schedule
from recall_jax.training.step import (
    EvaluationStep,
    Metrics,
    Objective,
    TrainingBatch,
    Tree,
    init_state,
    make_evaluation,
    make_step,
)


@dataclass(frozen=True)
class TrainingPlan:
    """State how many steps to make, of how many rows, and how often to save and evaluate.

    A step takes `accumulate` micro-batches of `batch_size` rows. `save_every` and `evaluate_every`
    are numbers of steps, 0 for never. The run stops early after `patience` evaluations without a
    better one, never if it is None.
    """

    steps: int
    batch_size: int
    accumulate: int = 1
    seed: int = 0
    save_every: int = 0
    evaluate_every: int = 0
    patience: int | None = None


def train(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    rate: Schedule,
    trainable: Tree,
    frozen: Tree,
    examples: Examples,
    validation: Examples | None,
    plan: TrainingPlan,
    *,
    mesh: Mesh,
    checkpoints: TrainingCheckpoints,
    resume: bool = False,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> tuple[Tree, History]:
    """Train by the plan, and return the weights with the best validation loss, and the history.

    Without `validation` the weights are those of the last step. `rate` is the schedule in the
    optimizer, which progress displays. With `resume` the run continues from `checkpoints`. Raises
    UnfinishedError if the loss, the gradient or the weights are no longer finite.
    """
    like = jax.eval_shape(lambda tree: init_state(tree, optimizer), trainable)
    shardings = parameter_shardings(like, mesh)
    history = History()
    if resume and (found := checkpoints.resume(like)) is not None:
        state, history = put_parameters(found[0], mesh), found[1]
        announce(f"going on after step {len(history.losses)}")
    else:
        start = jax.jit(
            lambda tree: init_state(tree, optimizer), donate_argnums=0, out_shardings=shardings
        )
        state = start(put_parameters(trainable, mesh))
    frozen = put_parameters(frozen, mesh)
    step, evaluate = make_step(objective, optimizer, shardings), make_evaluation(objective)
    held_out = [] if validation is None else validation_batches(validation, plan.batch_size)
    key, rows_per_step = jax.random.key(plan.seed), plan.accumulate * plan.batch_size
    meter = _Meter(history, plan.steps, rate, progress)
    while (made := meter.steps_made) < plan.steps and not _is_exhausted(plan.patience, history):
        rows = rows_of_step(made, len(examples), rows_per_step, plan.seed)
        batch = make_training_batch(examples, rows, (plan.accumulate, plan.batch_size))
        with meter.dispatching(batch):
            state, metrics = step(state, frozen, put_rows(batch, mesh, axis=1), key)
        meter.record(metrics)
        made += 1
        if held_out and (made == plan.steps or _is_due(made, plan.evaluate_every)):
            with meter.pause():
                loss = _mean_loss(evaluate, state.trainable, frozen, held_out, mesh)
                if not math.isfinite(loss):
                    raise _diverged(f"the validation loss is {loss} after step {made}", meter.saved)
                announce(f"step {made}: validation loss {loss:.4f}")
                if loss < history.best_loss:
                    history.best_step = made
                    checkpoints.save_best(state.trainable, made)
                history.validation.append((made, loss))
        if made < plan.steps and _is_due(made, plan.save_every):
            with meter.pause():
                checkpoints.save(state, history)
                meter.saved = made
    meter.flush()
    if history.best_step is not None:
        return checkpoints.load_best(like.trainable, history.best_step), history
    if not _is_finite(state.trainable):
        raise _diverged(f"the weights are not finite after step {plan.steps}", meter.saved)
    return state.trainable, history


@jax.jit
def _is_finite(tree: Tree) -> jax.Array:
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]).all()


class _Meter:
    """Record losses and speed, and show progress, a step late so that the device never waits."""

    def __init__(self, history: History, steps: int, rate: Schedule, progress: Progress) -> None:
        self.saved = len(history.losses)  # number of steps at the last checkpoint
        self._history, self._steps, self._rate, self._progress = history, steps, rate, progress
        self._pending: deque[tuple[Metrics, int]] = deque()
        self._shapes: set[tuple[int, ...]] = set()
        self._tokens = 0  # number of tokens in the step being dispatched
        self._since = time.perf_counter()

    @property
    def steps_made(self) -> int:
        """Return the number of steps dispatched, including those before a resumption."""
        return len(self._history.losses) + len(self._pending)

    @contextmanager
    def dispatching(self, batch: TrainingBatch) -> Iterator[None]:
        """Exclude compilation, which the first step of a shape waits for, from the time."""
        self._tokens = int(batch.attention_mask.sum())
        began = time.perf_counter()
        yield
        if batch.input_ids.shape not in self._shapes:
            self._shapes.add(batch.input_ids.shape)
            self._since += time.perf_counter() - began

    def record(self, metrics: Metrics) -> None:
        """Queue the metrics of the dispatched step, and read those of the steps before it."""
        self._pending.append((metrics, self._tokens))
        self.flush(keep=1)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Read all metrics, and exclude the time until the end of the context."""
        self.flush()
        yield
        self._since = time.perf_counter()

    def flush(self, keep: int = 0) -> None:
        """Read the metrics of all steps but the last `keep`; UnfinishedError if not finite."""
        history = self._history
        while len(self._pending) > keep:
            metrics, tokens = self._pending.popleft()
            step, loss = len(history.losses) + 1, float(metrics.loss)
            if not math.isfinite(loss):
                raise _diverged(f"the loss is {loss} at step {step}", self.saved)
            if not math.isfinite(norm := float(metrics.gradient_norm)):
                raise _diverged(f"the gradient's norm is {norm} at step {step}", self.saved)
            now = time.perf_counter()
            history.seconds += now - self._since
            self._since = now
            history.losses.append(loss)
            history.tokens += tokens
            rate = float(self._rate(step - 1))
            note = f"rate {rate:.1e}, {history.tokens / history.seconds:,.0f} tokens/s"
            self._progress(f"loss {loss:.4f}", step, self._steps, note=note)


def _mean_loss(
    evaluate: EvaluationStep,
    trainable: Tree,
    frozen: Tree,
    batches: Sequence[TrainingBatch],
    mesh: Mesh,
) -> float:
    sums = [evaluate(trainable, frozen, put_rows(batch, mesh)) for batch in batches]
    losses, tokens = zip(*jax.device_get(sums), strict=True)
    return math.fsum(losses) / math.fsum(tokens)


def _is_exhausted(patience: int | None, history: History) -> bool:
    return patience is not None and history.evaluations_since_best >= patience


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _diverged(what: str, saved: int) -> UnfinishedError:
    checkpoint = f"; the last checkpoint, of step {saved}, is sound" if saved else ""
    return UnfinishedError(
        f"{what}: try a lower finetune.learning_rate, a longer finetune.warmup or "
        f"finetune.compute_dtype float32{checkpoint}"
    )
