"""A pod's layout made ready: whether it can run the method, and the mesh that it is cut over."""

import math
from collections.abc import Sequence

import jax
import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import MIB, held_bytes, widest
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.memory import mesh_that_fits
from recall_jax.engine.plan import Plan, taken_whole
from recall_jax.engine.pod.layout import Sharded
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.methods.methods import METHODS
from recall_jax.parallel.mesh import DATA, make_mesh, parse_mesh
from recall_jax.recipes.recipe import Recipe

_RULES = ("parameters", "recall", "opcm", "regmean", "regmean_plusplus")
_PROGRAMS = 96 * MIB  # what compiling the merge takes: larger programs than on one device
_FLOAT32 = 4
_WHOLE = 6  # arrays as large as a whole tensor, in float32, for each model, where a kernel sees it
_AHEAD = 2  # units: one in use, one being read


def sharded_layout(
    recipe: Recipe, models: Sequence[Checkpoint], plan: Plan, asked: str, budget: int
) -> tuple[Sharded, int]:
    """The layout over the mesh that is `asked` for, "auto" to choose one; bytes that merging takes.

    `models` are all that is read, the newest last; `budget` bytes are of a device, on CPU of this
    process. Raises InputError where the method, or its samples, are for one host alone, or there is
    no such mesh; UnfinishedError where merging does not fit.
    """
    _check_method(recipe)
    runs = METHODS[recipe.merge_method].rule == "recall" and recipe.weights is None
    if asked != "auto":
        sizes = parse_mesh(asked)
    elif runs:
        sizes = _chosen(recipe, models, budget // _shares())
    else:
        sizes = {DATA: jax.device_count()}
    mesh = make_mesh(sizes)
    beside = _merging_bytes(recipe, models, plan, mesh.size)
    if (needed := held_bytes() + beside) > budget:
        raise UnfinishedError(
            f"this merge needs {needed / MIB:,.0f} MiB of memory over {mesh.size} devices and may "
            f"take {budget / MIB:,.0f} MiB: allow more (--memory), or take more devices"
        )
    return Sharded(mesh), beside


def _check_method(recipe: Recipe) -> None:
    rule, alone = METHODS[recipe.merge_method].rule, "leave --mesh and --distributed out"
    if recipe.weights is None and rule not in _RULES:
        raise InputError(f"{recipe.merge_method} runs on one host: {alone}")
    if recipe.samples is not None and recipe.samples.source == "generated":
        raise InputError(f"samples.source generated runs a whole model on one host: {alone}")


def _chosen(recipe: Recipe, models: Sequence[Checkpoint], memory: int) -> dict[str, int]:
    """The mesh for the forward of the models, on devices with so much `memory`."""
    assert recipe.samples is not None
    arch = common_architecture(models, recipe.ignore_config)
    itemsize = np.dtype(compute_dtype(recipe.compute_dtype, models[-1])).itemsize
    return mesh_that_fits(arch, itemsize=itemsize, devices=jax.device_count(), memory=memory)


def _merging_bytes(
    recipe: Recipe, models: Sequence[Checkpoint], plan: Plan, num_devices: int
) -> int:
    """What reading and merging take of a device, on CPU of all devices of this process."""
    units = plan.units.values()
    read = sum(
        max(sum(model.specs[name].nbytes for name in names) for names in units) for model in models
    )
    largest = max(spec.nbytes for spec in plan.specs.values())
    method = METHODS[recipe.merge_method]
    whole = taken_whole(method.whole_tensors, plan.specs)
    solved = method.whole_tensors == "linear"
    made = [_made_whole(plan.specs[name].shape, solved, num_devices) for name in whole]
    own = -(-(_AHEAD * read + 2 * largest) // num_devices)
    pieces = 4 * CHUNK * widest(plan.specs)
    device = own + pieces + len(models) * max(made, default=0)
    return _PROGRAMS + _shares() * device + _unwritten_bytes(plan)


def _unwritten_bytes(plan: Plan) -> int:
    """The unit that waits for the disk of its owner, in the memory of the host."""
    if jax.default_backend() != "cpu" or jax.process_count() == 1:
        return 0
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _made_whole(shape: Sequence[int], solved: bool, num_devices: int) -> int:
    """Bytes that a kernel makes on a device for each model of a tensor that it sees whole.

    Matrices are solved by every device alike. Other kernels have an even part of what they make,
    where there is one, but rows that the devices do not divide are brought together first.
    """
    elements = math.prod(shape)
    if solved or not shape or elements % num_devices:
        return _WHOLE * _FLOAT32 * elements
    together = elements if shape[0] % num_devices else 0
    return _FLOAT32 * (_WHOLE * elements // num_devices + together)


def _shares() -> int:
    """Devices that share the memory of a budget: on CPU all of this process's."""
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1
