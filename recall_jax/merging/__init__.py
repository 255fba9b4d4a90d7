"""Merging: similarities to weights, and the methods that turn K parameters into one."""

from recall_jax.merging.average import weighted_average, weighted_sum
from recall_jax.merging.methods import METHODS, Method
from recall_jax.merging.trees import merge_trees, unit_of_path
from recall_jax.merging.weights import layer_weights

__all__ = [
    "METHODS",
    "Method",
    "layer_weights",
    "merge_trees",
    "unit_of_path",
    "weighted_average",
    "weighted_sum",
]
