"""A method that looks at what linear layers read: each column weighs as its input does."""

from functools import partial

import jax.numpy as jnp
import numpy as np

from recall_jax.engine.findings import Findings
from recall_jax.engine.linear_inputs import prepare_linear_inputs
from recall_jax.engine.needs import Needs, Observation, linear_weights
from recall_jax.methods.average import weighted_average
from recall_jax.methods.method import Method


def column_weighted(models, values, *, base, reference, dtype):
    """Weigh column j of model k by its mean squared input, the diagonal of its `gram`."""
    if "gram" not in values:
        weights = jnp.full(len(models), 1 / len(models), jnp.float32)
    else:
        squares = jnp.diagonal(values["gram"], axis1=1, axis2=2) + 1e-6  # (K, in)
        weights = (squares / jnp.sum(squares, axis=0, keepdims=True))[:, None, :]
    return weighted_average(models, weights, reference=reference, dtype=dtype)


def prepare(merge):
    """Give each linear layer's tensor its `gram`, and all others nothing."""
    units, num_models = merge.walk.units, len(merge.names)

    def values(unit, grams):
        return {name: {"gram": grams[name]} if name in grams else {} for name in units[unit]}

    equal = np.full((num_models, len(units)), 1 / num_models)
    return prepare_linear_inputs(merge, values, partial(Findings, equal))


METHODS = {
    "column_weighted": Method(
        lambda parameters: column_weighted,
        needs=Needs(
            models=2,
            samples="each",
            observes=frozenset({Observation.LINEAR_INPUTS}),
            full_tensors=linear_weights,
            scratch=3,
        ),
        prepare=prepare,
        equation="θ = Σₖ wₖ θₖ, w of each input of a linear layer",
    )
}
