"""Set up the methods of fine-tuning: the objective, the trained and the frozen parameters."""

from collections.abc import Sequence
from functools import partial, reduce
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from recall_jax.models.architecture import Architecture
from recall_jax.models.forward import Params
from recall_jax.training.ewc import Anchor, ewc_penalty, fisher_of_batches, load_anchor, online
from recall_jax.training.examples import Examples, validation_batches
from recall_jax.training.lora import init_lora, lora_loss
from recall_jax.training.loss import completion_loss
from recall_jax.training.settings import TrainingSettings
from recall_jax.training.step import Loss, Objective, TrainingBatch, Tree


class TrainingMethod(NamedTuple):
    """Hold an objective, and the trees of numpy arrays that it is a function of."""

    objective: Objective
    trainable: Tree
    frozen: Tree


def make_method(
    settings: TrainingSettings,
    arch: Architecture,
    params: Params,
    earlier: Sequence[Examples],
    dtype: DTypeLike,
    mesh: Mesh,
) -> TrainingMethod:
    """Return the method that the settings name, for the base model's `params`.

    `earlier` are the rows of `ewc_data`, one for each file. Raises InputError if LoRA's target
    modules or the files of EWC do not match the model.
    """
    if settings.lora is not None:
        start = init_lora(arch, settings.lora, jax.random.key(settings.seed))
        loss = lora_loss(arch, settings.lora, dtype=dtype, remat=settings.remat, mesh=mesh)
        return TrainingMethod(Objective(loss), jax.device_get(start), {"base": params})
    # Float32 master weights: an update is often too small to change a bfloat16 number.
    master = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)
    loss = full_loss(arch, dtype=dtype, remat=settings.remat, mesh=mesh)
    if settings.ewc_strength is None:
        return TrainingMethod(Objective(loss), master, {})
    anchors = [load_anchor(Path(file), master) for file in settings.ewc_fisher]
    anchors += [make_anchor(settings, arch, master, rows, dtype, mesh) for rows in earlier]
    if settings.ewc_decay is not None:
        anchors = [reduce(partial(online, decay=settings.ewc_decay), anchors)]
    objective = Objective(loss, ewc_penalty(settings.ewc_strength))
    return TrainingMethod(objective, master, {"anchors": anchors})


def full_loss(
    arch: Architecture, *, dtype: DTypeLike, remat: bool = False, mesh: Mesh | None = None
) -> Loss:
    """Return `completion_loss` as a function of all parameters; nothing is frozen."""

    def loss(trainable: Params, frozen: Any, batch: TrainingBatch, key: Any) -> Any:
        return completion_loss(arch, trainable, batch, dtype=dtype, remat=remat, mesh=mesh)

    return loss


def make_anchor(
    settings: TrainingSettings,
    arch: Architecture,
    weights: Tree,
    examples: Examples,
    dtype: DTypeLike,
    mesh: Mesh,
) -> Anchor:
    """Return the anchor of `examples`: Fisher information of `ewc_samples` rows at `weights`."""
    order = np.random.default_rng([settings.seed, len(examples)]).permutation(len(examples))
    rows = examples.take(order[: settings.ewc_samples])
    batches = validation_batches(rows, settings.batch_size)
    loss = full_loss(arch, dtype=dtype, remat=settings.remat)
    fisher = fisher_of_batches(loss, weights, {}, batches, mesh)
    return Anchor(jax.device_get(fisher), weights)
