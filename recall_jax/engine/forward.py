"""Run models forward one unit at a time, reading its parameters from disk and releasing them.

Only hidden states are kept between units. A few programs serve every depth and number of models:
they run a group of models on a mesh of devices, on which models run side by side and the rows of
each model's batch are split.
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
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.typing import DTypeLike

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.background import prefetch
from recall_jax.engine.device import (
    common_dtype,
    find_not_finite,
    states_overflow_message,
    to_device,
)
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.programs import (
    EVERYWHERE,
    MODELS,
    ROWS,
    Grams,
    UnitParameters,
    in_dtype,
    prepare_context,
    run_block,
    run_block_with_grams,
    run_embed,
    run_head,
    run_head_with_grams,
)
from recall_jax.errors import InputError
from recall_jax.inputs.batches import Batches, make_batches
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import linear_inputs, state_tensors, tensor_shapes
from recall_jax.models.decoder import Context
from recall_jax.models.forward import attention_windows

# Hidden states of a group of G models, one (G, B, T, E) array in the compute dtype for each batch.
HiddenStates = tuple[jax.Array, ...]


class Placed(NamedTuple):
    """Hold a unit of K models: its tensors as read, and on the devices for each group of models."""

    stored: Sequence[Mapping[str, Any]]
    groups: Iterable[Any]  # can be iterated once


@dataclass(frozen=True)
class StreamedForward:
    """Run `num_models` models of one architecture on given batches, one unit at a time."""

    arch: Architecture
    batches: Batches
    input_ids: tuple[jax.Array, ...]
    contexts: tuple[Context, ...]
    dtype: DTypeLike
    mesh: Mesh  # (models side by side, devices that split the rows)
    models_per_device: int  # on one device, in one program

    @classmethod
    def prepare(
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

        `token_ids` holds the rows. A device runs at most `models_at_once` models in one program,
        and all groups of models have the same size. A batch has `batch_size` rows, rounded up to a
        multiple of the devices that split them; missing rows are empty.
        """
        devices = jax.local_devices()
        side_by_side = models_side_by_side(num_models, len(devices), batch_size)
        splits = min(len(devices) // side_by_side, batch_size)
        rounds = num_models // side_by_side
        mesh = jax.make_mesh(
            (side_by_side, splits),
            ("models", "rows"),
            axis_types=(AxisType.Auto, AxisType.Auto),
            devices=devices[: side_by_side * splits],
        )
        rows = NamedSharding(mesh, ROWS)
        batches = make_batches(token_ids, -(-batch_size // splits) * splits)
        masks = [jax.device_put(batch.attention_mask, rows) for batch in batches.batches]
        return cls(
            arch,
            batches,
            tuple(jax.device_put(batch.input_ids, rows) for batch in batches.batches),
            tuple(prepare_context(arch, mask) for mask in masks),
            dtype,
            mesh,
            max(n for n in range(1, models_at_once + 1) if rounds % n == 0),
        )

    def place(self, unit: str, tensors: Sequence[Mapping[str, np.ndarray]]) -> Placed:
        """Transfer the parameters of a unit of all K models, given as on disk, to the devices.

        A thread can call this for the next unit while one is computed. On CPU, a group is placed
        only when it runs: tensors that are not aligned in their files are copied, and copies of one
        group at a time are enough.
        """
        names = state_tensors(self.arch, unit)
        needed = [{name: model[name] for name in names} for model in tensors]
        group = self.mesh.shape["models"] * self.models_per_device
        starts = range(0, len(needed), group)
        groups = (self._spread(needed[start : start + group]) for start in starts)
        return Placed(needed, groups if jax.default_backend() == "cpu" else list(groups))

    def advance(
        self, unit: str, placed: Placed, states: Sequence[HiddenStates], models: Sequence[str]
    ) -> tuple[list[HiddenStates], np.ndarray]:
        """Run `unit` of all K models: (states after it, their pooled means (K, n, E) float32).

        `states` are those after the unit before, () for `embed`; they are donated. Raises
        InputError naming one of the `models` if its means are not finite.
        """
        runs = map(partial(self._run, unit), placed.groups, states or repeat(self.input_ids))
        after, means = zip(*runs, strict=True)
        pooled_means = np.concatenate(means)[:, self.batches.order]
        for model, stored, mean in zip(models, placed.stored, pooled_means, strict=True):
            if not np.isfinite(mean).all():
                raise InputError(_why_not_finite(model, unit, stored))
        return list(after), pooled_means

    def advance_with_grams(
        self, unit: str, placed: Placed, states: Sequence[HiddenStates], model: str
    ) -> tuple[list[HiddenStates], Grams]:
        """Run `unit` of the only model: (states after it, Grams of its linear layers' inputs).

        A Gram matrix is X^T X over the tokens of all rows, float32 (in, in). `states` are not
        donated. Raises InputError naming the `model` if a Gram matrix is not finite.
        """
        shapes = tensor_shapes(self.arch)
        widths = {path: shapes[name][1] for name, path in linear_inputs(self.arch, unit).items()}
        if not widths:  # in the embedding, and in a head whose projection is tied to it
            return self.advance(unit, placed, states, [model])[0], {}
        place = NamedSharding(self.mesh, EVERYWHERE)
        grams = {
            path: jnp.zeros((width, width), jnp.float32, device=place)
            for path, width in widths.items()
        }
        (parameters,) = placed.groups
        run = self._program_with_grams(unit, parameters)
        after = []
        for hidden, ctx in zip(states[0], self.contexts, strict=True):
            hidden, grams = run(hidden, ctx, grams)
            after.append(hidden)
        if not all(np.isfinite(np.trace(np.asarray(gram))) for gram in grams.values()):
            raise InputError(_why_not_finite(model, unit, placed.stored[0]))
        return [tuple(after)], grams

    def _run(
        self, unit: str, parameters: UnitParameters, given: Sequence[jax.Array]
    ) -> tuple[HiddenStates, np.ndarray]:
        """Run `unit` of a group on every batch: (states after it, their pooled means (G, n, E))."""
        run = self._program(unit, parameters)
        results = [run(rows, ctx) for rows, ctx in zip(given, self.contexts, strict=True)]
        hidden, pooled = zip(*results, strict=True)
        return hidden, np.concatenate([np.asarray(mean) for mean in pooled], axis=1)

    def pooled_units(self, model: NamedModel, last: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each unit of the only model up to `last`, and its pooled means (n, E).

        The next unit is read meanwhile.
        """

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

    def _spread(self, models: Sequence[Mapping[str, np.ndarray]]) -> UnitParameters:
        """Put the parameters of a group on the devices, each model's only where that model runs."""
        sharding = NamedSharding(self.mesh, MODELS)

        def spread(arrays: Sequence[np.ndarray]) -> jax.Array:
            """Return one array of a parameter of models that run side by side, cast alike."""
            dtype = common_dtype(arrays)
            shards = [
                to_device(array.astype(dtype, copy=False), device)
                for array, devices in zip(arrays, self.mesh.devices, strict=True)
                for device in devices
            ]
            length, *rest = arrays[0].shape
            return jax.make_array_from_single_device_arrays(
                (length * len(arrays), *rest), sharding, shards
            )

        # The models of one device are adjacent in the group, as their hidden states are.
        return [
            [
                spread([model[name] for model in models[first :: self.models_per_device]])
                for name in model
            ]
            for first, model in enumerate(models[: self.models_per_device])
        ]

    def _program(
        self, unit: str, tensors: UnitParameters
    ) -> Callable[[jax.Array, Context], tuple[jax.Array, jax.Array]]:
        """Return a function from a batch's input to (states (G, B, T, E), means (G, B, E))."""
        if unit == EMBED:
            return partial(run_embed, self.arch, self.mesh, self.dtype, tensors)
        if unit == HEAD:
            return partial(run_head, self.arch, self.mesh, tensors)
        window = attention_windows(self.arch)[self.arch.units.index(unit) - 1]
        return partial(run_block, self.arch, self.mesh, in_dtype(tensors, self.dtype), window)

    def _program_with_grams(
        self, unit: str, tensors: UnitParameters
    ) -> Callable[[jax.Array, Context, Grams], tuple[jax.Array, Grams]]:
        """Return a function from a batch's input and Grams to (states (1, B, T, E), Grams)."""
        if unit == HEAD:
            return partial(run_head_with_grams, self.arch, self.mesh, tensors)
        window = attention_windows(self.arch)[self.arch.units.index(unit) - 1]
        parameters = in_dtype(tensors, self.dtype)
        return partial(run_block_with_grams, self.arch, self.mesh, parameters, window)


def _why_not_finite(model: str, unit: str, tensors: Mapping[str, np.ndarray]) -> str:
    return find_not_finite(model, tensors) or states_overflow_message(model, unit)


def models_side_by_side(num_models: int, num_devices: int, num_rows: int) -> int:
    """Return how many models run at a time, each on an equal share of the devices.

    Of the layouts that give each device the same number of models, this is the one in which a
    device runs the fewest rows through a unit; among equals, the one in which it holds the fewest
    models.
    """

    def rows_passed(side_by_side: int) -> int:
        splits = num_devices // side_by_side
        return num_models // side_by_side * -(-num_rows // splits)

    layouts = [m for m in range(1, num_devices + 1) if num_models % m == 0]
    return min(reversed(layouts), key=rows_passed)
