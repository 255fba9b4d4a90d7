"""A method that looks at pooled states: a model weighs the more, the smaller its states are."""

import numpy as np

from recall_jax.engine.findings import Findings
from recall_jax.engine.merge import Rule
from recall_jax.engine.needs import Needs, Observation
from recall_jax.methods.average import average
from recall_jax.methods.method import Method


def prepare(merge):
    """Weigh each unit by the inverse mean norm of its pooled states."""
    pooled = merge.walk.pooled(merge, len(merge.names) - 1, lambda num_samples: None)
    found = []

    def values(unit, placed):
        states = pooled.advance(unit, placed)  # (K, n, E)
        inverse = 1 / np.linalg.norm(states, axis=-1).mean(axis=1)
        found.append(np.asarray(inverse / inverse.sum(), np.float32))
        return {name: {"weight": found[-1]} for name in merge.walk.units[unit]}

    return pooled.to_prepared(Rule(values, lambda: Findings(np.stack(found, axis=1))))


METHODS = {
    "norm_weighted": Method(
        lambda parameters: average,
        needs=Needs(
            models=2, samples="newest", observes=frozenset({Observation.POOLED}), by_unit=True
        ),
        prepare=prepare,
        equation="θ = Σₖ wₖ θₖ, wₖ ~ 1 / ‖hidden states‖",
    )
}
