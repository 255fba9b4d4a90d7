"""The streamed forward: one unit of the models at a time, its parameters from disk and gone again.

Only hidden states stay between units. A program is compiled once for each kind of unit (embed,
block, head) and each padded length, whatever the depth and the number of models: it runs a group of
models over a mesh of devices, some models side by side and the rows of each split.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from recall_jax.engine.device import not_finite, to_device
from recall_jax.engine.lane import prefetch
from recall_jax.engine.plan import NamedModel
from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import state_tensors, unit_params
from recall_jax.models.decoder import Context
from recall_jax.models.forward import attention_windows, block, context, embed, head
from recall_jax.representations.batches import Batches, make_batches
from recall_jax.representations.pooling import masked_mean
from recall_jax.units import EMBED, HEAD, layer_unit

# Hidden states of a group of G models, one (G, B, T, E) array in the compute dtype for each batch.
HiddenStates = tuple[jax.Array, ...]

# Of the models on one device, each with its parameters in the order of `state_tensors`. On several
# devices an array holds, along its first axis, one model's parameter after the other's.
Parameters = list[list[jax.Array]]


class Placed(NamedTuple):
    """A unit of K models: its tensors as on disk, and on the devices for each group of models."""

    stored: Sequence[Mapping[str, np.ndarray]]
    groups: Iterable[Parameters]  # to be taken once


_MODELS, _ROWS = PartitionSpec("models"), PartitionSpec("rows")
_MODELS_AND_ROWS = PartitionSpec("models", "rows")


@dataclass(frozen=True)
class StreamedForward:
    """The forward of `num_models` models of one architecture on given batches."""

    arch: Architecture
    batches: Batches
    input_ids: tuple[jax.Array, ...]
    contexts: tuple[Context, ...]
    dtype: DTypeLike
    mesh: Mesh  # (models side by side, devices that split the rows)
    models_each: int  # on one device, in one program

    @classmethod
    def of(
        cls,
        arch: Architecture,
        token_ids: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dtype: DTypeLike,
        num_models: int = 1,
        models_at_once: int = 1,
    ) -> "StreamedForward":
        """Prepare what all models share: tokens, positions and masks of each batch.

        A device runs at most `models_at_once` models in one program, and no group of models is
        smaller than another. A batch has no more rows than there are, rounded up to a multiple of
        the devices that split them.
        """
        devices = jax.local_devices()
        batch_size = min(batch_size, len(token_ids))
        side_by_side = models_side_by_side(num_models, len(devices), batch_size)
        splits = min(len(devices) // side_by_side, batch_size)
        rounds = num_models // side_by_side
        mesh = jax.make_mesh(
            (side_by_side, splits),
            ("models", "rows"),
            axis_types=(AxisType.Auto, AxisType.Auto),
            devices=devices[: side_by_side * splits],
        )
        rows = NamedSharding(mesh, _ROWS)
        batches = make_batches(token_ids, -(-batch_size // splits) * splits)
        masks = [jax.device_put(batch.attention_mask, rows) for batch in batches.batches]
        return cls(
            arch,
            batches,
            tuple(jax.device_put(batch.input_ids, rows) for batch in batches.batches),
            tuple(_context(arch, mask) for mask in masks),
            dtype,
            mesh,
            max(n for n in range(1, models_at_once + 1) if rounds % n == 0),
        )

    def place(self, unit: str, tensors: Sequence[Mapping[str, np.ndarray]]) -> Placed:
        """Bring what the forward needs of a unit of all K models, given as on disk, to the devices.

        Can be done for the next unit, in another thread, while one is computed. On CPU a group is
        placed only when its turn comes: what is not aligned in its file is copied, and one group's
        copies at a time are enough.
        """
        names = state_tensors(self.arch, unit)
        own = [{name: model[name] for name in names} for model in tensors]
        group = self.mesh.shape["models"] * self.models_each
        starts = range(0, len(own), group)
        groups = (self._spread(own[start : start + group]) for start in starts)
        return Placed(own, groups if jax.default_backend() == "cpu" else list(groups))

    def advance(
        self, unit: str, placed: Placed, states: Sequence[HiddenStates], models: Sequence[str]
    ) -> tuple[list[HiddenStates], np.ndarray]:
        """Run `unit` of all K models: (states after it, their pooled means (K, n, E) float32).

        `states` are those after the unit before, () for `embed`; they are consumed. Raises
        InputError, with the name of one of the `models`, where its means are not finite.
        """
        runs = map(partial(self._run, unit), placed.groups, states or repeat(self.input_ids))
        after, means = zip(*runs, strict=True)
        pooled_means = np.concatenate(means)[:, self.batches.order]
        for model, own, mean in zip(models, placed.stored, pooled_means, strict=True):
            if not np.isfinite(mean).all():
                raise InputError(
                    not_finite(model, own)
                    or f"{model}: hidden states overflow in unit {unit}, "
                    "though its weights are finite"
                )
        return list(after), pooled_means

    def _run(
        self, unit: str, parameters: Parameters, given: Sequence[jax.Array]
    ) -> tuple[HiddenStates, np.ndarray]:
        """Run `unit` of a group on every batch: (states after it, their pooled means (G, n, E))."""
        run = self._program(unit, parameters)
        results = [run(rows, ctx) for rows, ctx in zip(given, self.contexts, strict=True)]
        hidden, pooled = zip(*results, strict=True)
        return hidden, np.concatenate([np.asarray(mean) for mean in pooled], axis=1)

    def pooled_units(self, model: NamedModel, last: str) -> Iterator[tuple[str, np.ndarray]]:
        """Each unit of the only model up to `last` and its pooled means (n, E); reads one ahead."""

        def read(unit: str) -> Placed:
            return self.place(
                unit, [{name: model.read(name) for name in state_tensors(self.arch, unit)}]
            )

        states: Sequence[HiddenStates] = ()
        units = self.arch.units[: self.arch.units.index(last) + 1]
        with closing(prefetch(read, units)) as coming:
            for unit, placed in zip(units, coming, strict=True):
                states, pooled = self.advance(unit, placed, states, [model.name])
                yield unit, pooled[0]

    def _spread(self, models: Sequence[Mapping[str, np.ndarray]]) -> Parameters:
        """The parameters of a group, each on the devices of its model and on no others."""
        sharding = NamedSharding(self.mesh, _MODELS)

        def spread(arrays: Sequence[np.ndarray]) -> jax.Array:
            """One array of the same parameter of models side by side."""
            shards = [
                to_device(array, device)
                for array, devices in zip(arrays, self.mesh.devices, strict=True)
                for device in devices
            ]
            length, *rest = arrays[0].shape
            return jax.make_array_from_single_device_arrays(
                (length * len(arrays), *rest), sharding, shards
            )

        # The models of one device follow one another in the group, as their hidden states do.
        return [
            [spread([model[name] for model in models[first :: self.models_each]]) for name in model]
            for first, model in enumerate(models[: self.models_each])
        ]

    def _program(
        self, unit: str, tensors: Parameters
    ) -> Callable[[jax.Array, Context], tuple[jax.Array, jax.Array]]:
        """From a batch's input to (hidden states (G, B, T, E), pooled means (G, B, E))."""
        if unit == EMBED:
            return partial(_embed, self.arch, self.mesh, self.dtype, tensors)
        if unit == HEAD:
            return partial(_head, self.arch, self.mesh, tensors)
        window = attention_windows(self.arch)[self.arch.units.index(unit) - 1]
        return partial(_block, self.arch, self.mesh, _in_dtype(tensors, self.dtype), window)


