"""Plan a merge: its tensors, their order and dtypes, and the models that they are read from."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from recall_jax.checkpoint.dtypes import DTYPES, is_float
from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.parameter_names import match_names
from recall_jax.checkpoint.tensors import TensorSource, TensorSpec
from recall_jax.checkpoint.ties import is_tied
from recall_jax.checkpoint.units import EMBED, HEAD, unit_of_tensor
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError, some


class NamedModel(TensorSource, Protocol):
    """Describe a source of tensors with the name that the user gave it, for messages."""

    @property
    def name(self) -> str:
        """Return the name as the user wrote it."""


class StoredModel(NamedModel, Protocol):
    """Describe a model that may be read in wider dtypes than it is stored in."""

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """Return the specs of its tensors in their stored dtypes, in which they are written."""


class ConfiguredModel(StoredModel, Protocol):
    """Describe a model with its config."""

    @property
    def config(self) -> Mapping[str, Any]:
        """Return the content of config.json, with the changes that adapters make."""


@dataclass(frozen=True)
class MergePlan:
    """Hold the output tensors of a merge, in the order of the units, and the input models.

    If `larger_than_memory`, inputs are dropped from the system's cache once the walk is past them.
    """

    inputs: Inputs[NamedModel]
    specs: Mapping[str, TensorSpec]
    larger_than_memory: bool = False

    @property
    def units(self) -> dict[str, list[str]]:
        """Return the tensor names of each unit, in the order of the forward pass."""
        return units_of(self.specs)


def units_of(specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Return the tensor names of each unit, in the order of `specs`."""
    units: dict[str, list[str]] = {}
    for name in specs:
        units.setdefault(unit_of_tensor(name), []).append(name)
    return units


def open_inputs(models: Sequence[str], base: str | None) -> Inputs[Checkpoint]:
    """Open the models and the base that the user names; otherwise as `open_models`."""
    if base is None:
        return Inputs(open_models(models))
    opened = open_models([base, *models])
    return Inputs(opened[1:], opened[0])


def open_models(specs: Sequence[str]) -> list[Checkpoint]:
    """Open the models that the user names, in order; the last is the newest.

    If names differ by a prefix, tensors are renamed as in the newest model. Raises InputError
    unless all models have one model type, and all or none tie their embeddings.
    """
    models = [open_checkpoint(spec) for spec in specs]
    newest = models[-1]
    for model in models:
        model.rename(match_names(model.specs, newest.specs))
        expected, found = newest.config.get("model_type"), model.config.get("model_type")
        if found != expected:
            raise InputError(
                f"{model.name} is a {found} model and {newest.name} a {expected} model: "
                "merge models of one family"
            )
        tied = is_tied(model.stored, model.config)
        if tied != is_tied(newest.stored, newest.config):
            one, other = (model, newest) if tied else (newest, model)
            raise InputError(
                f"{one.name} ties its output head to the embedding (tie_word_embeddings), and "
                f"{other.name} has a head of its own: merge models of one kind, such as what "
                f"recall convert --untie makes of {one.name}"
            )
    return models


def in_forward_order(specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
    """Return the specs in the order of their units in the forward pass."""
    return dict(sorted(specs.items(), key=lambda item: _unit_rank(unit_of_tensor(item[0]))))


def plan_merge(inputs: Inputs[StoredModel], *, out_dtype: str | None) -> MergePlan:
    """Plan to merge all tensors of the newest model, in the order of the units.

    `out_dtype` is the dtype of floating point tensors, by default that in which the newest model
    stores each tensor. Raises InputError if the models' tensors differ in name or shape, or in
    integer values, which cannot be averaged and are compared here.
    """
    newest = inputs.newest
    for model in inputs.all[:-1]:
        _check_same_tensors(model, newest)
    dtype = DTYPES[out_dtype] if out_dtype else None
    specs = {
        name: TensorSpec(dtype if dtype and is_float(spec.dtype) else spec.dtype, spec.shape)
        for name, spec in in_forward_order(newest.stored).items()
    }
    return MergePlan(inputs, specs)


def _check_same_tensors(model: StoredModel, newest: StoredModel) -> None:
    name, specs, expected = model.name, model.stored, newest.stored
    only_here = [tensor for tensor in specs if tensor not in expected]
    only_there = [tensor for tensor in expected if tensor not in specs]
    if only_here or only_there:
        raise InputError(
            f"the models have different tensors: only {name} has {_some(only_here)}; "
            f"only {newest.name} has {_some(only_there)}"
        )
    for tensor, spec in specs.items():
        other = expected[tensor]
        if spec.shape != other.shape:
            hint = " (different vocabularies?)" if unit_of_tensor(tensor) in (EMBED, HEAD) else ""
            raise InputError(
                f"tensor {tensor} has shape {list(spec.shape)} in {name} and "
                f"{list(other.shape)} in {newest.name}{hint}: merge models of one shape"
            )
        if is_float(spec.dtype) != is_float(other.dtype):
            raise InputError(
                f"tensor {tensor} is {spec.dtype.name} in {name} and {other.dtype.name} in "
                f"{newest.name}: integers cannot be merged with floats"
            )
        if not is_float(spec.dtype) and not np.array_equal(model.read(tensor), newest.read(tensor)):
            raise InputError(
                f"tensor {tensor}, {other.dtype.name}, is not the same in {name} and "
                f"{newest.name}: integers cannot be averaged, and pass only where all models agree"
            )


def _unit_rank(unit: str) -> float:
    """Return the position of a unit in the forward pass."""
    if unit == EMBED:
        return -1
    return float("inf") if unit == HEAD else int(unit.rpartition(".")[2])


def full_tensor_names(
    selects: Callable[[str, TensorSpec], bool], specs: Mapping[str, TensorSpec]
) -> set[str]:
    """Return the names of the tensors that a method's `Needs.full_tensors` selects."""
    return {name for name, spec in specs.items() if selects(name, spec)}


def _some(names: Sequence[str]) -> str:
    return some(names, 3) or "none"
