"""The streamed forward: one unit of one model at a time, its parameters from disk and gone again.

Only hidden states stay between units. A program is compiled once for each kind of unit (embed,
block, head) and each padded length, whatever the depth and the number of models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from recall_jax.engine.device import not_finite, to_device
from recall_jax.engine.plan import NamedModel
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import state_tensors, unit_params
from recall_jax.models.decoder import Context
from recall_jax.models.forward import attention_windows, block, context, embed, head
from recall_jax.representations.batches import Batches, make_batches
from recall_jax.representations.pooling import masked_mean
from recall_jax.units import EMBED, HEAD, layer_unit

# Hidden states of one model, one (B, T, E) array in the compute dtype for each batch.
HiddenStates = tuple[jax.Array, ...]


@dataclass(frozen=True)
class StreamedForward:
    """The forward of one architecture on given batches; serves any number of models."""

    arch: Architecture
    batches: Batches
    input_ids: tuple[jax.Array, ...]
    contexts: tuple[Context, ...]
    dtype: DTypeLike
    replicated: NamedSharding  # of the parameters; the batches' rows are split over the devices

    @classmethod
    def of(
        cls,
        arch: Architecture,
        token_ids: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dtype: DTypeLike,
    ) -> "StreamedForward":
        """Prepare what all models share: tokens, positions and masks of each batch.

        A batch has no more rows than there are; all local devices share it, so that its size is
        rounded up to a multiple of their number.
        """
        mesh = jax.make_mesh((jax.local_device_count(),), ("data",), axis_types=(AxisType.Auto,))
        rows = NamedSharding(mesh, PartitionSpec("data"))
        rows_each = -(-min(batch_size, len(token_ids)) // mesh.size)
        batches = make_batches(token_ids, rows_each * mesh.size)
        masks = [jax.device_put(batch.attention_mask, rows) for batch in batches.batches]
        return cls(
            arch,
            batches,
            tuple(jax.device_put(batch.input_ids, rows) for batch in batches.batches),
            tuple(_context(arch, mask) for mask in masks),
            dtype,
            NamedSharding(mesh, PartitionSpec()),
        )

    def advance(
        self, unit: str, tensors: Mapping[str, jax.Array], states: HiddenStates, model: str
    ) -> tuple[HiddenStates, np.ndarray]:
        """Run `unit`: (hidden states after it, their pooled means (n, E) float32).

        `tensors` has the unit's parameters as on disk. `states` are those after the unit before, ()
        for `embed`; they are consumed. Raises InputError, with the name of the `model`, where the
        means are not finite.
        """
        names = state_tensors(self.arch, unit)
        run = self._unit_program(unit, [tensors[name] for name in names])
        inputs = states or self.input_ids
        results = [run(given, ctx) for given, ctx in zip(inputs, self.contexts, strict=True)]
        after, pooled = zip(*results, strict=True)
        means = np.concatenate([np.asarray(mean) for mean in pooled])[self.batches.order]
        if not np.isfinite(means).all():
            raise InputError(
                not_finite(model, {name: tensors[name] for name in names})
                or f"{model}: hidden states overflow in unit {unit}, though its weights are finite"
            )
        return tuple(after), means

    def pooled_units(self, model: NamedModel) -> Iterator[tuple[str, np.ndarray]]:
        """Each unit of `model` in turn with its pooled means (n, E); reads a unit when asked."""
        states: HiddenStates = ()
        for unit in self.arch.units:
            names = state_tensors(self.arch, unit)
            tensors = {name: to_device(model.read(name)) for name in names}
            states, pooled = self.advance(unit, tensors, states, model.name)
            yield unit, pooled

    def _unit_program(
        self, unit: str, tensors: list[jax.Array]
    ) -> Callable[[Any, Context], tuple[jax.Array, jax.Array]]:
        """The function from a batch's input to (hidden states, pooled means) of this unit."""
        tensors = jax.device_put(tensors, self.replicated)
        if unit == EMBED:
            return partial(_embed, self.arch, self.dtype, tensors)
        if unit == HEAD:
            return partial(_head, self.arch, tensors)
        window = attention_windows(self.arch)[self.arch.units.index(unit) - 1]
        return partial(_block, self.arch, _prepare(self.arch, self.dtype, tensors), window)


@partial(jax.jit, static_argnames="arch")
def _context(arch: Architecture, attention_mask: jax.Array) -> Context:
    return context(arch, attention_mask)


def _params(arch: Architecture, unit: str, tensors: list[jax.Array]) -> Any:
    return unit_params(arch, unit, dict(zip(state_tensors(arch, unit), tensors, strict=True)))


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _prepare(arch: Architecture, dtype: DTypeLike, tensors: list[jax.Array]) -> Any:
    """A block's Flax parameters, transposed and cast to the compute dtype once for all batches."""
    # Every layer has the names of the first but for its number, so one program serves all.
    params = _params(arch, layer_unit(0), tensors)
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


@partial(jax.jit, static_argnames=("arch", "dtype"))
def _embed(
    arch: Architecture,
    dtype: DTypeLike,
    tensors: list[jax.Array],
    input_ids: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    hidden = embed(arch, _params(arch, EMBED, tensors), input_ids, dtype)
    return hidden, masked_mean(hidden, ctx.is_token)


@partial(jax.jit, static_argnames="arch", donate_argnames="hidden")
def _block(
    arch: Architecture, params: Any, window: jax.Array, hidden: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    hidden = block(arch, params, hidden, ctx, window)
    return hidden, masked_mean(hidden, ctx.is_token)


@partial(jax.jit, static_argnames="arch", donate_argnames="hidden")
def _head(
    arch: Architecture, tensors: list[jax.Array], hidden: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    hidden = head(arch, _params(arch, HEAD, tensors), hidden)
    return hidden, masked_mean(hidden, ctx.is_token)
