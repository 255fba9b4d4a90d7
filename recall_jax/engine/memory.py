"""What a streamed forward takes of each device's memory, known before anything is read."""

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
    """Into how many parts a forward is cut over a mesh, of which each device has one.

    `models` run side by side; `rows` are those of a batch; a parameter is in `stored` parts as it
    is read, in `held` as it waits for its batch, in `used` where it is computed with. Memory is
    counted for `sharing` devices, which have it together where they are those of a CPU.
    """

    models: int
    rows: int
    read_shards: int
    placed_shards: int
    compute_shards: int
    sharing_devices: int


_SOLVING = 6  # matrices as large as a Gram that a merge makes of it


def mesh_that_fits(
    arch: Architecture, *, itemsize: int, devices: int, memory: int
) -> dict[str, int]:
    """The mesh of so many devices that hold what is computed with in half their `memory`.

    Raises InputError as `mesh.choose_mesh`.
    """
    return choose_mesh(
        devices,
        parameters=largest_unit_bytes(arch, itemsize),
        gathered=block_bytes(arch, itemsize),
        memory=memory // 2,
        rows=devices,  # some may be empty: reading counts, not computing
    )


def block_bytes(arch: Architecture, itemsize: int) -> int:
    """The parameters of one block, in a dtype of `itemsize` bytes."""
    shapes = tensor_shapes(arch)
    return itemsize * sum(math.prod(shapes[name]) for name in state_tensors(arch, layer_unit(0)))


def largest_unit_bytes(arch: Architecture, itemsize: int) -> int:
    """The parameters of the largest unit that the forward uses, in a dtype of `itemsize` bytes."""
    shapes = tensor_shapes(arch)
    return itemsize * max(
        sum(math.prod(shapes[name]) for name in state_tensors(arch, unit))
        for unit in (EMBED, layer_unit(0), HEAD)
    )


def largest_tensor_bytes(arch: Architecture, itemsize: int) -> int:
    """The largest parameter that the forward uses, in a dtype of `itemsize` bytes."""
    return itemsize * max(
        math.prod(tensor_shapes(arch)[name])
        for unit in (EMBED, layer_unit(0), HEAD)
        for name in state_tensors(arch, unit)
    )


def gram_bytes(arch: Architecture, num_models: int) -> int:
    """The Grams of what the linear layers of a unit read, and what is made of one in merging.

    Those of all models, and of the one that runs; float32.
    """
    shapes = tensor_shapes(arch)
    unit = {path: shapes[name][1] for name, path in linear_inputs(arch, layer_unit(0)).items()}
    grams = (num_models + 1) * sum(width**2 for width in unit.values())
    return _FLOAT32 * (grams + _SOLVING * max(unit.values()) ** 2)


def loss_bytes(arch: Architecture, batch_rows: int) -> int:
    """The output projection as it is used, and the logits of a block of tokens; float32."""
    logits = batch_rows * TOKENS_AT_ONCE * arch.vocab_size
    return _FLOAT32 * (2 * arch.vocab_size * arch.hidden_size + 3 * logits)


def hidden_bytes(arch: Architecture, batches: Batches, itemsize: int) -> int:
    """The hidden states of one model on all batches, in a compute dtype of `itemsize` bytes."""
    return batches.padded_tokens * arch.hidden_size * itemsize


def copied_bytes(arch: Architecture, models_at_once: int, itemsize: int, *, on_cpu: bool) -> int:
    """The parameters of a block that its program has once more, with those of its arguments.

    Of several models they are stacked. On CPU those of a narrower compute dtype are widened to
    float32, as matrices are multiplied in that.
    """
    if on_cpu and itemsize < _FLOAT32:
        return models_at_once * block_bytes(arch, _FLOAT32)
    return models_at_once * block_bytes(arch, itemsize) if models_at_once > 1 else 0


def working_bytes(arch: Architecture, batch_rows: int, tokens: int, models_at_once: int) -> int:
    """What a block computes with for one batch, beside its parameters and hidden states.

    A bound from above on what XLA allocates for `batch_rows` rows of `tokens` positions and
    `models_at_once` models on one device: within a third in float32, as which a narrower compute
    dtype is counted.
    """
    positions = batch_rows * tokens
    hidden = positions * arch.hidden_size
    query = positions * arch.num_attention_heads * arch.head_dim
    key = positions * arch.num_key_value_heads * arch.head_dim
    scores = batch_rows * arch.num_attention_heads * min(tokens, QUERY_BLOCK) * tokens
    attention = hidden + query + 2 * key + max(2 * scores, query)
    if tokens > QUERY_BLOCK:  # queries and what they mixed, cut in blocks and laid together again
        attention += 4 * query + positions * tokens // _FLOAT32
    mlp = hidden + 3 * positions * arch.intermediate_size
    return models_at_once * (max(attention, mlp) + positions) * _FLOAT32
