"""Compute the kernel's values for every tensor from the recipe's parameters."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import unit_of_tensor
from recall_jax.engine.kernel import Values
from recall_jax.engine.merge import (
    Entry,
    Merge,
    Prepared,
    depths,
    merging_bytes,
    values_by_tensor,
)
from recall_jax.errors import InputError
from recall_jax.methods.parameters import Parameters, ParameterValue, parameter_at


def tensor_values(
    parameters: Parameters,
    entries: Sequence[Entry[Parameters]],
    specs: Mapping[str, TensorSpec],
    weights: Mapping[str, np.ndarray] | None = None,
) -> dict[str, Values]:
    """Return the kernel's float32 values for every tensor, by name, from the parameters.

    Parameters of each model give (K,), with the recipe's value for models that have none; others
    give (). In a method without weights all models weigh the same; `weights` (K,) by unit replace
    those of the recipe. Raises InputError if a model has no value.
    """
    model_keys = entries[0].parameters.by_tensor
    values: dict[str, Values] = {}
    for name, depth in depths(specs).items():
        at: dict[str, Any] = {"weight": np.full(len(entries), 1 / len(entries))}
        if weights is not None:
            at["weight"] = weights[unit_of_tensor(name)]
        for key in model_keys if weights is None else set(model_keys) - {"weight"}:
            row = [_value(entry, parameters, key, name, depth) for entry in entries]
            at[key] = np.asarray(row, np.float64)
        for key in parameters.by_tensor:
            found = parameter_at(getattr(parameters, key), name, depth)
            if found is None:
                key = key.removesuffix("_")  # the name in recipes of a Python keyword
                raise InputError(f"parameters.{key} has no value for {name}: add one for *")
            at[key] = np.asarray(found, np.float64)
        values[name] = {
            key: value.astype(np.float32) if value.dtype == np.float64 else value
            for key, value in parameters.adjusted(at, name).items()
        }
    return values


def prepare_from_parameters(
    merge: Merge[Parameters, Parameters], weights: Mapping[str, np.ndarray] | None = None
) -> Prepared:
    """Return the rule of the values in the recipe's parameters, or of `weights` (K,) by unit."""
    specs, parameters = merge.walk.specs, merge.parameters
    values = tensor_values(parameters, merge.entries.models, specs, weights)
    shares = {name: parameters.shares(values[name]) for name in values}
    return Prepared(values_by_tensor(values, shares, specs), merging_bytes(merge.walk))


def _value(
    entry: Entry[Parameters], parameters: Parameters, key: str, tensor: str, depth: float
) -> float:
    """Return the parameter of a model for one tensor, by default the recipe's."""
    choices: list[ParameterValue | None]
    choices = [getattr(entry.parameters, key), getattr(parameters, key)]
    for value in choices:
        if value is not None and (found := parameter_at(value, tensor, depth)) is not None:
            return found
    raise InputError(f"model {entry.model} has no {key} for {tensor}: give it parameters.{key}")
