"""Define what a merge method is given, and the rule for the walk over the units that it returns."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar

import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD, stacks_of
from recall_jax.engine.budget import held_bytes
from recall_jax.engine.findings import Findings
from recall_jax.engine.journal import MergeJournal
from recall_jax.engine.kernel import Values
from recall_jax.engine.layout import Layout
from recall_jax.engine.plan import MergePlan, NamedModel, units_of
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.files.progress import Reporter

if TYPE_CHECKING:
    from recall_jax.engine.inputs import TypicalSamples
    from recall_jax.inputs.samples import Tokenized
    from recall_jax.inputs.settings import Samples
    from recall_jax.models.architecture import Architecture

P_co = TypeVar("P_co", covariant=True)
M_co = TypeVar("M_co", covariant=True)


@dataclass(frozen=True)
class Rule:
    """Give the values that the kernel merges each tensor with, unit by unit.

    `values(unit, placed)` returns the kernel's values by tensor name. `place(unit, stored)`
    transfers what `values` needs to the device while the unit before is computed, from tensors as
    the layout reads them; a rule without `place` knows its values beforehand. `on_merged(unit,
    tensors)` is called with each merged unit before the values of the next one are asked for.
    `findings()` is called after the walk.
    """

    values: Callable[[str, Any], Mapping[str, Values]]
    findings: Callable[[], Findings]
    place: Callable[[str, Inputs[Mapping[str, Any]]], Any] | None = None
    on_merged: Callable[[str, Mapping[str, np.ndarray]], None] | None = None


class Entry(Protocol[M_co]):
    """Describe a model of a recipe: its name, its parameters, and a file of rows from its task."""

    @property
    def model(self) -> str:
        """Return the name in the recipe."""

    @property
    def parameters(self) -> M_co:
        """Return the method's parameters for this model."""

    @property
    def data(self) -> str | None:
        """Return the path of the file of rows, if there is one."""


class Walk(Protocol):
    """Describe a walk over the units of some models, for a rule to inspect and run."""

    @property
    def overhead(self) -> int:
        """Return the bytes of memory that merging takes, not counting a forward."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the dtype and shape of every merged tensor by name."""

    @property
    def units(self) -> Mapping[str, Sequence[str]]:
        """Return the tensor names of each unit, in the order of the forward pass."""

    @property
    def pooled(self) -> "PooledSource":
        """Return the source of the models' pooled states on the newest task's typical samples."""


class PooledStates(Protocol):
    """Compute the pooled hidden states of K models on n typical samples, one unit at a time."""

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> Any:
        """Return the input of `advance` for a unit, from tensors as the layout reads them."""

    def advance(self, unit: str, placed: Any) -> np.ndarray:
        """Run the models through the next unit: pooled states (K, n, E) float32.

        Raises InputError naming a model whose states are not finite.
        """

    def to_prepared(self, rule: Rule, reference: int | None = None) -> "Prepared":
        """Return the rule ready for the walk, with the samples and the plan of these states."""


# A function of a merge, the index of the model that selects its samples, and a check of their
# number, which raises InputError if they are too few.
PooledSource: TypeAlias = Callable[["Merge[Any, Any]", int, Callable[[int], None]], PooledStates]


@dataclass(frozen=True)
class CheckpointWalk:
    """Implement `Walk` for checkpoints, whose architecture is known if the models are to run.

    `layout` holds the tensors; `budget` is the memory in bytes that the merge may take, `overhead`
    the part that merging takes. `agree(key, decide)` returns process 0's decision, as JSON, so that
    decisions that depend on the machine are the same in all processes. `pooled` is a field so that
    the code that runs models is loaded only for methods that need it. `forward_dtype` is the
    compute dtype asked for.
    """

    inputs: Inputs[Checkpoint]
    plan: MergePlan
    layout: Layout
    budget: int
    overhead: int
    agree: Callable[[str, Callable[[], Any]], Any]
    pooled: PooledSource
    forward_dtype: str | None = None
    ignore_config: Collection[str] = ()

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Return the dtype and shape of every merged tensor by name."""
        return self.plan.specs

    @cached_property
    def units(self) -> Mapping[str, Sequence[str]]:
        """Return the tensor names of each unit, in the order of the forward pass."""
        return self.plan.units

    @cached_property
    def arch(self) -> "Architecture":
        """Return the architecture that all inputs share; raises InputError if they have none."""
        from recall_jax.engine.inputs import common_architecture

        return common_architecture(self.inputs.all, self.ignore_config)

    @cached_property
    def dtype(self) -> DTypeLike:
        """Return the compute dtype of the forward."""
        from recall_jax.engine.inputs import compute_dtype

        return compute_dtype(self.forward_dtype, self.inputs.newest)

    def check_same_samples(self, key: str, samples: "Tokenized", model: str) -> None:
        """Raise InputError in a process whose samples for a model differ from process 0's."""
        digest = samples.digest()
        if self.agree(f"texts {key}", lambda: digest) != digest:
            raise InputError(
                f"the texts or the tokenizer of {model} are not those of process 0: give all "
                "processes the same"
            )


