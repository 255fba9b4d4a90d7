"""Compile the programs of the sharded forward: a unit of G models, on one batch, over a mesh.

Each is one program for all devices, in which arrays are constrained to their shardings and XLA
inserts the communication. Models side by side are on the axis `model` of the mesh; the rows of a
batch are split over the other axes but `tensor`, along which each device computes with part of the
parameters. A program is compiled once for each kind of unit and padded length.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD, layer_unit
from recall_jax.engine.device import common_dtype
from recall_jax.engine.pod.rows import in_x64, unpadded
from recall_jax.engine.programs import Grams
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.models.axes import tensor_axes
from recall_jax.models.convert import state_tensors, tensor_shapes, unit_params
from recall_jax.models.decoder import Context
from recall_jax.models.forward import block, block_with_inputs, context, embed, head
from recall_jax.parallel.mesh import BATCH_ROWS, MODEL, partition_spec, without_fsdp
from recall_jax.parallel.turns import in_turn
from recall_jax.representations.pooling import masked_mean

EVERYWHERE = PartitionSpec()

# A unit's parameters of G models in the order of `state_tensors`, (G, out, in), for computing.
ShardedParameters = list[jax.Array]


@dataclass(frozen=True)
class Spread:
    """Hold how G models and the rows of their batches are spread over a mesh.

    A single model uses the axis `model` for rows too.
    """

    mesh: Mesh
    models: int  # G, side by side

    @classmethod
    def over(cls, mesh: Mesh, num_models: int) -> "Spread":
        """Spread the models over `mesh`, as many side by side as its axis `model` has.

        Raises InputError if the number of models does not fit the mesh.
        """
        side_by_side = mesh.shape[MODEL]
        if num_models > 1 and num_models % side_by_side:
            raise InputError(
                f"mesh model={side_by_side} runs {side_by_side} models side by side, which does "
                f"not divide {num_models} models: give model= a divisor of {num_models}"
            )
        return cls(mesh, 1 if num_models == 1 else side_by_side)

    @property
    def rows(self) -> tuple[str, ...]:
        """Return the axes over which rows are split."""
        return BATCH_ROWS if self.models > 1 else (MODEL, *BATCH_ROWS)

    @property
    def num_splits(self) -> int:
        """Return into how many parts the rows of a batch are split."""
        return math.prod(self.mesh.shape[axis] for axis in self.rows)

    def batch(self) -> NamedSharding:
        """Return the sharding of arrays (B, …)."""
        return NamedSharding(self.mesh, PartitionSpec(self.rows))

    def hidden(self) -> NamedSharding:
        """Return the sharding of hidden states (G, B, T, E)."""
        return NamedSharding(self.mesh, PartitionSpec(self._models(), self.rows))

    def parameter(self, spec: PartitionSpec) -> NamedSharding:
        """Return the sharding of a parameter of G models."""
        return NamedSharding(self.mesh, PartitionSpec(self._models(), *spec))

    def everywhere(self) -> NamedSharding:
        """Return the sharding of arrays that are replicated on every device."""
        return NamedSharding(self.mesh, EVERYWHERE)

    def _models(self) -> str | None:
        return MODEL if self.models > 1 else None


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread"))
def prepare_context(arch: Architecture, spread: Spread, attention_mask: jax.Array) -> Context:
    """Return what all blocks need to know about a batch."""
    return _constrained(context(arch, attention_mask), spread.batch())


def shard_parameters(
    arch: Architecture,
    unit: str,
    spread: Spread,
    dtype: DTypeLike | None,
    models: Sequence[Mapping[str, jax.Array]],
) -> ShardedParameters:
    """Return the parameters of G models in their shardings for the forward, given in rows layout.

    They are cast to `dtype` if it is not None. Each parameter has a separate program, so that only
    one is in transfer at a time.
    """
    shapes = tensor_shapes(arch)
    sharded = []
    for name in state_tensors(arch, unit):
        arrays = [model[name] for model in models]
        spec = partition_spec(tensor_axes(arch.family, name), shapes[name], spread.mesh)
        with in_x64(*(array.dtype for array in arrays)):
            sharded.append(_shard_parameter(arrays, shapes[name], spread.parameter(spec), dtype))
    return sharded


@in_turn
@partial(jax.jit, static_argnames=("shape", "sharding", "dtype"))
def _shard_parameter(
    models: Sequence[jax.Array],
    shape: tuple[int, ...],
    sharding: NamedSharding,
    dtype: DTypeLike | None,
) -> jax.Array:
    """Return (G, …) in `dtype`, or in the stored dtype, but float32 for float64."""
    common = common_dtype(models)
    wanted = dtype or (jnp.float32 if common == jnp.float64 else common)
    # Sent in the narrower dtype.
    sent = min(wanted, common, key=lambda each: jnp.dtype(each).itemsize)
    full = jnp.stack([unpadded(array, shape).astype(sent) for array in models])
    return _constrained(full, sharding).astype(wanted)


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread", "dtype"))
def run_embed(
    arch: Architecture,
    spread: Spread,
    dtype: DTypeLike,
    parameters: ShardedParameters,
    input_ids: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run the embedding of G models: (hidden states (G, B, T, E), pooled means (G, B, E))."""

    def run(params: Any) -> jax.Array:
        return embed(arch, params, input_ids, dtype)

    return _pooled(_each(run, spread, _params(arch, EMBED, spread, parameters)), ctx, spread)


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread"), donate_argnames="hidden")
def run_block(
    arch: Architecture,
    spread: Spread,
    parameters: ShardedParameters,
    window: jax.Array,
    hidden: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run a block of G models on their hidden states, which are donated; returns as `run_embed`."""

    def run(params: Any, hidden: jax.Array) -> jax.Array:
        return block(arch, params, hidden, ctx, window)

    params = _params(arch, layer_unit(0), spread, parameters)
    return _pooled(_each(run, spread, params, hidden), ctx, spread)


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread"), donate_argnames="hidden")
def run_head(
    arch: Architecture,
    spread: Spread,
    parameters: ShardedParameters,
    hidden: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run the final norm of G models; arguments and results as in `run_block`."""
    params = _params(arch, HEAD, spread, parameters)
    return _pooled(_each(partial(head, arch), spread, params, hidden), ctx, spread)


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread"), donate_argnames="grams")
def run_block_with_grams(
    arch: Architecture,
    spread: Spread,
    parameters: ShardedParameters,
    window: jax.Array,
    hidden: jax.Array,
    ctx: Context,
    grams: Grams,
) -> tuple[jax.Array, Grams]:
    """Run a block of one model: the states after it, and `grams` plus those of this batch."""
    (params,) = _models(_params(arch, layer_unit(0), spread, parameters))
    after, inputs = block_with_inputs(arch, params, hidden[0], ctx, window)
    added = {path: grams[path] + _gram(read, ctx, spread) for path, read in inputs.items()}
    return _constrained(after[None], spread.hidden()), added


@in_turn
@partial(jax.jit, static_argnames=("arch", "spread"), donate_argnames="grams")
def run_head_with_grams(
    arch: Architecture,
    spread: Spread,
    parameters: ShardedParameters,
    hidden: jax.Array,
    ctx: Context,
    grams: Grams,
) -> tuple[jax.Array, Grams]:
    """Run the head as `run_block_with_grams` does, with its output as the projection's input."""
    (params,) = _models(_params(arch, HEAD, spread, parameters))
    normed = head(arch, params, hidden[0])
    added = {path: gram + _gram(normed, ctx, spread) for path, gram in grams.items()}
    return _constrained(normed[None], spread.hidden()), added


@in_turn
@partial(jax.jit, static_argnames="spread")
def gather_pooled(spread: Spread, pooled: Sequence[jax.Array]) -> jax.Array:
    """Return the pooled means of all batches, (G, n, E), replicated on every device in one step."""
    return _constrained(jnp.concatenate(pooled, axis=1), spread.everywhere())


@in_turn
@partial(jax.jit, static_argnames="mesh")
def is_finite(mesh: Mesh, array: jax.Array) -> jax.Array:
    """Return whether all elements are finite in float32, on every device."""
    finite = jnp.all(jnp.isfinite(array.astype(jnp.float32)))
    return jax.lax.with_sharding_constraint(finite, NamedSharding(mesh, EVERYWHERE))


def _params(arch: Architecture, unit: str, spread: Spread, parameters: ShardedParameters) -> Any:
    """Return the Flax parameters of G models, gathered along `fsdp`, over which rows are split."""
    names = state_tensors(arch, unit)
    shapes = tensor_shapes(arch)
    gathered = {}
    for name, array in zip(names, parameters, strict=True):
        spec = partition_spec(tensor_axes(arch.family, name), shapes[name], spread.mesh)
        gathered[name] = _constrained(array, spread.parameter(without_fsdp(spec)))
    return jax.vmap(partial(unit_params, arch, unit))(gathered)


def _models(params: Any) -> list[Any]:
    """Return the parameters of each of G models."""
    leaves, tree = jax.tree.flatten(params)
    return [jax.tree.unflatten(tree, model) for model in zip(*leaves, strict=True)]


def _each(run: Callable[..., jax.Array], spread: Spread, params: Any, *states: Any) -> jax.Array:
    """Return `run` of each model's parameters and states: (G, B, T, E)."""
    if spread.models == 1:  # XLA multiplies a batch of one matrix slower than one matrix
        (only,) = _models(params)
        return run(only, *(state[0] for state in states))[None]
    return jax.vmap(run, spmd_axis_name=MODEL)(params, *states)


def _pooled(hidden: jax.Array, ctx: Context, spread: Spread) -> tuple[jax.Array, jax.Array]:
    """Return hidden states and their pooled means, both sharded as hidden states are."""
    hidden = _constrained(hidden, spread.hidden())
    pooled = jax.vmap(lambda model: masked_mean(model, ctx.is_token))(hidden)
    return hidden, _constrained(pooled, spread.hidden())


def _gram(read: jax.Array, ctx: Context, spread: Spread) -> jax.Array:
    """Return X^T X of a linear layer's input (B, T, in), over the tokens of all rows."""
    tokens = jnp.where(ctx.is_token[..., None], read, jnp.zeros((), read.dtype))
    gram = jnp.einsum(
        "bti,btj->ij",
        tokens,
        tokens,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return _constrained(gram, spread.everywhere())


def _constrained(tree: Any, sharding: NamedSharding) -> Any:
    return jax.lax.with_sharding_constraint(tree, sharding)
