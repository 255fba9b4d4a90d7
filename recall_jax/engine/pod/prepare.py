"""Choose the mesh of a merge, and declare what its layout offers to methods."""

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
_COMPILATION_BYTES = 96 * MIB  # for the merge: its programs are larger than on one device
_FLOAT32 = 4
_LEAST_ARRAYS = 6  # float32 copies of a full tensor, for each model, that a kernel makes
_AHEAD = 2  # units: one in use, one being read


def sharded_layout(
    needs: Needs,
    models: Sequence[Checkpoint],
    plan: MergePlan,
    requested: str,
    budget: int,
    *,
    forward_dtype: str | None = None,
    ignore_config: Collection[str] = (),
) -> tuple[Sharded, int]:
    """Return the layout over a mesh, as `requested` or chosen if "auto", and its overhead.

    The overhead is the bytes that merging takes. `models` are all models that are read, the newest
    last; `budget` is in bytes of a device, on CPU of this process. Raises InputError if there is no
    such mesh; UnfinishedError if merging does not fit.
    """
    if requested != "auto":
        sizes = parse_mesh(requested)
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
    """Return the bytes that reading and merging take on a device, on CPU on all of this process."""
    units = plan.units.values()
    read = sum(
        max(sum(model.specs[name].nbytes for name in names) for names in units) for model in models
    )
    largest = max(spec.nbytes for spec in plan.specs.values())
    shapes = [plan.specs[name].shape for name in full_tensor_names(needs.full_tensors, plan.specs)]
    made = [_kernel_bytes(shape, needs, num_devices) for shape in shapes]
    sharded = -(-(_AHEAD * read + 2 * largest) // num_devices)
    pieces = 4 * CHUNK * widest(plan.specs)
    device = sharded + pieces + len(models) * max(made, default=0)
    return _COMPILATION_BYTES + _shares() * device + _unwritten_bytes(plan)


def _unwritten_bytes(plan: MergePlan) -> int:
    """Return the bytes of host memory for the unit that waits to be written to disk."""
    if jax.default_backend() != "cpu" or jax.process_count() == 1:
        return 0
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _kernel_bytes(shape: Sequence[int], needs: Needs, num_devices: int) -> int:
    """Return the bytes that a kernel makes on a device, for each model, of a full tensor.

    A replicated kernel computes all of it on every device. Other kernels get an even share if there
    is one, but rows that the devices do not divide are gathered first.
    """
    elements, arrays = math.prod(shape), max(_LEAST_ARRAYS, needs.scratch + 1)
    if needs.replicated or not shape or elements % num_devices:
        return arrays * _FLOAT32 * elements
    together = elements if shape[0] % num_devices else 0
    return _FLOAT32 * (arrays * elements // num_devices + together)


def _shares() -> int:
    """Return how many devices share the memory of a budget: on CPU, all of this process."""
    return jax.local_device_count() if jax.default_backend() == "cpu" else 1
