"""Merge by RECALL: compare the models unit by unit, and average each unit by their similarities.

    θ = Σₖ wₖ θₖ        w = softmax(S / temperature)        S_k from `similarity.compare`

in each unit (arXiv:2510.20479); the kernel is `average`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple, Self

import jax.numpy as jnp
import numpy as np
from pydantic import Strict

from recall_jax.engine.findings import Findings, adjacent_similarities
from recall_jax.engine.kernel import Values
from recall_jax.engine.merge import Merge, PooledStates, Prepared, Rule
from recall_jax.engine.needs import Needs, Observation
from recall_jax.errors import InputError, shown
from recall_jax.methods.average import average
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Number, Parameters, Positive
from recall_jax.methods.weights import MergedUnits, Weighing
from recall_jax.similarity.compare import (
    Comparison,
    Reference,
    check_reference,
    check_representations,
    check_samples,
    check_sigma,
    compare_unit,
    parse_similarity,
)


class RecallParameters(Parameters):
    """Hold the parameters of `recall`: how models are compared, and weighed by similarity."""

    sigma: Positive | Literal["median", "dim"] = "median"
    temperature: Positive = 1.0
    reference: Annotated[int, Strict()] | str = "newest"
    similarity: str | dict[str, Positive] = "rbf"
    alignment: Literal["none", "center", "procrustes"] = "none"
    merged_units: MergedUnits = "all"
    threshold: Number | None = None

    @property
    def weighing(self) -> Weighing:
        """Return what the weights depend on besides the similarities."""
        return Weighing(self.temperature, self.merged_units, self.threshold)

    def renamed(self, names: Mapping[str, str]) -> Self:
        """Return the parameters with the reference renamed, if it is a name."""
        reference = names.get(str(self.reference), self.reference)
        return self.model_copy(update={"reference": reference})


def recall_comparison(parameters: RecallParameters, models: Sequence[str]) -> Comparison:
    """Return how `recall` compares the models of a recipe, with the reference as an index from 0.

    Raises InputError if the parameters do not fit the models.
    """
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


def prepare(merge: Merge[RecallParameters, Parameters]) -> Prepared:
    """Select the typical samples with the reference model, and return the rule that uses them.

    Raises UnfinishedError if the memory is too small, or an interrupted merge used other texts.
    """
    comparison = recall_comparison(merge.parameters, merge.names)
    reference = comparison.reference_index
    pooled = merge.walk.pooled(
        merge,
        len(merge.names) - 1 if reference is None else reference,
        lambda num_samples: check_samples(num_samples, comparison),
    )
    comparer = Comparer(pooled, comparison, merge.parameters.weighing, merge.walk.units)
    return pooled.to_prepared(Rule(comparer.values, comparer.findings), reference)


class _UnitFinding(NamedTuple):
    similarity: np.ndarray  # (K,)
    sigma: np.ndarray  # ()
    weights: np.ndarray  # (K,)
    newest: np.ndarray  # (n, E), the newest model's pooled states


class Comparer:
    """Advance all models through each unit, compare them, and weigh them, in one walk."""

    def __init__(
        self,
        pooled: PooledStates,
        comparison: Comparison,
        weighing: Weighing,
        tensors: Mapping[str, Sequence[str]],
    ) -> None:
        """Begin before the first unit; `tensors` are the names of the merged tensors by unit."""
        self._pooled = pooled
        self._comparison = comparison
        self._weighing = weighing
        self._tensors = tensors
        self._found: list[_UnitFinding] = []

    def values(self, unit: str, placed: Any) -> dict[str, Values]:
        """Return the models' weights (K,) in the next unit, for each of its tensors."""
        reps = self._pooled.advance(unit, placed)
        similarity, sigma = compare_unit(jnp.asarray(reps), self._comparison)
        check_sigma(sigma, self._comparison, [unit])
        weights = np.asarray(
            self._weighing.weights(
                similarity,
                unit=list(self._tensors).index(unit),
                num_units=len(self._tensors),
                reference=self._comparison.reference_index,
            )
        )
        found = _UnitFinding(np.asarray(similarity), np.asarray(sigma), weights, reps[-1])
        self._found.append(found)
        return {name: {"weight": weights} for name in self._tensors[unit]}

    def findings(self) -> Findings:
        """Return the findings of the walk, after its last unit."""
        similarity, sigma, weights, newest = zip(*self._found, strict=True)
        return Findings(
            weights=np.stack(weights, axis=1),
            similarity=np.stack(similarity, axis=1),
            sigma=np.stack(sigma) if self._comparison.takes_sigma else None,
            adjacent=adjacent_similarities(newest, np.stack(sigma), self._comparison),
        )


def compare_representations(
    reps: np.ndarray, comparison: Comparison, weighing: Weighing, *, units: list[str]
) -> Findings:
    """Return RECALL's weights for representations in memory: `reps` (K, U, n, E) float32.

    Raises InputError if shapes do not fit, or a unit has no bandwidth.
    """
    check_representations(reps, comparison)
    # One unit at a time, as in the streamed engine, so that the same program gives equal bits.
    by_unit = [
        compare_unit(jnp.asarray(unit, jnp.float32), comparison) for unit in reps.swapaxes(0, 1)
    ]
    similarity = np.stack([unit.similarity for unit in by_unit], axis=1)
    sigma = np.stack([unit.sigma for unit in by_unit])
    check_sigma(sigma, comparison, units)
    return Findings(
        weights=np.stack(
            [
                weighing.weights(
                    similarity,
                    unit=index,
                    num_units=len(by_unit),
                    reference=comparison.reference_index,
                )
                for index, (similarity, _) in enumerate(by_unit)
            ],
            axis=1,
        ),
        similarity=similarity,
        sigma=sigma if comparison.takes_sigma else None,
        adjacent=adjacent_similarities(reps[-1], sigma, comparison),
    )


METHOD = Method(
    lambda parameters: average,
    parameters=RecallParameters,
    needs=Needs(models=2, samples="newest", observes=frozenset({Observation.POOLED}), by_unit=True),
    prepare=prepare,
    check=recall_comparison,
    weighs_units=True,
    equation="θ = Σₖ wₖ θₖ, in each unit",
)
