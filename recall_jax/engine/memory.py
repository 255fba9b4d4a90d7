"""Compute the device memory that a streamed forward takes, before anything is read."""

import math
from dataclasses import dataclass

from recall_jax.checkpoint.units import EMBED, HEAD, layer_unit
from recall_jax.inputs.batches import Batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import linear_inputs, state_tensors, tensor_shapes
from recall_jax.models.decoder import QUERY_BLOCK
from recall_jax.models.loss import TOKENS_AT_ONCE
from recall_jax.parallel.mesh import choose_mesh

_FLOAT32 = 4


@dataclass(frozen=True)
class Split:
    """Hold into how many parts a forward is split over a mesh; a device has one part of each.

    `models` run side by side, and `rows` is for the rows of a batch. A parameter is in
    `read_shards` parts as read, `placed_shards` while it waits for its batch, and `compute_shards`
    when computed with. Memory is counted for `sharing_devices`, more than one if they share the
    memory of a CPU.
    """

    models: int
    rows: int
    read_shards: int
    placed_shards: int
    compute_shards: int
    sharing_devices: int


_SOLVER_MATRICES = 6  # of the size of a Gram matrix, made when merging with one


def mesh_that_fits(
    arch: Architecture, *, itemsize: int, devices: int, memory: int
) -> dict[str, int]:
    """Return a mesh of `devices` whose parameters in use fit in half the `memory` of a device.

    `memory` is in bytes. Raises InputError as `choose_mesh` does.
    """
    return choose_mesh(
        devices,
        parameters=largest_unit_bytes(arch, itemsize),
        gathered=block_bytes(arch, itemsize),
        memory=memory // 2,
        rows=devices,  # some rows may be empty: the mesh is chosen for reading
    )


def block_bytes(arch: Architecture, itemsize: int) -> int:
    """Return the bytes of one block's parameters, in a dtype of `itemsize` bytes."""
    shapes = tensor_shapes(arch)
    return itemsize * sum(math.prod(shapes[name]) for name in state_tensors(arch, layer_unit(0)))


def largest_unit_bytes(arch: Architecture, itemsize: int) -> int:
    """Return the bytes of the parameters of the largest unit that the forward uses."""
    shapes = tensor_shapes(arch)
    return itemsize * max(
        sum(math.prod(shapes[name]) for name in state_tensors(arch, unit))
        for unit in (EMBED, layer_unit(0), HEAD)
    )


def largest_tensor_bytes(arch: Architecture, itemsize: int) -> int:
    """Return the bytes of the largest parameter that the forward uses."""
    return itemsize * max(
        math.prod(tensor_shapes(arch)[name])
        for unit in (EMBED, layer_unit(0), HEAD)
        for name in state_tensors(arch, unit)
    )


def gram_bytes(arch: Architecture, num_models: int) -> int:
    """Return the bytes of the float32 Gram matrices of a unit, and of merging with one of them.

    These are the matrices of all models, and once more of the model that runs.
    """
    shapes = tensor_shapes(arch)
    unit = {path: shapes[name][1] for name, path in linear_inputs(arch, layer_unit(0)).items()}
    grams = (num_models + 1) * sum(width**2 for width in unit.values())
    return _FLOAT32 * (grams + _SOLVER_MATRICES * max(unit.values()) ** 2)


def loss_bytes(arch: Architecture, batch_rows: int) -> int:
    """Return the bytes of the output projection and the logits of a block of tokens, in float32."""
    logits = batch_rows * TOKENS_AT_ONCE * arch.vocab_size
    return _FLOAT32 * (2 * arch.vocab_size * arch.hidden_size + 3 * logits)


def hidden_bytes(arch: Architecture, batches: Batches, itemsize: int) -> int:
    """Return the bytes of one model's hidden states on all batches, in an `itemsize`-byte dtype."""
    return batches.padded_tokens * arch.hidden_size * itemsize


def copied_bytes(arch: Architecture, models_at_once: int, itemsize: int, *, on_cpu: bool) -> int:
    """Return the bytes of a block's parameters that its program copies, besides its arguments.

    The parameters of several models are stacked. On CPU those of a narrower compute dtype are
    widened to float32, in which matrices are multiplied.
    """
    if on_cpu and itemsize < _FLOAT32:
        return models_at_once * block_bytes(arch, _FLOAT32)
    return models_at_once * block_bytes(arch, itemsize) if models_at_once > 1 else 0


def working_bytes(arch: Architecture, batch_rows: int, tokens: int, models_at_once: int) -> int:
    """Return the bytes of a block's activations on one batch, besides parameters and hidden states.

    This is an upper bound on what XLA allocates for `batch_rows` rows of `tokens` positions and
    `models_at_once` models on one device: in float32 within a third. Narrower compute dtypes count
    as float32.
    """
    positions = batch_rows * tokens
    hidden = positions * arch.hidden_size
    query = positions * arch.num_attention_heads * arch.head_dim
    key = positions * arch.num_key_value_heads * arch.head_dim
    scores = batch_rows * arch.num_attention_heads * min(tokens, QUERY_BLOCK) * tokens
    attention = hidden + query + 2 * key + max(2 * scores, query)
    if tokens > QUERY_BLOCK:  # queries and outputs, once more in blocks
        attention += 4 * query + positions * tokens // _FLOAT32
    mlp = hidden + 3 * positions * arch.intermediate_size
    return models_at_once * (max(attention, mlp) + positions) * _FLOAT32
