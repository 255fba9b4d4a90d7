"""Describe where the tensors of a merge are held, and how they are computed with there.

A layout holds full tensors on one host, as `OnHost` does, or shards them over a mesh of devices and
processes, as `engine.pod.layout.Sharded` does.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from typing import TYPE_CHECKING, Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.chunks import CHUNK, Piece, merge_tensor
from recall_jax.engine.device import find_not_finite
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.sources import Inputs

if TYPE_CHECKING:  # a merge that runs no model need not load these
    from recall_jax.engine.forward import HiddenStates, StreamedForward
    from recall_jax.engine.memory import Split
    from recall_jax.engine.programs import Grams
    from recall_jax.inputs.batches import Batches
    from recall_jax.models.architecture import Architecture

# A function of (models, values, base) with results (n,), zero if all elements are zero.
Fold = Callable[[Sequence[jax.Array], Mapping[str, Any], Any], jax.Array]


class Forward(Protocol):
    """Run models forward on given rows, one unit at a time; `StreamedForward` is an example."""

    @property
    def arch(self) -> "Architecture":
        """Return the architecture that all models share."""

    @property
    def batches(self) -> "Batches":
        """Return the rows in batches."""

    @property
    def models_per_device(self) -> int:
        """Return how many models one program runs on the same devices."""

    def place(self, unit: str, tensors: Sequence[Mapping[str, Any]]) -> Any:
        """Return the input of `advance` for a unit of all K models, as the layout reads it."""

    def advance(
        self, unit: str, placed: Any, states: "Sequence[HiddenStates]", models: Sequence[str]
    ) -> "tuple[list[HiddenStates], np.ndarray]":
        """Run a unit: (states after it, pooled means (K, n, E) float32)."""

    def advance_with_grams(
        self, unit: str, placed: Any, states: "Sequence[HiddenStates]", model: str
    ) -> "tuple[list[HiddenStates], Grams]":
        """Run a unit of the only model: (states after it, Grams of its linear layers' inputs)."""

    def pooled_units(self, model: NamedModel, last: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yield each unit of the only model up to `last`, and its pooled means (n, E)."""


class Layout(Protocol):
    """Hold and merge tensors in one way; `stored` is a tensor as the layout's `read` returns it."""

    @property
    def mesh(self) -> Mesh | None:
        """Return the mesh over which tensors are sharded, None for full tensors on one host."""

    @property
    def description(self) -> str | None:
        """Return a line about the layout for the printed plan, or None."""

    @property
    def partition(self) -> Mapping[str, Any]:
        """Return the report's entries on how tensors are partitioned."""

    def split(self, num_models: int) -> "Split | None":
        """Return how the forward of `num_models` models is split over the mesh, if there is one."""

    def read(self, model: NamedModel, name: str) -> Any:
        """Return a tensor of a model; a thread calls this ahead of its use."""

    def forward(
        self,
        arch: "Architecture",
        token_ids: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dtype: DTypeLike,
        num_models: int = 1,
        models_at_once: int = 1,
    ) -> Forward:
        """Return the forward of `num_models` models on these rows."""

    def merge(
        self,
        stored: Inputs[Any],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        kernel: Kernel,
        reference: int = -1,
        full: bool = False,
        replicated: bool = False,
    ) -> Iterator[Piece]:
        """Merge a tensor and yield it in pieces; the kernel gets a `full` tensor unsplit.

        On a mesh, each device computes the full tensor if the kernel is `replicated`.
        """

    def sum_chunks(
        self,
        fold: Fold,
        stored: Inputs[Any],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        full: bool = False,
    ) -> np.ndarray:
        """Return the sum (n,) float64 of `fold` over a tensor's chunks, or over a `full` tensor."""

    def fault(self, models: Inputs[str], name: str, stored: Inputs[Any]) -> str | None:
        """Return the error message for the first model whose tensor is not finite, None if all are.

        `stored` must be the tensor that was merged or summed last.
        """


@dataclass(frozen=True)
class OnHost:
    """Hold tensors as mapped from their files, and merge them in chunks of `chunk` elements."""

    chunk: int | None = CHUNK

    @property
    def mesh(self) -> None:
        """Return None: there is no mesh."""

    @property
    def description(self) -> None:
        """Return None: one host is the default and needs no line in the plan."""

    @property
    def partition(self) -> Mapping[str, Any]:
        """Return the chunk size in elements."""
        return {"chunk_elements": self.chunk}

    def split(self, num_models: int) -> None:
        """Return None: there is no mesh to split over."""
        del num_models

    def read(self, model: NamedModel, name: str) -> np.ndarray:
        """Return the tensor as on disk."""
        return model.read(name)

    def forward(
        self,
        arch: "Architecture",
        token_ids: Sequence[Sequence[int]],
        *,
        batch_size: int,
        dtype: DTypeLike,
        num_models: int = 1,
        models_at_once: int = 1,
    ) -> "StreamedForward":
        """Return a forward whose models and rows are spread over this process's devices."""
        from recall_jax.engine.forward import StreamedForward

        return StreamedForward.prepare(
            arch,
            token_ids,
            batch_size=batch_size,
            dtype=dtype,
            num_models=num_models,
            models_at_once=models_at_once,
        )

    def merge(
        self,
        stored: Inputs[np.ndarray],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        kernel: Kernel,
        reference: int = -1,
        full: bool = False,
        replicated: bool = False,
    ) -> Iterator[Piece]:
        """Merge a tensor with `engine.chunks.merge_tensor`."""
        del replicated
        return merge_tensor(
            stored,
            values,
            spec.dtype,
            kernel=kernel,
            reference=reference,
            chunk=None if full else self.chunk,
        )

    def sum_chunks(
        self,
        fold: Fold,
        stored: Inputs[np.ndarray],
        values: Mapping[str, Any],
        spec: TensorSpec,
        *,
        full: bool = False,
    ) -> np.ndarray:
        """Return the sum of `fold` over chunks of a fixed size, whatever `chunk` is."""
        del spec
        if full:
            return np.asarray(_folded(fold, stored.models, values, stored.base), np.float64)
        flat = stored.map(lambda array: array.reshape(-1))
        starts = range(0, flat.newest.size, CHUNK)
        slices = [itemgetter(slice(start, start + CHUNK)) for start in starts]
        chunks = (flat.map(take) for take in slices)
        found = (_folded(fold, chunk.models, values, chunk.base) for chunk in chunks)
        return np.sum([np.asarray(each, np.float64) for each in found], axis=0)

    def fault(self, models: Inputs[str], name: str, stored: Inputs[np.ndarray]) -> str | None:
        """Return the error message for the first model whose tensor is not finite, if any."""
        pairs = zip(models.all, stored.all, strict=True)
        faults = (find_not_finite(model, {name: array}) for model, array in pairs)
        return next(filter(None, faults), None)


@partial(jax.jit, static_argnames="fold")
def _folded(fold: Fold, models: Sequence[Any], values: Mapping[str, Any], base: Any) -> jax.Array:
    return fold(models, values, base)


ON_HOST = OnHost()