def models_side_by_side(num_models: int, num_devices: int, num_rows: int) -> int:
    """How many models run at a time, each on its own share of the devices.

    The layout in which a device passes the fewest rows through a unit, of those that give each
    device as many models; of equals the one where a device receives the fewest models' parameters.
    """

    def rows_passed(side_by_side: int) -> int:
        splits = num_devices // side_by_side
        return num_models // side_by_side * -(-num_rows // splits)

    layouts = [m for m in range(1, num_devices + 1) if num_models % m == 0]
    return min(reversed(layouts), key=rows_passed)


@partial(jax.jit, static_argnames="arch")
def _context(arch: Architecture, attention_mask: jax.Array) -> Context:
    return context(arch, attention_mask)


def _in_dtype(tensors: Parameters, dtype: DTypeLike) -> Parameters:
    """A block's parameters in the compute dtype, once for all batches."""
    # jit would copy what it passes on: on CPU a file's own pages, used where they are mapped.
    cast = any(array.dtype != dtype for array in jax.tree.leaves(tensors))
    return _cast(tensors, dtype) if cast else tensors


@partial(jax.jit, static_argnames="dtype")
def _cast(tensors: Parameters, dtype: DTypeLike) -> Parameters:
    return jax.tree.map(lambda array: array.astype(dtype), tensors)


