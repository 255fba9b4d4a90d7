"""A merge method of your own: the median of the models, element by element.

Run `recall merge recipe.yml merged --plugin examples/own_method.py` with a recipe that says
`merge_method: median`. What it declares is all there is: recipes, memory plans, meshes, reports and
`recall continual` take it like any other method.
"""

import jax.numpy as jnp

from recall_jax.engine.needs import Needs
from recall_jax.methods.method import Method
from recall_jax.methods.parameters import Parameters, ParameterValue
from recall_jax.methods.task_vectors import add_to_base


class MedianParameters(Parameters):
    """How far to go from the newest model towards the median; a number, a gradient or filters."""

    by_tensor = ("strength",)
    strength: ParameterValue = 1.0


def median(models, values, *, base, reference, dtype):
    """X_N + strength (median of X_k - X_N), in float32, rounded once to `dtype`."""
    newest = models[reference].astype(jnp.float32)
    middle = jnp.median(jnp.stack([model.astype(jnp.float32) for model in models]), axis=0)
    return add_to_base(models[reference], values["strength"] * (middle - newest), dtype)


METHODS = {
    "median": Method(
        lambda parameters: median,
        parameters=MedianParameters,
        needs=Needs(models=2),
        equation="θ = θ_N + strength (median θₖ − θ_N)",
    )
}
