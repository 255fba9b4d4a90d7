"""RECALL's rule in the streamed engine: compare the models unit by unit, and weigh them."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from recall_jax.engine.findings import Findings, adjacent_similarities
from recall_jax.engine.forward import HiddenStates, Placed
from recall_jax.engine.layout import Forward
from recall_jax.engine.rules import Values
from recall_jax.methods.weights import Weighing
from recall_jax.similarity.compare import Comparison, check_sigma, compare_unit


class _UnitFinding(NamedTuple):
    similarity: np.ndarray  # (K,)
    sigma: np.ndarray  # ()
    weights: np.ndarray  # (K,)
    newest: np.ndarray  # (n, E), the newest model's pooled states


class Comparer:
    """RECALL's rule: advance every model through a unit, compare, weigh. Lives for one walk."""

    def __init__(
        self,
        forward: Forward,
        models: Sequence[str],
        comparison: Comparison,
        weighing: Weighing,
        tensors: Mapping[str, Sequence[str]],
    ) -> None:
        """`forward` holds the typical samples; the models, named here, come unit by unit.

        `tensors` are the names of those to be merged, by unit.
        """
        self._forward = forward
        self._comparison = comparison
        self._weighing = weighing
        self._models = models
        self._tensors = tensors
        self._states: Sequence[HiddenStates] = ()
        self._found: list[_UnitFinding] = []

    def values(self, unit: str, placed: Placed) -> dict[str, Values]:
        """The weights (K,) of the models in `unit`, as the forward has placed it."""
        self._states, reps = self._forward.advance(unit, placed, self._states, self._models)
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
        """What the walk found, after its last unit."""
        similarity, sigma, weights, newest = zip(*self._found, strict=True)
        return Findings(
            weights=np.stack(weights, axis=1),
            similarity=np.stack(similarity, axis=1),
            sigma=np.stack(sigma) if self._comparison.takes_sigma else None,
            adjacent=adjacent_similarities(newest, np.stack(sigma), self._comparison),
        )
