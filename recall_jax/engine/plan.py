"""The plan of a merge: which tensors, in which order, of which dtype, from which models."""

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
    """A model with the name that the user gave it, for messages."""

    @property
    def name(self) -> str:
        """As the user wrote it."""


class StoredModel(NamedModel, Protocol):
    """A model that may be read in wider dtypes than it is stored in."""

    @property
    def stored(self) -> Mapping[str, TensorSpec]:
        """The specs of its tensors in the dtypes in which it is written again."""


class ConfiguredModel(StoredModel, Protocol):
    """A model with its config."""

    @property
    def config(self) -> Mapping[str, Any]:
        """As config.json holds it, adapters taken into account."""


@dataclass(frozen=True)
class MergePlan:
    """What is merged: the output tensors in the order of the units, and where they are read from.

    Inputs `larger_than_memory` are not left in the system's cache behind the walk.
    """

    inputs: Inputs[NamedModel]
    specs: Mapping[str, TensorSpec]
    larger_than_memory: bool = False

    @property
    def units(self) -> dict[str, list[str]]:
        """Tensor names by unit, in the order of the forward pass."""
        return units_of(self.specs)


def units_of(specs: Mapping[str, TensorSpec]) -> dict[str, list[str]]:
    """Tensor names by unit, in the order of `specs`."""
    units: dict[str, list[str]] = {}
    for name in specs:
        units.setdefault(unit_of_tensor(name), []).append(name)
    return units


def open_models(specs: Sequence[str]) -> list[Checkpoint]:
    """Open models as the user names them, all of one model type; the last is the newest.

    Where names differ by a prefix, tensors of all are called as in the newest.
    """
    models = [open_checkpoint(spec) for spec in specs]
    newest = models[-1]
    for model in models:
        model.rename(match_names(model.specs, newest.specs))
        mine, its = newest.config.get("model_type"), model.config.get("model_type")
        if mine != its:
            raise InputError(
                f"{model.name} is a {its} model and {newest.name} a {mine} model: "
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
    """The tensors in the order of their units in the forward pass."""
    return dict(sorted(specs.items(), key=lambda item: _unit_rank(unit_of_tensor(item[0]))))


def plan_merge(inputs: Inputs[StoredModel], *, out_dtype: str | None) -> MergePlan:
    """Plan to merge all tensors of the newest model, in the order of the units.

    `out_dtype` is for floating point tensors; by default each keeps its dtype as stored in the
    newest model. Raises InputError where the models' tensors differ in name or shape, or in what
    cannot be averaged: integers are read here.
    """
    newest = inputs.newest
    for model in inputs.all[:-1]:
        _check_alike(model, newest)
    dtype = DTYPES[out_dtype] if out_dtype else None
    specs = {
        name: TensorSpec(dtype if dtype and is_float(spec.dtype) else spec.dtype, spec.shape)
        for name, spec in in_forward_order(newest.stored).items()
    }
    return MergePlan(inputs, specs)


def _check_alike(model: StoredModel, newest: StoredModel) -> None:
    name, specs, expected = model.name, model.stored, newest.stored
    only_here = [tensor for tensor in specs if tensor not in expected]
    only_there = [tensor for tensor in expected if tensor not in specs]
    if only_here or only_there:
        raise InputError(
            f"the models have different tensors: only {name} has {_some(only_here)}; "
            f"only {newest.name} has {_some(only_there)}"
        )
    for tensor, spec in specs.items():
        its = expected[tensor]
        if spec.shape != its.shape:
            hint = " (different vocabularies?)" if unit_of_tensor(tensor) in (EMBED, HEAD) else ""
            raise InputError(
                f"tensor {tensor} has shape {list(spec.shape)} in {name} and "
                f"{list(its.shape)} in {newest.name}{hint}: merge models of one shape"
            )
        if is_float(spec.dtype) != is_float(its.dtype):
            raise InputError(
                f"tensor {tensor} is {spec.dtype.name} in {name} and {its.dtype.name} in "
                f"{newest.name}: integers cannot be merged with floats"
            )
        if not is_float(spec.dtype) and not np.array_equal(model.read(tensor), newest.read(tensor)):
            raise InputError(
                f"tensor {tensor}, {its.dtype.name}, is not the same in {name} and {newest.name}: "
                "integers cannot be averaged, and pass only where all models agree"
            )


def _unit_rank(unit: str) -> float:
    """Place of a unit in the forward pass."""
    if unit == EMBED:
        return -1
    return float("inf") if unit == HEAD else int(unit.rpartition(".")[2])


def full_tensor_names(
    whole: Callable[[str, TensorSpec], bool], specs: Mapping[str, TensorSpec]
) -> set[str]:
    """Return the names of the tensors that a method's `Needs.full_tensors` selects."""
    return {name for name, spec in specs.items() if whole(name, spec)}


def _some(names: Sequence[str]) -> str:
    return some(names, 3) or "none"
