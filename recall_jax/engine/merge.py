"""What a merge method is given, and the rule that it makes of that for the walk over the units."""

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
    """Where a walk over the units gets the values from that its kernel merges each tensor with.

    `values(unit, placed)` returns those of each tensor of a unit, by its name. `place(unit,
    stored)` brings what that needs, of the tensors as the layout reads them, to the device while
    the unit before is computed; a rule without it knows its values beforehand. `on_merged(unit,
    tensors)` is called with a merged unit before the values of the next one are asked for.
    """

    values: Callable[[str, Any], Mapping[str, Values]]
    findings: Callable[[], Findings]
    place: Callable[[str, Inputs[Mapping[str, Any]]], Any] | None = None
    on_merged: Callable[[str, Mapping[str, np.ndarray]], None] | None = None


class Entry(Protocol[M_co]):
    """A model as a recipe lists it: its name, its parameters, and a file of rows that it knows."""

    @property
    def model(self) -> str:
        """The name."""

    @property
    def parameters(self) -> M_co:
        """The method's parameters for this model."""

    @property
    def data(self) -> str | None:
        """The path of the file of rows."""


class Walk(Protocol):
    """The walk over the units of some models that a rule can look at and run."""

    @property
    def overhead(self) -> int:
        """Bytes of memory that merging itself takes."""

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Dtype and shape of every merged tensor, by its name."""

    @property
    def units(self) -> Mapping[str, Sequence[str]]:
        """The names of the tensors of each unit, in the order of the forward pass."""

    @property
    def pooled(self) -> "PooledSource":
        """Gives the models' pooled states on the newest task's typical samples."""


class PooledStates(Protocol):
    """The pooled hidden states of K models on n typical samples, a unit at a time."""

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> Any:
        """Return what `advance` needs of a unit, of tensors as the layout reads them."""

    def advance(self, unit: str, placed: Any) -> np.ndarray:
        """Run the models through the next unit: pooled states (K, n, E) float32.

        Raises InputError naming a model whose states are not finite.
        """

    def to_prepared(self, rule: Rule, reference: int | None = None) -> "Prepared":
        """Return the rule made ready to walk with what was prepared for these states."""


# Of a merge, the index of the model that selects its samples, and a check of their number, which
# raises InputError where they are too few.
PooledSource: TypeAlias = Callable[["Merge[Any, Any]", int, Callable[[int], None]], PooledStates]


@dataclass(frozen=True)
class CheckpointWalk:
    """A `Walk` over checkpoints whose architecture is known where the models are to run.

    `layout` holds the tensors; `budget` is the memory in bytes that the merge may take, `overhead`
    the part of it that merging itself takes. `agree(what, decide)` returns a decision, as JSON,
    that depends on the machine: processes that work together must decide alike. `pooled` is a field
    because what runs the models is loaded only where a method asks for it. `forward_dtype` is the
    dtype asked for the forward.
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
        """Dtype and shape of every merged tensor, by its name."""
        return self.plan.specs

    @cached_property
    def units(self) -> Mapping[str, Sequence[str]]:
        """The names of the tensors of each unit, in the order of the forward pass."""
        return self.plan.units

    @cached_property
    def arch(self) -> "Architecture":
        """The architecture that all inputs share; InputError where they have none."""
        from recall_jax.engine.inputs import common_architecture

        return common_architecture(self.inputs.all, self.ignore_config)

    @cached_property
    def dtype(self) -> DTypeLike:
        """The dtype that the forward computes in."""
        from recall_jax.engine.inputs import compute_dtype

        return compute_dtype(self.forward_dtype, self.inputs.newest)

    def check_same_samples(self, what: str, samples: "Tokenized", model: str) -> None:
        """Raise InputError in a process whose samples, for a model to read, are not process 0's."""
        digest = samples.digest()
        if self.agree(f"texts {what}", lambda: digest) != digest:
            raise InputError(
                f"the texts or the tokenizer of {model} are not those of process 0: give all "
                "processes the same"
            )


@dataclass(frozen=True)
class Merge(Generic[P_co, M_co]):
    """A merge about to begin, as its method gets it: what the method declared that it needs.

    `parameters` are the recipe's, `entries` the models as it lists them, with the base. `samples`
    says how samples are read, `walk` runs over the models, `journal` keeps what is prepared, so
    that an interrupted merge goes on with it, and `progress` reports.
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
        """The K models as the recipe names them."""
        return [entry.model for entry in self.entries.models]

    @property
    def tokenizers_pass(self) -> bool:
        """Whether models of different tokenizers are accepted: on request, or as they were before.

        What an interrupted merge had prepared was accepted, and its texts must be the same again.
        """
        return self.ignore_tokenizers or bool(self.journal.prepared)

    @property
    def checkpoints(self) -> CheckpointWalk:
        """The walk of a method that needs more of the models than pooled states."""
        assert isinstance(self.walk, CheckpointWalk), "no place offers this for other models"
        return self.walk


@dataclass(frozen=True)
class Prepared:
    """A rule ready to walk, and what the report has to say of it.

    `inputs` replace those of the walk where the rule has read some of them already. `planned_bytes`
    is the memory planned, `batching` how the forward is batched for that. `per_model_samples` are
    the typical samples of each model, where there are such; `previous_report` holds the entries
    known from the report of an earlier run.
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
    """Raise InputError where layers get values of their own that the tensors' `names` do not allow.

    `by_layer` is what gives them these, if anything does. Two stacks number their layers alike, so
    that a number is no place in the model; where there is none, all would be taken for the head.
    """
    stacks = stacks_of(names)
    if len(stacks) != 1 and by_layer:
        have = f"more, {' and '.join(stacks)}" if stacks else "none that their names tell"
        raise InputError(
            f"{by_layer} is for models with one stack of layers, and these have {have}: merge with "
            "a number for all layers, or with filters"
        )


def depths(specs: Mapping[str, TensorSpec]) -> dict[str, float]:
    """Where each tensor stands in its model: layer i of L at i / (L - 1), embed at 0, head at 1."""
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
    """Return the rule of values known for each tensor beforehand.

    `shares` (K,) say how much each model counts in a tensor.
    """
    units = units_of(specs)
    found = Findings(mean_by_unit(shares, specs))
    return Rule(lambda unit, placed: {name: values[name] for name in units[unit]}, lambda: found)


def weights_by_unit(found: Findings, specs: Mapping[str, TensorSpec]) -> Rule:
    """Return the rule of weights (K, U) known for each unit beforehand."""
    units = units_of(specs)
    columns = dict(zip(units, found.weights.T.astype(np.float32), strict=True))
    return Rule(
        lambda unit, placed: {name: {"weight": columns[unit]} for name in units[unit]},
        lambda: found,
    )


def mean_by_unit(weights: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]) -> np.ndarray:
    """(K, U): the mean over each unit's elements of weights given for each tensor."""
    columns = []
    for names in units_of(specs).values():
        sizes = np.asarray([max(specs[name].nbytes, 1) for name in names], np.float64)
        rows = np.stack([weights[name] for name in names]).astype(np.float64)
        columns.append(sizes @ rows / sizes.sum())
    return np.stack(columns, axis=1)


def merging_bytes(walk: Walk) -> int:
    """Return the memory planned for a merge that runs no model, with what is held by now."""
    return held_bytes() + walk.overhead
