"""Describe the work of a merge, independently of a machine: bytes by unit, and its forward."""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from recall_jax.checkpoint.units import EMBED, HEAD, layer_unit
from recall_jax.inputs.batches import padded_length
from recall_jax.models.architecture import Architecture, Rope
from recall_jax.models.convert import state_tensors, tensor_shapes, unit_tensors


@dataclass(frozen=True)
class ForwardWork:
    """Describe the forward over `typical` samples, and over the rows that they are selected from.

    Every row is assumed to have `tokens` tokens, and a device runs at most `batch_size` rows at a
    time. The selection runs the first `select_units` units of one model over `pool` rows; it is 0
    if the samples are given. `itemsize` is the bytes of an element of the compute dtype, `stored`
    those of a parameter on disk.
    """

    arch: Architecture
    typical: int
    pool: int
    tokens: int
    batch_size: int
    select_units: int
    itemsize: int
    stored: int

    @property
    def length(self) -> int:
        """Return the number of positions of a row, with padding."""
        return padded_length(self.tokens)

    def rows_each(self, rows: int, splits: int) -> int:
        """Return the rows of a batch on each of `splits` devices, padding included."""
        return min(self.batch_size, -(-rows // splits))

    def batches(self, rows: int, splits: int) -> int:
        """Return the number of batches of `rows` rows over `splits` devices."""
        return -(-rows // (splits * self.rows_each(rows, splits)))

    def positions(self, rows: int, splits: int) -> int:
        """Return the number of positions of `rows` rows on each of `splits` devices."""
        return self.batches(rows, splits) * self.rows_each(rows, splits) * self.length

    def state_bytes(self, unit: str) -> int:
        """Return the bytes in memory of a unit's parameters that hidden states depend on."""
        # Only layers are cast to the compute dtype.
        itemsize = self.stored if unit in (EMBED, HEAD) else self.itemsize
        return itemsize * state_parameters(self.arch, unit)


@dataclass(frozen=True)
class MergeWork:
    """Describe a merge of `inputs` models, a base included, by the bytes of each unit.

    `read` counts the bytes of all inputs together. `forward` is None if no model runs; otherwise
    `models` of the inputs do. `largest_full_tensor` is the number of elements of the largest tensor
    that the method's kernel needs in full, 0 if there is none.
    """

    read: Sequence[int]
    written: Sequence[int]
    inputs: int
    models: int
    forward: ForwardWork | None
    largest_full_tensor: int = 0

    @property
    def bytes_read(self) -> int:
        """Return the bytes of all models, each read once."""
        return sum(self.read)

    @property
    def bytes_written(self) -> int:
        """Return the bytes of the merged model."""
        return sum(self.written)

    @property
    def select_bytes(self) -> int:
        """Return the bytes that one pass to select typical samples reads of one model."""
        if self.forward is None:
            return 0
        return sum(self.read[: self.forward.select_units]) // self.inputs


def llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
) -> Architecture:
    """Return the architecture of a Llama of this shape, with an untied output projection."""
    return Architecture(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=hidden_size // num_attention_heads,
        rms_norm_eps=1e-5,
        hidden_act="silu",
        qkv_bias=False,
        output_bias=False,
        mlp_bias=False,
        qk_norm=False,
        tie_word_embeddings=False,
        rope=Rope(),
        windows=(None,) * num_hidden_layers,
    )


def recall_work(
    arch: Architecture,
    models: int,
    *,
    itemsize: int = 2,
    typical: int = 20,
    pool: int = 1024,
    tokens: int = 512,
    batch_size: int = 8,
) -> MergeWork:
    """Return the work of RECALL on models of a shape, with `itemsize` bytes for every parameter.

    Parameters are stored, computed with and written in this size.
    """
    written = [itemsize * parameters(arch, unit) for unit in arch.units]
    select_units = len(arch.units) - 1 if pool > typical else 0
    forward = ForwardWork(arch, typical, pool, tokens, batch_size, select_units, itemsize, itemsize)
    return MergeWork([models * unit for unit in written], written, models, models, forward)


def parameters(arch: Architecture, unit: str) -> int:
    """Return the number of parameters of a unit."""
    shapes = _shapes(arch, _same_shape(unit), with_projection=True)
    return sum(math.prod(shape) for shape in shapes)


def state_parameters(arch: Architecture, unit: str) -> int:
    """Return the number of parameters of a unit, without those of the output projection.

    Hidden states depend on these alone.
    """
    shapes = _shapes(arch, _same_shape(unit), with_projection=False)
    return sum(math.prod(shape) for shape in shapes)


def flops_per_position(arch: Architecture, unit: str, length: int) -> int:
    """Return the floating-point operations of a unit for one position of a row of `length`.

    Counts two for each element of a matrix, and of each query and value with every position, since
    positions hidden by the causal mask are computed too. Norms and activations are not counted.
    """
    if unit in (EMBED, HEAD):  # a lookup, and a norm
        return 0
    shapes = _shapes(arch, _same_shape(unit), with_projection=False)
    products = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return 2 * products + 4 * length * arch.num_attention_heads * arch.head_dim


def _same_shape(unit: str) -> str:
    """Return a unit with the same shapes: all layers have those of the first."""
    return unit if unit in (EMBED, HEAD) else layer_unit(0)


@functools.lru_cache(maxsize=128)
def _shapes(arch: Architecture, unit: str, *, with_projection: bool) -> list[tuple[int, ...]]:
    shapes = tensor_shapes(arch)
    names = (unit_tensors if with_projection else state_tensors)(arch, unit)
    return [shapes[name] for name in names]
