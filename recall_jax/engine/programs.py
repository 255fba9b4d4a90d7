"""Compile the programs of the streamed forward: one unit of some models, on one batch, over a mesh.

A program is compiled once for each kind of unit (embed, block, head) and padded length. Besides the
hidden states it returns what a method observes: their means over the tokens, or the Gram matrices
of the inputs of the unit's linear layers.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD, layer_unit
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import state_tensors, unit_params
from recall_jax.models.decoder import Context
from recall_jax.models.forward import block, block_with_inputs, context, embed, head
from recall_jax.representations.pooling import masked_mean

# The parameters of each model on a device, in the order of `state_tensors`. On several devices an
# array holds the parameter of several models, concatenated along its first axis.
UnitParameters = list[list[jax.Array]]

# Gram matrices of the inputs of linear layers by path, float32 (in, in).
Grams = dict[str, jax.Array]

MODELS, ROWS, EVERYWHERE = PartitionSpec("models"), PartitionSpec("rows"), PartitionSpec()
MODELS_AND_ROWS = PartitionSpec("models", "rows")


@partial(jax.jit, static_argnames="arch")
def prepare_context(arch: Architecture, attention_mask: jax.Array) -> Context:
    """Return what all blocks need to know about a batch."""
    return context(arch, attention_mask)


def in_dtype(tensors: UnitParameters, dtype: DTypeLike) -> UnitParameters:
    """Return a block's parameters in the compute dtype, cast once for all batches."""
    # jit would copy arrays of this dtype: on CPU, pages of a file that are used where mapped.
    cast = any(array.dtype != dtype for array in jax.tree.leaves(tensors))
    return _cast(tensors, dtype) if cast else tensors


@partial(jax.jit, static_argnames="dtype")
def _cast(tensors: UnitParameters, dtype: DTypeLike) -> UnitParameters:
    return jax.tree.map(lambda array: array.astype(dtype), tensors)


def _params(arch: Architecture, unit: str, tensors: list[jax.Array]) -> Any:
    return unit_params(arch, unit, dict(zip(state_tensors(arch, unit), tensors, strict=True)))


@partial(jax.jit, static_argnames=("arch", "mesh", "dtype"))
def run_embed(
    arch: Architecture,
    mesh: Mesh,
    dtype: DTypeLike,
    tensors: UnitParameters,
    input_ids: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run the embedding of G models: (hidden states (G, B, T, E), pooled means (G, B, E))."""

    def local(tensors: UnitParameters, input_ids: jax.Array, ctx: Context) -> Any:
        # No vmap: it would stack full tables only to look up a few of their rows.
        each = [embed(arch, _params(arch, EMBED, model), input_ids, dtype) for model in tensors]
        return _pooled(jnp.stack(each), ctx)

    return _over(mesh, local, (MODELS, ROWS, ROWS))(tensors, input_ids, ctx)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="hidden")
def run_block(
    arch: Architecture,
    mesh: Mesh,
    tensors: UnitParameters,
    window: jax.Array,
    hidden: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    """Run a block of G models on their hidden states, which are donated; returns as `run_embed`."""

    def local(tensors: UnitParameters, window: jax.Array, hidden: jax.Array, ctx: Context) -> Any:
        def run(model: list[jax.Array], hidden: jax.Array) -> jax.Array:
            # With the names of the first layer, one program serves all layers.
            return block(arch, _params(arch, layer_unit(0), model), hidden, ctx, window)

        return _pooled(_each(run, tensors, hidden), ctx)

    specs = (MODELS, EVERYWHERE, MODELS_AND_ROWS, ROWS)
    return _over(mesh, local, specs)(tensors, window, hidden, ctx)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="hidden")
def run_head(
    arch: Architecture, mesh: Mesh, tensors: UnitParameters, hidden: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    """Run the final norm of G models; arguments and results as in `run_block`."""

    def local(tensors: UnitParameters, hidden: jax.Array, ctx: Context) -> Any:
        def run(model: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return head(arch, _params(arch, HEAD, model), hidden)

        return _pooled(_each(run, tensors, hidden), ctx)

    return _over(mesh, local, (MODELS, MODELS_AND_ROWS, ROWS))(tensors, hidden, ctx)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="grams")
def run_block_with_grams(
    arch: Architecture,
    mesh: Mesh,
    tensors: UnitParameters,
    window: jax.Array,
    hidden: jax.Array,
    ctx: Context,
    grams: Grams,
) -> tuple[jax.Array, Grams]:
    """Run a block of one model: the states after it, and `grams` plus those of this batch."""

    def local(tensors: UnitParameters, window: jax.Array, hidden: jax.Array, ctx: Context) -> Any:
        params = _params(arch, layer_unit(0), tensors[0])
        after, inputs = block_with_inputs(arch, params, hidden[0], ctx, window)
        return after[None], {path: _gram(read, ctx) for path, read in inputs.items()}

    specs = (MODELS, EVERYWHERE, MODELS_AND_ROWS, ROWS)
    run = _over(mesh, local, specs, (MODELS_AND_ROWS, EVERYWHERE))
    after, added = run(tensors, window, hidden, ctx)
    return after, jax.tree.map(jnp.add, grams, added)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="grams")
def run_head_with_grams(
    arch: Architecture,
    mesh: Mesh,
    tensors: UnitParameters,
    hidden: jax.Array,
    ctx: Context,
    grams: Grams,
) -> tuple[jax.Array, Grams]:
    """Run the head as `run_block_with_grams` does, with its output as the projection's input."""

    def local(tensors: UnitParameters, hidden: jax.Array, ctx: Context) -> Any:
        normed = head(arch, _params(arch, HEAD, tensors[0]), hidden[0])
        return normed[None], {path: _gram(normed, ctx) for path in grams}

    specs = (MODELS, MODELS_AND_ROWS, ROWS)
    after, added = _over(mesh, local, specs, (MODELS_AND_ROWS, EVERYWHERE))(tensors, hidden, ctx)
    return after, jax.tree.map(jnp.add, grams, added)


def _gram(read: jax.Array, ctx: Context) -> jax.Array:
    """Return X^T X of a linear layer's input (B, T, in), over the tokens on all devices."""
    tokens = jnp.where(ctx.is_token[..., None], read, jnp.zeros((), read.dtype))
    gram = jnp.einsum(
        "bti,btj->ij",
        tokens,
        tokens,
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
    )
    return jax.lax.psum(gram, ("models", "rows"))


def _over(
    mesh: Mesh,
    local: Callable[..., Any],
    in_specs: tuple[PartitionSpec, ...],
    out_specs: tuple[PartitionSpec, ...] = (MODELS_AND_ROWS, MODELS_AND_ROWS),
) -> Any:
    """Map `local` over the mesh, each device with its share of the models and rows."""
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _each(
    run: Callable[[list[jax.Array], jax.Array], jax.Array],
    tensors: UnitParameters,
    hidden: jax.Array,
) -> jax.Array:
    """Return `run` of each model's parameters and hidden states, stacked (G, B, T, E)."""
    if len(tensors) == 1:  # XLA multiplies a batch of one matrix slower than one matrix
        return run(tensors[0], hidden[0])[None]
    stacked = [jnp.stack(models) for models in zip(*tensors, strict=True)]
    return jax.vmap(run)(stacked, hidden)


def _pooled(hidden: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
    return hidden, jax.vmap(lambda model: masked_mean(model, ctx.is_token))(hidden)
