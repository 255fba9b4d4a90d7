"""Run models forward one unit at a time, with their parameters sharded over a mesh.

`ShardedForward` does what `engine.forward.StreamedForward` does on one host, for models of which no
process holds a full unit. One thread starts its programs, in the same order in every process.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.background import prefetch
from recall_jax.engine.device import not_finite_message, states_overflow_message
from recall_jax.engine.forward import HiddenStates, Placed
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.pod.programs import (
    ShardedParameters,
    Spread,
    gather_pooled,
    is_finite,
    prepare_context,
    run_block,
    run_block_with_grams,
    run_embed,
    run_head,
    run_head_with_grams,
    shard_parameters,
)
from recall_jax.engine.pod.rows import in_x64, put_rows_layout, read_rows_layout
from recall_jax.engine.programs import Grams
from recall_jax.errors import InputError
from recall_jax.inputs.batches import Batches, make_batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import linear_inputs, state_tensors, tensor_shapes
from recall_jax.models.decoder import Context
from recall_jax.models.forward import attention_windows


@dataclass(frozen=True)
class ShardedForward:
    """Run models of one architecture on given batches over a mesh, one unit at a time."""

    arch: Architecture
    batches: Batches
    input_ids: tuple[jax.Array, ...]
    contexts: tuple[Context, ...]
    dtype: DTypeLike
    spread: Spread

    @property
    def models_per_device(self) -> int:
        """Return 1: a program runs one model on the same devices."""
        return 1

    @classmethod
    def prepare(
        cls,
        arch: Architecture,
        token_ids: Sequence[Sequence[int]],
        *,
        mesh: Mesh,
        batch_size: int,
        dtype: DTypeLike,
        num_models: int = 1,
    ) -> "ShardedForward":
        """Prepare what all models share: tokens, positions and masks of each batch.

        A batch has `batch_size` rows, rounded up to a multiple of the devices that split them;
        missing rows are empty. A single model uses all devices; of several models, as many run at a
        time as the mesh has side by side. Raises InputError if the number of models does not fit
        the mesh.
        """
        spread = Spread.over(mesh, num_models)
        splits = spread.num_splits
        batches = make_batches(token_ids, -(-batch_size // splits) * splits)

        def put(array: np.ndarray) -> jax.Array:
            return jax.make_array_from_callback(array.shape, spread.batch(), array.__getitem__)

        masks = [put(batch.attention_mask) for batch in batches.batches]
        return cls(
            arch,
            batches,
            tuple(put(batch.input_ids) for batch in batches.batches),
            tuple(prepare_context(arch, spread, mask) for mask in masks),
            dtype,
            spread,
        )

    def place(self, unit: str, tensors: Sequence[Mapping[str, Any]]) -> Placed:
        """Return the input of the forward for a unit of all K models: their tensors in rows layout.

        Tensors that a process holds in full are sharded here. Starts no program.
        """
        placed = [
            {name: self._in_rows_layout(model[name]) for name in state_tensors(self.arch, unit)}
            for model in tensors
        ]
        starts = range(0, len(placed), self.spread.models)
        return Placed(placed, [placed[start : start + self.spread.models] for start in starts])

    def advance(
        self, unit: str, placed: Placed, states: Sequence[HiddenStates], models: Sequence[str]
    ) -> tuple[list[HiddenStates], np.ndarray]:
        """Run `unit` of all K models: (states after it, their pooled means (K, n, E) float32).

        `states` are those after the unit before, () for `embed`; they are donated. Every process
        gets the same means. Raises InputError naming one of the `models` if its means are not
        finite.
        """
        runs = map(partial(self._run, unit), placed.groups, states or repeat(self.input_ids))
        after, means = zip(*runs, strict=True)
        pooled_means = np.concatenate(means)[:, self.batches.order]
        for model, stored, mean in zip(models, placed.stored, pooled_means, strict=True):
            if not np.isfinite(mean).all():
                raise InputError(self._why_not_finite(model, unit, stored))
        return list(after), pooled_means

    def advance_with_grams(
        self, unit: str, placed: Placed, states: Sequence[HiddenStates], model: str
    ) -> tuple[list[HiddenStates], Grams]:
        """Run `unit` of the only model: (states after it, Grams of its linear layers' inputs).

        A Gram matrix is X^T X over the tokens of all rows, float32 (in, in), on every device.
        `states` are not donated. Raises InputError naming the `model` if a Gram matrix is not
        finite.
        """
        shapes = tensor_shapes(self.arch)
        widths = {path: shapes[name][1] for name, path in linear_inputs(self.arch, unit).items()}
        if not widths:  # in the embedding, and in a head whose projection is tied to it
            return self.advance(unit, placed, states, [model])[0], {}
        grams: Grams = {
            path: jnp.zeros((width, width), jnp.float32, device=self.spread.everywhere())
            for path, width in widths.items()
        }
        (group,) = placed.groups
        run = self._program_with_grams(unit, self._shard(unit, group))
        after = []
        for hidden, ctx in zip(states[0], self.contexts, strict=True):
            hidden, grams = run(hidden, ctx, grams)
            after.append(hidden)
        if not all(np.isfinite(np.trace(np.asarray(gram))) for gram in grams.values()):
            raise InputError(self._why_not_finite(model, unit, placed.stored[0]))
        return [tuple(after)], grams

    def pooled_units(self, model: NamedModel, last: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each unit of the only model up to `last`, and its pooled means (n, E).

        The next unit is read meanwhile.
        """

        def read(unit: str) -> Placed:
            names = state_tensors(self.arch, unit)
            mesh = self.spread.mesh
            return self.place(unit, [{name: read_rows_layout(model, name, mesh) for name in names}])

        states: Sequence[HiddenStates] = ()
        units = self.arch.units[: self.arch.units.index(last) + 1]
        with closing(prefetch(read, units)) as coming:
            for unit, placed in zip(units, coming, strict=True):
                states, pooled = self.advance(unit, placed, states, [model.name])
                yield unit, pooled[0]

    def _run(
        self, unit: str, group: Sequence[Mapping[str, jax.Array]], given: Sequence[jax.Array]
    ) -> tuple[HiddenStates, np.ndarray]:
        """Run `unit` of a group on every batch: (states after it, their pooled means (G, n, E))."""
        run = self._program(unit, self._shard(unit, group))
        results = [run(rows, ctx) for rows, ctx in zip(given, self.contexts, strict=True)]
        hidden, pooled = zip(*results, strict=True)
        return hidden, np.asarray(gather_pooled(self.spread, pooled))

    def _shard(self, unit: str, group: Sequence[Mapping[str, jax.Array]]) -> ShardedParameters:
        """Return a group's parameters for all batches, those of a block in the compute dtype."""
        dtype = None if unit in (EMBED, HEAD) else self.dtype
        return shard_parameters(self.arch, unit, self.spread, dtype, group)

    def _program(
        self, unit: str, parameters: ShardedParameters
    ) -> Callable[[jax.Array, Context], tuple[jax.Array, jax.Array]]:
        """Return a function from a batch's input to (states (G, B, T, E), means (G, B, E))."""
        if unit == EMBED:
            return partial(run_embed, self.arch, self.spread, self.dtype, parameters)
        if unit == HEAD:
            return partial(run_head, self.arch, self.spread, parameters)
        return partial(run_block, self.arch, self.spread, parameters, self._window(unit))

    def _program_with_grams(
        self, unit: str, parameters: ShardedParameters
    ) -> Callable[[jax.Array, Context, Grams], tuple[jax.Array, Grams]]:
        """Return a function from a batch's input and Grams to (states (1, B, T, E), Grams)."""
        if unit == HEAD:
            return partial(run_head_with_grams, self.arch, self.spread, parameters)
        return partial(run_block_with_grams, self.arch, self.spread, parameters, self._window(unit))

    def _window(self, unit: str) -> np.int32:
        return np.int32(attention_windows(self.arch)[self.arch.units.index(unit) - 1])

    def _in_rows_layout(self, array: Any) -> jax.Array:
        mesh = self.spread.mesh
        return array if isinstance(array, jax.Array) else put_rows_layout(array, mesh)

    def _why_not_finite(self, model: str, unit: str, tensors: Mapping[str, jax.Array]) -> str:
        """Return the error message for means that are not finite; all processes must call it."""
        for name, array in tensors.items():
            with in_x64(array.dtype):
                finite = bool(is_finite(self.spread.mesh, array))
            if not finite:
                return not_finite_message(model, name, array.dtype)
        return states_overflow_message(model, unit)
