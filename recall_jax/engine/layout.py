"""Layouts: where the tensors of a walk lie, and how they are computed with there.

Whole on one host, which is here, or cut over a mesh of devices and processes, which is a pod's.
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

if TYPE_CHECKING:  # a merge that runs no model loads none
    from recall_jax.engine.forward import HiddenStates, StreamedForward
    from recall_jax.engine.memory import Split
    from recall_jax.engine.programs import Grams
    from recall_jax.inputs.batches import Batches
    from recall_jax.models.architecture import Architecture

# (models, values, base) to numbers (n,), which are zero where all elements are zero.
Fold = Callable[[Sequence[jax.Array], Mapping[str, Any], Any], jax.Array]


class Forward(Protocol):
    """The forward of some models on given rows, a unit at a time; see `StreamedForward`."""

    @property
    def arch(self) -> "Architecture":
        """Of all models."""

    @property
    def batches(self) -> "Batches":
        """The rows."""

    @property
    def models_per_device(self) -> int:
        """Models in one program, on the same devices."""

    def place(self, unit: str, tensors: Sequence[Mapping[str, Any]]) -> Any:
        """What `advance` needs of a unit of all K models, as the layout reads them."""

    def advance(
        self, unit: str, placed: Any, states: "Sequence[HiddenStates]", models: Sequence[str]
    ) -> "tuple[list[HiddenStates], np.ndarray]":
        """Run a unit: (states after it, pooled means (K, n, E) float32)."""

    def advance_with_grams(
        self, unit: str, placed: Any, states: "Sequence[HiddenStates]", model: str
    ) -> "tuple[list[HiddenStates], Grams]":
        """Run a unit of the only model: (states after it, Grams of what its linear layers read)."""

    def pooled_units(self, model: NamedModel, last: str) -> Iterator[tuple[str, np.ndarray]]:
        """Each unit of the only model up to `last` and its pooled means (n, E)."""


class Layout(Protocol):
    """How a walk holds tensors: a `stored` is what `read` gives, of one tensor of one model."""

    @property
    def mesh(self) -> Mesh | None:
        """The devices over which tensors are cut, if they are."""

    @property
    def description(self) -> str | None:
        """A line on it for the plan of a merge, if there is anything to say."""

    @property
    def partition(self) -> Mapping[str, Any]:
        """How it cuts tensors, for the report."""

    def split(self, num_models: int) -> "Split | None":
        """What a device has of the forward of so many models, where it is cut over a mesh."""

    def read(self, model: NamedModel, name: str) -> Any:
        """A tensor of a model; called in a thread of its own, ahead of its use."""

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
        """The forward of `num_models` models on these rows."""

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
        """Merge a tensor piece by piece; the kernel gets a `full` one as it is.

        Over a mesh each device computes all of it where the kernel is `replicated`.
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
        """What `fold` gives of the pieces of a tensor, or of all of it, summed: (n,) float64."""

    def fault(self, models: Inputs[str], name: str, stored: Inputs[Any]) -> str | None:
        """A line on the first of the models whose tensor is not finite, None if all are.

        `stored` have been merged or summed just now.
        """


@dataclass(frozen=True)
class OnHost:
    """Tensors as they are mapped from their files; merged in pieces of `chunk` elements."""

    chunk: int | None = CHUNK

    @property
    def mesh(self) -> None:
        """None: tensors are whole."""

    @property
    def description(self) -> None:
        """Nothing: it is what one expects."""

    @property
    def partition(self) -> Mapping[str, Any]:
        """The size of a piece."""
        return {"chunk_elements": self.chunk}

    def split(self, num_models: int) -> None:
        """No mesh."""
        del num_models

    def read(self, model: NamedModel, name: str) -> np.ndarray:
        """The tensor as on disk."""
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
        """Models side by side and rows split over this process's devices."""
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
        """By `merge_tensor`."""
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
        """Of pieces of one size, whatever that of the merged ones is."""
        del spec
        if full:
            return np.asarray(_folded(fold, stored.models, values, stored.base), np.float64)
        flat = stored.map(lambda array: array.reshape(-1))
        starts = range(0, flat.newest.size, CHUNK)
        cuts = [itemgetter(slice(start, start + CHUNK)) for start in starts]
        pieces = (flat.map(cut) for cut in cuts)
        found = (_folded(fold, piece.models, values, piece.base) for piece in pieces)
        return np.sum([np.asarray(each, np.float64) for each in found], axis=0)

    def fault(self, models: Inputs[str], name: str, stored: Inputs[np.ndarray]) -> str | None:
        """Looks at every element."""
        pairs = zip(models.all, stored.all, strict=True)
        faults = (find_not_finite(model, {name: array}) for model, array in pairs)
        return next(filter(None, faults), None)


@partial(jax.jit, static_argnames="fold")
def _folded(fold: Fold, models: Sequence[Any], values: Mapping[str, Any], base: Any) -> jax.Array:
    return fold(models, values, base)


ON_HOST = OnHost()