@dataclass(frozen=True)
class Merge(Generic[P_co, M_co]):
    """Hold what a merge method declared that it needs, at the start of a merge.

    `parameters` are the recipe's; `entries` are its models with the base. `samples` says how
    samples are read, `walk` runs over the models, `journal` records what is prepared so that an
    interrupted merge can be resumed, and `progress` reports.
    """

    parameters: P_co
    entries: Inputs[Entry[M_co]]
    samples: "Samples | None"
    walk: Walk
    journal: MergeJournal
    progress: Reporter
    ignore_tokenizers: bool = False

    @property
    def names(self) -> list[str]:
        """Return the names of the K models in the recipe."""
        return [entry.model for entry in self.entries.models]

    @property
    def tokenizers_pass(self) -> bool:
        """Return whether models with different tokenizers are accepted: on request, or on resuming.

        What an interrupted merge had prepared was accepted then, and its texts are checked to be
        the same.
        """
        return self.ignore_tokenizers or bool(self.journal.prepared)

    @property
    def checkpoints(self) -> CheckpointWalk:
        """Return the walk over checkpoints, for methods that need more than pooled states."""
        assert isinstance(self.walk, CheckpointWalk), "no place offers this for other models"
        return self.walk


@dataclass(frozen=True)
class Prepared:
    """Hold a rule that is ready for the walk, and the report's entries about it.

    `inputs` replace those of the walk if the rule has read some already. `planned_bytes` is the
    planned memory, and `batching` the batching of the forward that fits it. `per_model_samples` are
    the typical samples of each model, for methods that have them; `previous_report` holds entries
    from the report of an earlier run.
    """

    rule: Rule
    planned_bytes: int
    inputs: Inputs[NamedModel] | None = None
    batching: Mapping[str, int] = field(default_factory=dict)
    reference: int | None = None
    compute_dtype: str | None = None
    samples: "TypicalSamples[Any] | None" = None
    per_model_samples: "Sequence[Tokenized]" = ()
    previous_report: Mapping[str, Any] = field(default_factory=dict)


def check_layers(by_layer: str | None, names: Iterable[str]) -> None:
    """Raise InputError if values differ by layer and the tensors' `names` do not number one stack.

    `by_layer` is the recipe's key for these values, if there are any. Two stacks both number their
    layers from 0, so a number is not a depth; without layer numbers, all tensors would count as the
    head.
    """
    stacks = stacks_of(names)
    if len(stacks) != 1 and by_layer:
        have = f"more, {' and '.join(stacks)}" if stacks else "none in their tensor names"
        raise InputError(
            f"{by_layer} is for models with one stack of layers, and these have {have}: merge with "
            "a number for all layers, or with filters"
        )


def depths(specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Return each tensor's depth: layer i of L at i / (L - 1), the embedding 0, the head 1."""
    units = units_of(specs)
    inner = max(len(set(units) - {EMBED, HEAD}) - 1, 1)
    found: dict[str, float] = {}
    for unit, names in units.items():
        depth = {EMBED: 0.0, HEAD: 1.0}.get(unit)
        if depth is None:
            depth = int(unit.rpartition(".")[2]) / inner
        found |= dict.fromkeys(names, depth)
    return {name: found[name] for name in specs}


def values_by_tensor(
    values: Mapping[str, Values], shares: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]
) -> Rule:
    """Return the rule for values known beforehand for each tensor.

    `shares` (K,) is how much each model counts in a tensor.
    """
    units = units_of(specs)
    found = Findings(mean_by_unit(shares, specs))
    return Rule(lambda unit, placed: {name: values[name] for name in units[unit]}, lambda: found)


def weights_by_unit(found: Findings, specs: Mapping[str, TensorSpec]) -> Rule:
    """Return the rule for weights (K, U) known beforehand for each unit."""
    units = units_of(specs)
    columns = dict(zip(units, found.weights.T.astype(np.float32), strict=True))
    return Rule(
        lambda unit, placed: {name: {"weight": columns[unit]} for name in units[unit]},
        lambda: found,
    )


def mean_by_unit(weights: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]) -> np.ndarray:
    """Return the mean (K, U) over each unit's elements of weights (K,) given for each tensor."""
    columns = []
    for names in units_of(specs).values():
        sizes = np.asarray([max(specs[name].nbytes, 1) for name in names], np.float64)
        rows = np.stack([weights[name] for name in names]).astype(np.float64)
        columns.append(sizes @ rows / sizes.sum())
    return np.stack(columns, axis=1)


def merging_bytes(walk: Walk) -> int:
    """Return the planned memory of a merge that runs no model, including the memory held now."""
    return held_bytes() + walk.overhead
