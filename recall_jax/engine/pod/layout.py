"""Hold tensors sharded over a mesh of devices and processes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.chunks import Piece
from recall_jax.engine.device import not_finite_message
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.layout import Fold
from recall_jax.engine.memory import Split
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.pod.forward import ShardedForward
from recall_jax.engine.pod.merge import iterate_pieces, merge_rows, sum_rows
from recall_jax.engine.pod.programs import Spread
from recall_jax.engine.pod.rows import read_rows_layout
from recall_jax.engine.sources import Inputs
from recall_jax.models.architecture import Architecture
from recall_jax.parallel.mesh import FSDP, TENSOR, format_mesh

_REMEMBERED = 16  # more tensors than can wait for a writer


@dataclass(frozen=True)
class Sharded:
    """Implement `engine.layout.Layout` over a mesh: tensors are read and merged in rows layout."""

    mesh: Mesh
    # Whether the last tensors' inputs are finite: a writer's thread must not start a program.
    _finite: dict[tuple[int, ...], Any] = field(default_factory=dict, repr=False)

    @property
    def description(self) -> str:
        """Return a line about the mesh and its processes for the printed plan."""
        processes = len({device.process_index for device in self.mesh.devices.flat})
        return (
            f"mesh {format_mesh(self.mesh.shape)}: {self.mesh.size} "
            f"device{'s' * (self.mesh.size > 1)} of {processes} process{'es' * (processes > 1)}"
        )

    @property
    def partition(self) -> Mapping[str, Any]:
        """Return the sizes of the mesh."""
        return {"mesh": dict(self.mesh.shape)}

    def split(self, num_models: int) -> Split:
        """Return how the forward of `num_models` models is split over the mesh."""
        sizes = self.mesh.shape
        spread = Spread.over(self.mesh, num_models)
        shared = len(self.mesh.local_devices) if jax.default_backend() == "cpu" else 1
        return Split(
            models=spread.models,
            rows=spread.num_splits,
            read_shards=self.mesh.size,
            placed_shards=sizes[FSDP] * sizes[TENSOR],
            compute_shards=sizes[TENSOR],
            sharing_devices=shared,
        )

    def read(self, model: NamedModel, name: str) -> jax.Array:
        """Return the tensor in rows layout; each process reads the rows of its devices."""
        return read_rows_layout(model, name, self.mesh)

    def forward(
        self,
        arch: Architecture,
        token_ids: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dtype: DTypeLike,
        num_models: int = 1,
        models_at_once: int = 1,
    ) -> ShardedForward:
        """Return the forward of these models; the mesh sets how many of them run at once."""
        del models_at_once
        return ShardedForward.prepare(
            arch,
            token_ids,
            mesh=self.mesh,
            batch_size=batch_size,
            dtype=dtype,
            num_models=num_models,
        )

    def merge(
        self,
        stored: Inputs[jax.Array],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        kernel: Kernel,
        reference: int = -1,
        full: bool = False,
        replicated: bool = False,
    ) -> Iterator[Piece]:
        """Merge a tensor in rows layout, and yield it in pieces, the same in every process."""
        merged = merge_rows(
            stored,
            values,
            spec,
            kernel=kernel,
            reference=reference,
            full=full,
            replicated=replicated,
            mesh=self.mesh,
        )
        self._remember(stored, merged.inputs_finite)
        yield from iterate_pieces(merged, spec, self.mesh)

    def sum_chunks(
        self,
        fold: Fold,
        stored: Inputs[jax.Array],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        full: bool = False,
    ) -> np.ndarray:
        """Return the sum (n,) float64 of `fold` over the devices' rows, or over a `full` tensor."""
        shape = spec.shape if full else None
        found, finite = sum_rows(fold, stored, values, full_shape=shape, mesh=self.mesh)
        self._remember(stored, finite)
        return np.asarray(found, np.float64)

    def fault(self, models: Inputs[str], name: str, stored: Inputs[jax.Array]) -> str | None:
        """Return the error message for a model whose tensor was not finite when merged, if any."""
        finite = np.asarray(self._finite[_key(stored)])
        faults = (
            not_finite_message(m, name, array.dtype)
            for m, array, good in zip(models.all, stored.all, finite, strict=True)
            if not good
        )
        return next(faults, None)

    def _remember(self, stored: Inputs[jax.Array], finite: Any) -> None:
        self._finite.pop(_key(stored), None)  # so that it is inserted last
        self._finite[_key(stored)] = finite
        while len(self._finite) > _REMEMBERED:
            del self._finite[next(iter(self._finite))]


def _key(stored: Inputs[jax.Array]) -> tuple[int, ...]:
    return tuple(map(id, stored.all))
