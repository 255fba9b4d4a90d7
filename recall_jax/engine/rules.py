"""Rules: where the values come from that a kernel merges a tensor with.

Most methods have theirs from the recipe alone; RECALL compares the models as the walk reaches a
unit; a file of weights stands in for RECALL's.
"""

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import EMBED, HEAD, stacks_of, unit_of_tensor
from recall_jax.engine.findings import Findings
from recall_jax.engine.journal import Journal
from recall_jax.engine.layout import Layout
from recall_jax.engine.plan import NamedModel, Plan, units_of
from recall_jax.errors import InputError, shown
from recall_jax.files.progress import Clock, Progress
from recall_jax.methods.methods import METHODS
from recall_jax.methods.parameters import (
    LinearParameters,
    Parameters,
    ParameterValue,
    RecallParameters,
    TaskVectorParameters,
)
from recall_jax.recipes.recipe import Recipe, parameter_at
from recall_jax.similarity.compare import Comparison, Reference, check_reference, parse_similarity

if TYPE_CHECKING:
    from recall_jax.engine.inputs import TypicalSamples
    from recall_jax.inputs.samples import Tokenized

# The tensors of a unit, of each of K models, as on disk.
Stored = Sequence[Mapping[str, np.ndarray]]

# What a kernel merges a tensor with: arrays (K,) of the models, () of the recipe, and others.
Values = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """How a walk over the units comes by its values, and what there is to tell of them afterwards.

    `values(unit, placed)` gives those of each tensor of a unit. `place(unit, stored)` brings what
    that needs to the device while the unit before is computed; a rule without it knows its values.
    `merged(unit, tensors)` hears what became of a unit, before the next one's values are asked.
    """

    values: Callable[[str, Any], Mapping[str, Values]]
    findings: Callable[[], Findings]
    place: Callable[[str, Stored], Any] | None = None
    merged: Callable[[str, Mapping[str, np.ndarray]], None] | None = None


@dataclass(frozen=True)
class Merge:
    """A merge about to begin: all that a rule can be made of.

    `layout` holds the tensors; `budget` are the bytes of memory allowed, `beside` those that
    merging itself takes. `agreed(what, decide)` is what is decided, as JSON, where it depends on
    the machine: processes that work together must decide alike.
    """

    recipe: Recipe
    models: Sequence[Checkpoint]
    base: Checkpoint | None
    plan: Plan
    layout: Layout
    agreed: Callable[[str, Callable[[], Any]], Any]
    journal: Journal
    budget: int
    beside: int
    clock: Clock
    progress: Progress
    announce: Callable[[str], None]

    @property
    def tokenizers_pass(self) -> bool:
        """Whether models of other tokenizers pass: by the user's word, or as they did before.

        What an interrupted merge had prepared has passed, and its texts must be the same again.
        """
        return self.recipe.ignore_tokenizers or self.journal.prepared is not None


def check_agreed(merge: Merge, what: str, samples: "Tokenized", model: str) -> None:
    """Raise InputError in a process that has other samples than process 0, for a model to read."""
    digest = samples.digest()
    if merge.agreed(f"texts {what}", lambda: digest) != digest:
        raise InputError(
            f"the texts or the tokenizer of {model} are not those of process 0: give all processes "
            "the same"
        )


@dataclass(frozen=True)
class Prepared:
    """A rule ready to walk over `models`, and what the report has to say of it.

    `needed` are the bytes of memory planned, `cut` how the forward is cut for them; `told` are
    entries known from the report of an earlier run. `own` are the typical samples of each model,
    where each has some.
    """

    rule: Rule
    models: Sequence[NamedModel]
    needed: int
    cut: Mapping[str, int] = field(default_factory=dict)
    reference: int | None = None
    compute_dtype: str | None = None
    samples: "TypicalSamples | None" = None
    own: "Sequence[Tokenized]" = ()
    told: Mapping[str, Any] = field(default_factory=dict)


def recall_comparison(parameters: RecallParameters, models: Sequence[str]) -> Comparison:
    """How `recall` compares the models that a recipe names; the reference as an index from 0."""
    return Comparison(
        similarity=parse_similarity(parameters.similarity),
        sigma=parameters.sigma,
        reference=_reference(parameters.reference, models),
        alignment=parameters.alignment,
    )


def _reference(value: int | str, models: Sequence[str]) -> Reference:
    if value == "pairwise":
        return "pairwise"
    if value == "newest":
        return len(models) - 1
    if isinstance(value, str):
        if models.count(value) != 1:
            raise InputError(
                f"parameters.reference {shown(value)} is none of the models: use newest, "
                "pairwise, an index, or a model as the recipe names it"
            )
        return models.index(value)
    check_reference(value, len(models))
    return value % len(models)


