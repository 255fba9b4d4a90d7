"""A pod's layout made ready: what it offers a method, and the mesh that it is cut over."""

import math
from collections.abc import Collection, Sequence

import jax
import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import MIB, held_bytes, widest
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.memory import mesh_that_fits
from recall_jax.engine.needs import Needs, Observation, Offer
from recall_jax.engine.plan import MergePlan, full_tensor_names
from recall_jax.engine.pod.layout import Sharded
from recall_jax.errors import UnfinishedError
from recall_jax.parallel.mesh import DATA, make_mesh, parse_mesh

ON_MESH = Offer(observes=(Observation.POOLED, Observation.LINEAR_INPUTS))
_PROGRAMS = 96 * MIB  # what compiling the merge takes: larger programs than on one device
_FLOAT32 = 4
_WHOLE = 6  # arrays as large as a whole tensor, in float32, for each model, where a kernel sees it
_AHEAD = 2  # units: one in use, one being read


def sharded_layout(
    needs: Needs,
    models: Sequence[Checkpoint],
    plan: MergePlan,
    asked: str,
    budget: int,
    *,
    forward_dtype: str | None = None,
    ignore_config: Collection[str] = (),
) -> tuple[Sharded, int]:
    """The layout over the mesh that is `asked` for, "auto" to choose one; bytes that merging takes.

    `models` are all that is read, the newest last; `budget` bytes are of a device, on CPU of this
    process. Raises InputError where there is no such mesh; UnfinishedError where merging does not
    fit.
    """
    if asked != "auto":
        sizes = parse_mesh(asked)
    elif needs.observes:
        arch = common_architecture(models, ignore_config)
        itemsize = np.dtype(compute_dtype(forward_dtype, models[-1])).itemsize
        memory = budget // _shares()
        sizes = mesh_that_fits(arch, itemsize=itemsize, devices=jax.device_count(), memory=memory)
    else:
        sizes = {DATA: jax.device_count()}
    mesh = make_mesh(sizes)
    overhead = _merging_bytes(needs, models, plan, mesh.size)
    if (needed := held_bytes() + overhead) > budget:
        raise UnfinishedError(
            f"this merge needs {needed / MIB:,.0f} MiB of memory over {mesh.size} devices and may "
            f"take {budget / MIB:,.0f} MiB: allow more (--memory), or take more devices"
        )
    return Sharded(mesh), overhead


def _merging_bytes(
    needs: Needs, models: Sequence[Checkpoint], plan: MergePlan, num_devices: int
) -> int:
    """What reading and merging take of a device, on CPU of all devices of this process."""
    units = plan.units.values()
    read = sum(
        max(sum(model.specs[name].nbytes for name in names) for names in units) for model in models
    )
    largest = max(spec.nbytes for spec in plan.specs.values())
    shapes = [plan.specs[name].shape for name in full_tensor_names(needs.full_tensors, plan.specs)]
    made = [_made_whole(shape, needs, num_devices) for shape in shapes]
    own = -(-(_AHEAD * read + 2 * largest) // num_devices)
    pieces = 4 * CHUNK * widest(plan.specs)
    device = own + pieces + len(models) * max(made, default=0)
    return _PROGRAMS + _shares() * device + _unwritten_bytes(plan)


def _unwritten_bytes(plan: MergePlan) -> int:
    """The unit that waits for the disk of its owner, in the memory of the host."""
    if jax.default_backend() != "cpu" or jax.process_count() == 1:
        return 0
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _made_whole(shape: Sequence[int], needs: Needs, num_devices: int) -> int:
    """Bytes that a kernel makes on a device for each model of a tensor that it sees whole.

    A replicated kernel does all of it on every device. Other kernels have an even part of what they
    make, where there is one, but rows that the devices do not divide are brought together first.
    """
    elements, arrays = math.prod(shape), max(_WHOLE, needs.scratch + 1)
    if needs.replicated or not shape or elements % num_devices:
        return arrays * _FLOAT32 * elements
    together = elements if shape[0] % num_devices else 0
    return _FLOAT32 * (arrays * elements // num_devices + together)


def _shares() -> int:
    """Devices that share the memory of a budget: on CPU all of this process's."""
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1
