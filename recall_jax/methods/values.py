"""The kernel's values for every tensor, as the recipe's parameters give them."""

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
    """Return the values that parameters give for every tensor, float32.

    (K,) of those of each model, where it has none those of all; () of the others. In a method
    without weights all models weigh the same; `weights` (K,) of each unit stand in for those of the
    recipe. Raises InputError where a model has no value.
    """
    own = entries[0].parameters.by_tensor
    values: dict[str, Values] = {}
    for name, depth in depths(specs).items():
        at: dict[str, Any] = {"weight": np.full(len(entries), 1 / len(entries))}
        if weights is not None:
            at["weight"] = weights[unit_of_tensor(name)]
        for key in own if weights is None else set(own) - {"weight"}:
            row = [_value(entry, parameters, key, name, depth) for entry in entries]
            at[key] = np.asarray(row, np.float64)
        for key in parameters.by_tensor:
            found = parameter_at(getattr(parameters, key), name, depth)
            if found is None:
                key = key.removesuffix("_")  # as a recipe names what is a word of Python
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
    """Return the rule whose values the recipe's parameters give, or `weights` (K,) of each unit."""
    specs, parameters = merge.walk.specs, merge.parameters
    values = tensor_values(parameters, merge.entries.models, specs, weights)
    shares = {name: parameters.shares(values[name]) for name in values}
    return Prepared(values_by_tensor(values, shares, specs), merging_bytes(merge.walk))


def _value(
    entry: Entry[Parameters], parameters: Parameters, key: str, tensor: str, depth: float
) -> float:
    """A model's parameter for one tensor: its own, else the recipe's."""
    choices: list[ParameterValue | None]
    choices = [getattr(entry.parameters, key), getattr(parameters, key)]
    for value in choices:
        if value is not None and (found := parameter_at(value, tensor, depth)) is not None:
            return found
    raise InputError(f"model {entry.model} has no {key} for {tensor}: give it parameters.{key}")
