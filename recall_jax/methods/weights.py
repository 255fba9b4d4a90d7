"""Compute and check the weights of K models in each unit."""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError, shown

MergedUnits = Literal["all", "first", "middle", "last"]
_THIRDS = ("first", "middle", "last")


def layer_weights(similarity: jax.Array | np.ndarray, *, temperature: float = 1.0) -> jax.Array:
    """Return RECALL's weights: softmax over the models of S / temperature (arXiv:2510.20479).

    `similarity` is (K, U) or (K,); the result has its shape, float32, and sums to 1 over K. Raises
    InputError unless temperature > 0.
    """
    if not np.float32(temperature) > 0:
        raise InputError(
            f"temperature is {temperature}: give a number above 0 that float32 can hold"
        )
    return _softmax(jnp.asarray(similarity, jnp.float32), np.float32(temperature))


def check_weights(weights: jax.Array | np.ndarray, num_models: int) -> np.ndarray:
    """Return weights as float32 (K, U); raises InputError unless they fit `num_models` models."""
    array = np.asarray(weights, np.float32)
    if array.ndim != 2 or len(array) != num_models:
        raise InputError(
            f"weights have shape {array.shape}, but there are {num_models} models: give (K, U)"
        )
    if not np.isfinite(array).all():
        raise InputError("weights hold NaN or infinity: give finite numbers")
    if not np.allclose(array.sum(axis=0), 1.0, atol=1e-5):
        raise InputError("weights must sum to 1 over the models in every unit")
    return array


@dataclass(frozen=True)
class Weighing:
    """Set how RECALL turns similarities into weights, and which units stay the newest model's.

    All units are merged, or the `first`, `middle` or `last` third of them; and of these only units
    in which the models other than the reference have a mean similarity of at least `threshold`.
    """

    temperature: float = 1.0
    merged_units: MergedUnits = "all"
    threshold: float | None = None

    def __post_init__(self) -> None:
        """Raise InputError unless `merged_units` is known."""
        if self.merged_units not in ("all", *_THIRDS):
            known = ", ".join(("all", *_THIRDS))
            raise InputError(f"merged_units is {shown(self.merged_units)}: choose from {known}")

    def weights(
        self, similarity: jax.Array, *, unit: int, num_units: int, reference: int | None
    ) -> jax.Array:
        """Return weights (K,) float32 of the models in unit `unit` of `num_units`, from S (K,).

        They are those of `layer_weights`, or all weight on the last model if the unit is not
        merged. `reference` is None for pairwise comparison. Raises InputError unless temperature >
        0.
        """
        weights = layer_weights(similarity, temperature=self.temperature)
        if self._merges(np.asarray(similarity), unit, num_units, reference):
            return weights
        return jnp.zeros_like(weights).at[-1].set(1)

    def _merges(
        self, similarity: np.ndarray, unit: int, num_units: int, reference: int | None
    ) -> bool:
        if self.merged_units != "all":
            third = _THIRDS.index(self.merged_units)
            if not round(third * num_units / 3) <= unit < round((third + 1) * num_units / 3):
                return False
        others = similarity if reference is None else np.delete(similarity, reference)
        return self.threshold is None or bool(others.mean() >= self.threshold)


@jax.jit  # one program instead of one per operation
def _softmax(scores: jax.Array, temperature: jax.Array) -> jax.Array:
    # Subtract the largest before dividing, which could overflow; softmax does not change.
    relative = scores - jnp.max(scores, axis=0, keepdims=True)
    return jax.nn.softmax(relative / temperature, axis=0)
