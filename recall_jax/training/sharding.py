"""Where arrays live in training: a mesh of devices with the axes `data` and `fsdp`.

Rows of a batch are spread over both axes. Parameters and whatever has their shape (moments, Fisher
information) are cut along `fsdp` (Zhao et al. 2023, arXiv:2304.11277; Rajbhandari et al. 2020) and
repeated along `data`; XLA puts in the gathers and reductions. One device is a mesh like any other.
"""

from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from recall_jax.errors import InputError
from recall_jax.models.architecture import LAYERS

DATA, FSDP = "data", "fsdp"


def parse_mesh(text: str) -> dict[str, int]:
    """Sizes of the axes in a text such as `data=2,fsdp=4`, 1 where left out; or InputError."""
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = (word.strip() for word in part.partition("="))
        if name not in (DATA, FSDP) or name in sizes or not size.isdecimal() or int(size) < 1:
            raise InputError(f"mesh {text!r}: write it such as data=2,fsdp=4")
        sizes[name] = int(size)
    return {DATA: 1, FSDP: 1} | sizes


def make_mesh(sizes: dict[str, int]) -> Mesh:
    """A mesh of the first devices, or InputError where there are too few."""
    shape = sizes[DATA], sizes[FSDP]
    devices = jax.devices()
    needed = shape[0] * shape[1]
    if needed > len(devices):
        raise InputError(
            f"mesh data={shape[0]},fsdp={shape[1]} needs {needed} devices; there are {len(devices)}"
        )
    return jax.make_mesh(
        shape, (DATA, FSDP), axis_types=(AxisType.Auto, AxisType.Auto), devices=devices[:needed]
    )


def parameter_shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf of a tree of parameters, or of anything laid out like them.

    The longest axis that `fsdp` divides is cut; the axis of stacked layers is not, as the scan over
    layers takes slices of it.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        stacked = any(getattr(key, "key", None) == LAYERS for key in path)
        axes = [
            axis
            for axis in range(int(stacked), leaf.ndim)
            if leaf.shape[axis] % mesh.shape[FSDP] == 0
        ]
        spec: list[str | None] = [None] * leaf.ndim
        if axes and mesh.shape[FSDP] > 1:
            spec[max(axes, key=lambda axis: leaf.shape[axis])] = FSDP
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree_util.tree_map_with_path(sharding, tree)


def put_parameters(tree: Any, mesh: Mesh) -> Any:
    """The tree on the devices of the mesh, in buffers of its own."""
    # no alias, as a donated buffer is written
    return jax.device_put(tree, parameter_shardings(tree, mesh), may_alias=False)


def put_rows(batch: Any, mesh: Mesh, axis: int = 0) -> Any:
    """A batch on the devices, its rows, which are on `axis`, spread over all of them."""
    rows = PartitionSpec(*[None] * axis, (DATA, FSDP))
    return jax.device_put(batch, NamedSharding(mesh, rows))
