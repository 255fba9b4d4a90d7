"""Rules: where a merge's weights come from.

RECALL compares the models as the walk reaches a unit; `linear` and `average` have theirs from the
recipe; a file of weights stands in for RECALL's.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.findings import Findings
from recall_jax.engine.plan import NamedModel, units_of
from recall_jax.errors import InputError
from recall_jax.merging.methods import LinearModelParameters, LinearParameters, RecallParameters
from recall_jax.recipe import Recipe, parameter_at
from recall_jax.similarity.compare import Comparison, Reference, check_reference, parse_similarity
from recall_jax.units import EMBED, HEAD

if TYPE_CHECKING:
    from recall_jax.engine.inputs import TypicalSamples

# The tensors of a unit, of each of K models, as on disk.
Stored = Sequence[Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Rule:
    """How a walk over the units comes by its weights, and what there is to tell of them afterwards.

    `weigh(unit, placed)` gives the unit's weights, (K,) for all its tensors or (n, K), a row for
    each. `place(unit, stored)` brings what that needs to the device while the unit before is
    computed; a rule without it knows its weights, and needs no more than the tensors' names.
    """

    weigh: Callable[[str, Any], np.ndarray]
    findings: Callable[[], Findings]
    place: Callable[[str, Stored], Any] | None = None


@dataclass(frozen=True)
class Prepared:
    """A rule ready to walk over `models`, and what the report has to say of it.

    `needed` are the bytes of memory planned, `cut` how the forward is cut for them; `told` are
    entries known from the report of an earlier run.
    """

    rule: Rule
    models: Sequence[NamedModel]
    needed: int
    cut: Mapping[str, int] = field(default_factory=dict)
    reference: int | None = None
    compute_dtype: str | None = None
    samples: "TypicalSamples | None" = None
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
                f"parameters.reference {value!r} is none of the models: use newest, pairwise, an "
                "index, or a model as the recipe names it"
            )
        return models.index(value)
    check_reference(value, len(models))
    return value % len(models)


def linear_weights(recipe: Recipe, specs: Mapping[str, TensorSpec]) -> dict[str, np.ndarray]:
    """Effective weights (K,) float32 of every tensor of a `linear` recipe.

    Raises InputError where a model has no weight, or weights to be normalised sum to zero.
    """
    shared = recipe.parameters
    assert isinstance(shared, LinearParameters)
    units = units_of(specs)
    inner = max(len(set(units) - {EMBED, HEAD}) - 1, 1)
    weights = {}
    for unit, names in units.items():
        depth = {EMBED: 0.0, HEAD: 1.0}.get(unit)
        if depth is None:
            depth = int(unit.rpartition(".")[2]) / inner
        for name in names:
            row = np.asarray([_weight(m, shared, name, depth) for m in recipe.models], np.float64)
            if shared.normalize:
                with np.errstate(over="ignore"):
                    total = row.sum()
                if abs(total) < 1e-8 or not np.isfinite(total):
                    what = "sum to zero" if np.isfinite(total) else "have no finite sum"
                    raise InputError(
                        f"the weights of {name} {what}: change them, or set normalize: false"
                    )
                row /= total
            weights[name] = row.astype(np.float32)
    return weights


def _weight(entry: Any, shared: LinearParameters, tensor: str, depth: float) -> float:
    """A model's weight for one tensor: its own, else the recipe's."""
    own = entry.parameters
    assert isinstance(own, LinearModelParameters)
    for value in (own.weight, shared.weight):
        if value is not None and (found := parameter_at(value, tensor, depth)) is not None:
            return found
    raise InputError(f"model {entry.model} has no weight for {tensor}: give it parameters.weight")


def weights_by_tensor(weights: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]) -> Rule:
    """The rule of weights (K,) known for each tensor beforehand."""
    found = Findings(mean_by_unit(weights, specs))
    return Rule(lambda unit, stored: np.stack([weights[name] for name in stored[0]]), lambda: found)


def weights_by_unit(found: Findings, units: Sequence[str]) -> Rule:
    """The rule of weights (K, U) known for each unit beforehand."""
    columns = dict(zip(units, found.weights.T, strict=True))
    return Rule(lambda unit, stored: columns[unit], lambda: found)


def mean_by_unit(weights: Mapping[str, np.ndarray], specs: Mapping[str, TensorSpec]) -> np.ndarray:
    """(K, U): the mean over each unit's elements of weights given for each tensor."""
    columns = []
    for names in units_of(specs).values():
        sizes = np.asarray([max(specs[name].nbytes, 1) for name in names], np.float64)
        rows = np.stack([weights[name] for name in names]).astype(np.float64)
        columns.append(sizes @ rows / sizes.sum())
    return np.stack(columns, axis=1)
