"""Declare what merge methods need, and what each place that can run a merge offers.

Everything that plans or runs a merge reads these declarations; nothing asks for a method's name.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Literal

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, unit_of_tensor

SampleNeed = Literal["none", "newest", "each"]


class Observation(Enum):
    """Name what a method observes when the models run on samples."""

    POOLED = "pooled hidden states"
    LINEAR_INPUTS = "Gram matrices of the inputs of linear layers"
    LOGITS = "next-token distributions"
    GRADIENTS = "gradients"


def never(name: str, spec: TensorSpec) -> bool:
    """Select no tensor."""
    del name, spec
    return False


def always(name: str, spec: TensorSpec) -> bool:
    """Select every tensor."""
    del name, spec
    return True


def linear_weights(name: str, spec: TensorSpec) -> bool:
    """Select the weights of linear layers: all matrices outside the embedding."""
    return len(spec.shape) == 2 and unit_of_tensor(name) != EMBED


@dataclass(frozen=True)
class Needs:
    """Declare what a merge method needs from the recipe, the models and the memory.

    `models` is the smallest number of models; `base` says whether there is a base model in
    addition. `samples` are rows from the newest model's task, or from each model's; `labelled` rows
    have a label to predict. `observes` is what the method observes when the models run on them.
    `passes` counts the times that all tensors are read, and `by_unit` says that values differ by
    unit. Tensors that `full_tensors(name, spec)` selects are never merged in chunks. A `replicated`
    kernel decomposes or solves them: on a mesh, each device computes the full tensor. `scratch` is
    the largest number of float32 arrays that a kernel makes per array that it reads. A `resident`
    method has all models in memory at once.
    """

    models: int = 1
    base: bool = False
    samples: SampleNeed = "none"
    labelled: bool = False
    observes: frozenset[Observation] = frozenset()
    passes: int = 1
    by_unit: bool = False
    full_tensors: Callable[[str, TensorSpec], bool] = never
    replicated: bool = False
    scratch: int = 0
    resident: bool = False


NO_NEEDS = Needs()


@dataclass(frozen=True)
class Offer:
    """Declare which needs can be met where a merge is to run; the fields are those of `Needs`."""

    observes: Collection[Observation] = ()
    samples: Collection[SampleNeed] = ("none", "newest", "each")
    passes: int | None = None  # None for any number
    resident: bool = False

    def meets(self, needs: Needs) -> bool:
        """Return whether a method with these needs can run here."""
        return (
            needs.observes <= frozenset(self.observes)
            and needs.samples in self.samples
            and (self.passes is None or needs.passes <= self.passes)
            and (self.resident or not needs.resident)
        )