def recipe_values(
    recipe: Recipe,
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Values]:
    """The values that the recipe itself has for every tensor, float32.

    (K,) of each model's parameters, where it has none those of the recipe; () of the recipe's own;
    `seed` (), uint32, where the method draws numbers. In a method without weights all models weigh
    the same; `weights` (K,) of each unit stand in for those of the recipe. Raises InputError where
    a model has no value.
    """
    shared = recipe.parameters
    own = METHODS[recipe.merge_method].model_parameters.by_tensor
    values: dict[str, Values] = {}
    for name, depth in depths(specs).items():
        at: dict[str, Any] = {"weight": np.full(len(recipe.models), 1 / len(recipe.models))}
        if weights is not None:
            at["weight"] = weights[unit_of_tensor(name)]
        for key in own if weights is None else set(own) - {"weight"}:
            row = [_value(entry, shared, key, name, depth) for entry in recipe.models]
            at[key] = np.asarray(row, np.float64)
        for key in shared.by_tensor:
            found = parameter_at(getattr(shared, key), name, depth)
            if found is None:
                key = key.removesuffix("_")  # as a recipe names what is a word of Python
                raise InputError(f"parameters.{key} has no value for {name}: add one for *")
            at[key] = np.asarray(found, np.float64)
        if isinstance(shared, LinearParameters) and shared.normalize:
            at["weight"] = _normalized(at["weight"], name)
        at = {key: value.astype(np.float32) for key, value in at.items()}
        if hasattr(shared, "seed"):
            at["seed"] = np.uint32(zlib.crc32(f"{shared.seed} {name}".encode()))
        values[name] = at
    return values


def check_layers(recipe: Recipe, names: Iterable[str]) -> None:
    """Raise InputError where a recipe tells layers apart that the tensors' `names` do not.

    Two stacks number their layers alike, so that a number is no place in the model; where there
    is none, all would be taken for the head.
    """
    stacks = stacks_of(names)
    if len(stacks) != 1 and (what := recipe.by_layer):
        have = f"more, {' and '.join(stacks)}" if stacks else "none that their names tell"
        raise InputError(
            f"{what} is for models with one stack of layers, and these have {have}: merge with a "
            "number for all layers, or with filters"
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


def _value(entry: Any, shared: Any, key: str, tensor: str, depth: float) -> float:
    """A model's parameter for one tensor: its own, else the recipe's."""
    choices: list[ParameterValue | None] = [getattr(entry.parameters, key), getattr(shared, key)]
    for value in choices:
        if value is not None and (found := parameter_at(value, tensor, depth)) is not None:
            return found
    raise InputError(f"model {entry.model} has no {key} for {tensor}: give it parameters.{key}")


def _normalized(weights: np.ndarray, name: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        total = weights.sum()
    if abs(total) < 1e-8 or not np.isfinite(total):
        what = "sum to zero" if np.isfinite(total) else "have no finite sum"
        raise InputError(f"the weights of {name} {what}: change them, or set normalize: false")
    return weights / total


def effective_weight(shared: Parameters | None, values: Values) -> np.ndarray:
    """(K,) float64: what a model counts in a tensor, or its task vector in a method with a base.

    Where elements are dropped or elect a sign, it is so for those that all models keep.
    """
    weight = np.asarray(values["weight"], np.float64)
    if not isinstance(shared, TaskVectorParameters):
        return weight
    total = weight.sum() if shared.normalize else 1.0
    return values["lambda_"] * weight / (total if abs(total) > 1e-6 * abs(weight).sum() else 1)


def values_by_tensor(
    values: Mapping[str, Values],
    specs: Mapping[str, TensorSpec],
    shared: Parameters | None = None,
) -> Rule:
    """The rule of values known for each tensor beforehand, `weight` (K,) among them."""
    weights = {name: effective_weight(shared, values[name]) for name in specs}
    found = Findings(mean_by_unit(weights, specs))
    return Rule(lambda unit, stored: {name: values[name] for name in stored[0]}, lambda: found)


def weights_by_unit(found: Findings, units: Sequence[str]) -> Rule:
    """The rule of weights (K, U) known for each unit beforehand."""
    columns = dict(zip(units, found.weights.T.astype(np.float32), strict=True))
    return Rule(
        lambda unit, stored: {name: {"weight": columns[unit]} for name in stored[0]},
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