def _params(arch: Architecture, unit: str, tensors: list[jax.Array]) -> Any:
    return unit_params(arch, unit, dict(zip(state_tensors(arch, unit), tensors, strict=True)))


@partial(jax.jit, static_argnames=("arch", "mesh", "dtype"))
def _embed(
    arch: Architecture,
    mesh: Mesh,
    dtype: DTypeLike,
    tensors: Parameters,
    input_ids: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    def local(tensors: Parameters, input_ids: jax.Array, ctx: Context) -> Any:
        # No vmap: to stack tables only to look up a few of their rows is a waste.
        each = [embed(arch, _params(arch, EMBED, model), input_ids, dtype) for model in tensors]
        return _pooled(jnp.stack(each), ctx)

    return _over(mesh, local, (_MODELS, _ROWS, _ROWS))(tensors, input_ids, ctx)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="hidden")
def _block(
    arch: Architecture,
    mesh: Mesh,
    tensors: Parameters,
    window: jax.Array,
    hidden: jax.Array,
    ctx: Context,
) -> tuple[jax.Array, jax.Array]:
    def local(tensors: Parameters, window: jax.Array, hidden: jax.Array, ctx: Context) -> Any:
        def run(model: list[jax.Array], hidden: jax.Array) -> jax.Array:
            # Every layer has the names of the first but for its number: one program serves all.
            return block(arch, _params(arch, layer_unit(0), model), hidden, ctx, window)

        return _pooled(_each(run, tensors, hidden), ctx)

    specs = (_MODELS, PartitionSpec(), _MODELS_AND_ROWS, _ROWS)
    return _over(mesh, local, specs)(tensors, window, hidden, ctx)


@partial(jax.jit, static_argnames=("arch", "mesh"), donate_argnames="hidden")
def _head(
    arch: Architecture, mesh: Mesh, tensors: Parameters, hidden: jax.Array, ctx: Context
) -> tuple[jax.Array, jax.Array]:
    def local(tensors: Parameters, hidden: jax.Array, ctx: Context) -> Any:
        def run(model: list[jax.Array], hidden: jax.Array) -> jax.Array:
            return head(arch, _params(arch, HEAD, model), hidden)

        return _pooled(_each(run, tensors, hidden), ctx)

    return _over(mesh, local, (_MODELS, _MODELS_AND_ROWS, _ROWS))(tensors, hidden, ctx)


def _over(mesh: Mesh, local: Callable[..., Any], in_specs: tuple[PartitionSpec, ...]) -> Any:
    """`local` on every device, with its share of the models and of the rows."""
    out_specs = (_MODELS_AND_ROWS, _MODELS_AND_ROWS)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=out_specs)


def _each(
    run: Callable[[list[jax.Array], jax.Array], jax.Array], tensors: Parameters, hidden: jax.Array
) -> jax.Array:
    """`run` with each model's parameters on its own hidden states (G, B, T, E)."""
    if len(tensors) == 1:  # XLA multiplies matrices in a batch of one slower than without a batch
        return run(tensors[0], hidden[0])[None]
    stacked = [jnp.stack(models) for models in zip(*tensors, strict=True)]
    return jax.vmap(run)(stacked, hidden)


def _pooled(hidden: jax.Array, ctx: Context) -> tuple[jax.Array, jax.Array]:
    return hidden, jax.vmap(lambda model: masked_mean(model, ctx.is_token))(hidden)
