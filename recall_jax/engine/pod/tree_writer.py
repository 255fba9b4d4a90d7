"""Write the Flax tree of a merged model in Orbax's format, from all processes at once.

The tensors arrive in pieces that every process gets. Each process keeps the part of a tensor that
its devices hold in the tree, so that none holds a full model. After the last tensor these parts
become one array for each leaf, and Orbax writes them.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import numpy as np
from flax.traverse_util import unflatten_dict
from jax.sharding import Mesh, NamedSharding

from recall_jax.checkpoint.orbax import save_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD, unit_of_tensor
from recall_jax.checkpoint.writer import Mark, check_piece
from recall_jax.engine.pod.rows import in_x64
from recall_jax.files.checksums import FileChecksum
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.convert import flax_path
from recall_jax.parallel.mesh import spread_over_all

_Leaf = tuple[str, ...]


class TreeWriter:
    """Take tensors as `ShardedWriter` does, and write a tree at the end; a context manager.

    The tree is that of `models.convert.to_flax`; each leaf is sharded over all devices of the mesh,
    along its longest dimension that they divide. Nothing is on disk before, so nothing can be
    resumed.
    """

    def __init__(
        self, folder: Path, arch: Architecture, specs: Mapping[str, TensorSpec], mesh: Mesh
    ) -> None:
        """Plan the leaves; tensors come in the order of `specs`, which are all those of `arch`."""
        self._folder, self._arch, self._specs = folder, arch, specs
        self._order = list(specs)
        self._finished = 0  # number of tensors
        self._buffer: np.ndarray | None = None  # holds the next tensor
        self._filled = 0  # number of elements in the buffer
        self._shardings = {
            leaf: spread_over_all(shape, mesh, stacked=0 if leaf[0] == LAYERS else None)
            for leaf, shape in self._leaf_shapes().items()
        }
        self._kept: dict[_Leaf, dict[jax.Device, np.ndarray]] = {}
        self._bytes_written = 0

    @property
    def checksums(self) -> Mapping[str, FileChecksum]:
        """Return no checksums, since Orbax writes the files."""
        return {}

    @property
    def bytes_written(self) -> int:
        """Return the bytes of all tensors received so far in process 0, and 0 in the others."""
        return 0 if jax.process_index() else self._bytes_written

    def write_piece(self, name: str, piece: np.ndarray) -> None:
        """Take the next elements, (n,) and contiguous, of the next tensor.

        Raises ValueError for a tensor out of order, or unlike its spec.
        """
        due = self._order[self._finished] if self._finished < len(self._order) else None
        if name != due:
            raise ValueError(f"tensor {name!r} written where {due!r} is due")
        spec = self._specs[name]
        check_piece(name, spec, piece, self._filled * spec.dtype.itemsize)
        if self._buffer is None:
            self._buffer = np.empty(spec.shape, spec.dtype)
        flat = self._buffer.reshape(-1)
        flat[self._filled : self._filled + piece.size] = piece
        self._filled += piece.size
        self._bytes_written += piece.nbytes
        if self._filled == flat.size:
            self._keep(name, self._buffer)
            self._finished, self._filled, self._buffer = self._finished + 1, 0, None

    def takes(self, name: str) -> bool:
        """Return True: every process keeps a part of every tensor."""
        return True

    def finish_unit(self, note: Callable[[Mark], None]) -> None:
        """Call `note` with a mark that never holds on resuming, after the last of a unit."""
        note(Mark(self._finished, "", 0, "0" * 8))

    def resume(self, marks: Sequence[Mark]) -> int:
        """Return 0: no mark holds."""
        return 0

    def __enter__(self) -> Self:
        """Return the writer, without creating anything."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Write the tree together with all other processes, unless the block failed."""
        if kind is not None:
            return
        if self._finished < len(self._order):
            raise ValueError(f"tensor {self._order[self._finished]!r} was never written")
        shapes = self._leaf_shapes()
        with in_x64(*(spec.dtype for spec in self._specs.values())):
            leaves = {
                leaf: jax.make_array_from_single_device_arrays(
                    shapes[leaf],
                    self._shardings[leaf],
                    [jax.device_put(part, device) for device, part in parts.items()],
                )
                for leaf, parts in self._kept.items()
            }
        self._kept.clear()
        save_orbax(self._folder, unflatten_dict(leaves))

    def _leaf_shapes(self) -> dict[_Leaf, tuple[int, ...]]:
        """Return the shape of every leaf of the tree, by its path."""
        shapes: dict[_Leaf, tuple[int, ...]] = {}
        for name, spec in self._specs.items():
            leaf, layer = self._place(name)
            shape = spec.shape[::-1] if leaf[-1] == "kernel" else spec.shape
            stack = () if layer is None else (self._arch.num_hidden_layers,)
            shapes[leaf] = (*stack, *shape)
        return shapes

    def _place(self, name: str) -> tuple[_Leaf, int | None]:
        """Return the leaf that a tensor belongs to, and its layer if the leaf stacks layers."""
        unit = unit_of_tensor(name)
        path = flax_path(self._arch.family, name).split("/")
        if unit in (EMBED, HEAD):
            return (unit, *path), None
        return (LAYERS, *path), int(unit.rpartition(".")[2])

    def _keep(self, name: str, tensor: np.ndarray) -> None:
        """Keep the part of a tensor that this process's devices hold."""
        leaf, layer = self._place(name)
        array = tensor.T if leaf[-1] == "kernel" else tensor
        shape = array.shape if layer is None else (self._arch.num_hidden_layers, *array.shape)
        sharding: NamedSharding = self._shardings[leaf]
        parts = self._kept.setdefault(leaf, {})
        for device, index in _local_indices(sharding, shape).items():
            if layer is None:
                parts[device] = np.ascontiguousarray(array[index])
                continue
            if device not in parts:
                parts[device] = np.empty(sharding.shard_shape(shape), array.dtype)
            parts[device][layer] = array[index[1:]]


def _local_indices(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[jax.Device, Any]:
    indices = sharding.addressable_devices_indices_map(shape)
    return {device: index for device, index in indices.items() if index is not None}
