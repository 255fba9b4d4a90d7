"""Penalise changes to weights that earlier tasks depend on: elastic weight consolidation (EWC).

Kirkpatrick et al. 2017 (arXiv:1612.00796), eq. 3: the loss of a new task is

    loss(theta) + strength / 2 * sum over i of F_i (theta_i - theta*_i)^2

where theta* are the weights after an earlier task and F is the diagonal of the task's Fisher
information at theta*. The factor 1/2 is the paper's, from a Gaussian's log-density; a strength in
an implementation without it corresponds to twice that strength here.

F is the empirical Fisher information, computed with the labels in the data and per sample: the mean
over samples of the squared gradient of the sample's log-likelihood, which for a text is the sum
over its counted tokens. The square of a batch's mean gradient is a different quantity, and far
smaller.

Several tasks have an `Anchor` each, or are combined into one running anchor by `online` (Schwarz et
al. 2018, arXiv:1805.06370, section 3.2).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.writer import write_safetensors
from recall_jax.errors import InputError
from recall_jax.parallel.mesh import DATA, parameter_shardings, put_parameters
from recall_jax.training.step import Loss, TrainingBatch

Array = jax.Array
Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Anchor:
    """Hold the `fisher` information F of a task, float32, and the `weights` theta* for it.

    Both are trees of the same structure and shapes.
    """

    fisher: Tree
    weights: Tree


def fisher(loss_of_sample: Callable[[Tree, Any], Array], params: Tree, samples: Any) -> Tree:
    """Return the diagonal empirical Fisher information, float32, in a tree shaped as `params`.

    `loss_of_sample(params, sample)` is the negative log-likelihood of one sample; `samples` is a
    pytree with the n samples on axis 0. Samples are processed one by one, so that only one gradient
    is in memory at a time.
    """
    count = jax.tree.leaves(samples)[0].shape[0]
    groups = jax.tree.map(lambda leaf: leaf[:, None], samples)
    total = _add_squares(loss_of_sample, params, groups, _zeros(params))
    return jax.tree.map(lambda leaf: leaf / count, total)


def fisher_of_batches(
    loss: Loss, trainable: Tree, frozen: Tree, batches: Iterable[TrainingBatch], mesh: Mesh
) -> Tree:
    """Return the Fisher information of the rows of `batches`, as `fisher` does.

    `loss` is that of an `Objective`, without dropout. Rows without counted tokens are not samples.
    On a mesh, the rows processed at a time are as many as its axis `data` has devices, and each
    row's gradient is sharded as the parameters are.
    """
    shardings = parameter_shardings(trainable, mesh)

    @partial(jax.jit, donate_argnums=3, out_shardings=shardings)
    def add(trainable: Tree, frozen: Tree, groups: TrainingBatch, total: Tree) -> Tree:
        def loss_of_row(trainable: Tree, row: TrainingBatch) -> Array:
            return loss(trainable, frozen, TrainingBatch(*(leaf[None] for leaf in row)), None)[0]

        return _add_squares(loss_of_row, trainable, groups, total)

    total = jax.jit(_zeros, out_shardings=shardings)(trainable)
    trainable, frozen = put_parameters((trainable, frozen), mesh)
    groups, count = NamedSharding(mesh, PartitionSpec(None, DATA)), 0
    for batch in batches:
        rows = (leaf.reshape(-1, mesh.shape[DATA], leaf.shape[-1]) for leaf in batch)
        total = add(trainable, frozen, jax.device_put(TrainingBatch(*rows), groups), total)
        # The first token of a row has no context to be predicted from, and is never counted.
        count += int(np.asarray(batch.loss_mask)[:, 1:].any(axis=1).sum())
    return jax.tree.map(lambda leaf: leaf / count, total)


def ewc_penalty(strength: float) -> Callable[[Tree, Tree], Array]:
    """Return `penalty` for the anchors in `frozen["anchors"]`, as an `Objective` needs it."""
    return lambda trainable, frozen: penalty(trainable, frozen["anchors"], strength)


def penalty(weights: Tree, anchors: Sequence[Anchor], strength: float) -> Array:
    """Return strength / 2 * sum over anchors and weights of F (theta - theta*)^2, float32 ().

    Kirkpatrick et al. 2017, eq. 3.
    """
    total = jnp.float32(0)
    for anchor in anchors:
        terms = jax.tree.map(_weighted_change, anchor.fisher, weights, anchor.weights)
        total += jax.tree.reduce(jnp.add, terms)
    return 0.5 * strength * total


def online(previous: Anchor, newest: Anchor, decay: float) -> Anchor:
    """Return one anchor for all tasks so far: F = decay * F_previous + F_newest, newest weights.

    Schwarz et al. 2018, eq. 9; with a decay below 1, old tasks are forgotten gradually.
    """
    total = jax.tree.map(lambda old, new: decay * old + new, previous.fisher, newest.fisher)
    return Anchor(total, newest.weights)


def save_anchor(path: Path, anchor: Anchor) -> None:
    """Write a safetensors file with tensors `fisher.<path>` and `weights.<path>`."""
    trees = {"fisher": anchor.fisher, "weights": anchor.weights}
    write_safetensors(path, {name: np.asarray(leaf) for name, leaf in _named(trees).items()})


def load_anchor(path: Path, like: Tree) -> Anchor:
    """Return the anchor in a file, as numpy arrays.

    Raises InputError if the file is damaged, or its tensors do not have the names and shapes of the
    weights `like`.
    """
    file = SafetensorsFile(path)
    trees = {"fisher": like, "weights": like}
    expected = {name: tuple(leaf.shape) for name, leaf in _named(trees).items()}
    found = {name: spec.shape for name, spec in file.specs.items()}
    if found != expected:
        name = min(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise InputError(
            f"{path}: {name} is {found.get(name, 'missing')} where the weights that are trained "
            f"call for {expected.get(name, 'nothing')}; it is the anchor of another model"
        )
    tensors = {name: file.read(name) for name in expected}
    for name, array in tensors.items():
        least = 0 if name.startswith("fisher.") else -np.inf
        if not (np.isfinite(array).all() and (array >= least).all()):
            raise InputError(
                f"{path}: {name} holds NaN, infinite or negative values: write it again"
            )
    leaves = list(tensors.values())
    return Anchor(**jax.tree.unflatten(jax.tree.structure(trees), leaves))


def _add_squares(
    loss_of_sample: Callable[[Tree, Any], Array], params: Tree, groups: Any, total: Tree
) -> Tree:
    """Return `total` plus the sum over samples of the squared gradient of each.

    The samples are on axes 0 and 1 of `groups`; those on axis 1 are processed in parallel.
    """
    gradients = jax.vmap(jax.grad(loss_of_sample), in_axes=(None, 0))

    def add(total: Tree, group: Any) -> tuple[Tree, None]:
        squares = jax.tree.map(
            lambda leaf: jnp.sum(jnp.square(leaf.astype(jnp.float32)), axis=0),
            gradients(params, group),
        )
        return jax.tree.map(jnp.add, total, squares), None

    return jax.lax.scan(add, total, groups)[0]


def _zeros(params: Tree) -> Tree:
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf, jnp.float32), params)


def _weighted_change(fisher: Array, weights: Array, anchor: Array) -> Array:
    change = weights.astype(jnp.float32) - anchor.astype(jnp.float32)
    return jnp.sum(fisher * jnp.square(change))


def _named(tree: Tree) -> dict[str, Any]:
    """Return the leaves of a tree by path."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
