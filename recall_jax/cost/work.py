"""What a merge has to do, whatever does it: bytes by unit, and the forward that it runs."""

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
    """The forward over the typical samples, and over the rows that they are chosen from.

    Every row is taken to have `tokens` tokens; a device has at most `batch_size` of them at a time.
    `choosing` counts the units that the choice runs, of
    one model over `pool` rows; 0 where the samples are given. `itemsize` is that of the compute
    dtype, `stored` that of a parameter on disk.
    """

    arch: Architecture
    typical: int
    pool: int
    tokens: int
    batch_size: int
    choosing: int
    itemsize: int
    stored: int

    @property
    def length(self) -> int:
        """Positions of a row, padded."""
        return padded_length(self.tokens)

    def rows_each(self, rows: int, splits: int) -> int:
        """Rows of a batch on each of `splits` devices, some of them empty where there are few."""
        return min(self.batch_size, -(-rows // splits))

    def batches(self, rows: int, splits: int) -> int:
        """Batches of `rows` rows over `splits` devices."""
        return -(-rows // (splits * self.rows_each(rows, splits)))

    def positions(self, rows: int, splits: int) -> int:
        """Positions that `rows` rows take on each of `splits` devices."""
        return self.batches(rows, splits) * self.rows_each(rows, splits) * self.length

    def state_bytes(self, unit: str) -> int:
        """Parameters of a unit that hidden states depend on, as computed with."""
        # the embedding is looked up as it is stored
        each = self.stored if unit in (EMBED, HEAD) else self.itemsize
        return each * state_parameters(self.arch, unit)


@dataclass(frozen=True)
class MergeWork:
    """A merge of `inputs` models (a base among them): bytes of each unit, read and written.

    `forward` is None where no model runs; else it runs `models` of the inputs. `whole` are the
    elements of the largest tensor that the method's kernel looks at whole.
    """

    read: Sequence[int]
    written: Sequence[int]
    inputs: int
    models: int
    forward: ForwardWork | None
    whole: int = 0

    @property
    def bytes_read(self) -> int:
        """Of all models, once."""
        return sum(self.read)

    @property
    def bytes_written(self) -> int:
        """Of the merged model."""
        return sum(self.written)

    @property
    def chosen_by(self) -> int:
        """Bytes that one pass of the choice of typical samples reads of one model."""
        return 0 if self.forward is None else sum(self.read[: self.forward.choosing]) // self.inputs


def llama(
    *,
    vocab_size: int,
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    num_key_value_heads: int,
) -> Architecture:
    """A Llama of some shape, its output projection untied."""
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
    """RECALL of models of a shape, stored, computed with and written in `itemsize` bytes."""
    written = [itemsize * parameters(arch, unit) for unit in arch.units]
    choosing = len(arch.units) - 1 if pool > typical else 0
    forward = ForwardWork(arch, typical, pool, tokens, batch_size, choosing, itemsize, itemsize)
    return MergeWork([models * unit for unit in written], written, models, models, forward)


def parameters(arch: Architecture, unit: str) -> int:
    """How many parameters a unit has."""
    return sum(math.prod(shape) for shape in _shapes(arch, _like(unit), whole=True))


def state_parameters(arch: Architecture, unit: str) -> int:
    """How many of them hidden states depend on: all but those of the output projection."""
    return sum(math.prod(shape) for shape in _shapes(arch, _like(unit), whole=False))


def flops_per_position(arch: Architecture, unit: str, length: int) -> int:
    """Floating-point operations of a unit for one position of a row of `length`.

    Two for each element of a matrix, and of each query and value with every position: what a causal
    mask hides is computed too. Norms and the like are left out.
    """
    if unit in (EMBED, HEAD):  # looked up; normed
        return 0
    shapes = _shapes(arch, _like(unit), whole=False)
    products = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
    return 2 * products + 4 * length * arch.num_attention_heads * arch.head_dim


def _like(unit: str) -> str:
    """A unit of the same shapes: all blocks are alike."""
    return unit if unit in (EMBED, HEAD) else layer_unit(0)


@functools.lru_cache(maxsize=128)
def _shapes(arch: Architecture, unit: str, *, whole: bool) -> list[tuple[int, ...]]:
    shapes = tensor_shapes(arch)
    return [shapes[name] for name in (unit_tensors if whole else state_tensors)(arch, unit)]
