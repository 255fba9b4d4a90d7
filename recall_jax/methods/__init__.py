"""Merging: similarities to weights, and the methods that turn K parameters into one."""

from recall_jax.methods.average import weighted_average, weighted_sum
from recall_jax.methods.methods import METHODS, Method
from recall_jax.methods.trees import merge_trees, unit_of_path
from recall_jax.methods.weights import layer_weights

__all__ = [
    "METHODS",
    "Method",
    "layer_weights",
    "merge_trees",
    "unit_of_path",
    "weighted_average",
    "weighted_sum",
]
