"""Obtain the states for a similarity study: from models and a data file, or from arrays."""

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from recall_jax.checkpoint.units import layer_unit
from recall_jax.engine.inputs import common_architecture
from recall_jax.engine.plan import open_models
from recall_jax.errors import InputError, shown
from recall_jax.files.progress import Progress, silent
from recall_jax.inputs.settings import Samples
from recall_jax.jobs import stages
from recall_jax.similarity.study import ModelStates

_NUMBER = re.compile(r"\d{1,9}")
_RANGE = re.compile(rf"({_NUMBER.pattern})(?:-({_NUMBER.pattern}))?$")
_NAMES = ("rows", "units", "models")


def states_of_models(
    specs: Sequence[str],
    samples: Samples,
    *,
    dtype_name: str | None = None,
    ignore_config: Collection[str] = (),
    ignore_tokenizers: bool = False,
    memory: int | None = None,
    progress: Progress = silent,
) -> tuple[list[ModelStates], np.ndarray]:
    """Return the pooled states of all units of the models, and the data rows (n,).

    Models of one architecture share the last one's tokenizer; if their architectures differ, each
    tokenises the same rows itself. Raises InputError for faults of the models or the samples.
    """
    architectures = {common_architecture(open_models([spec]), ignore_config) for spec in specs}
    share_tokenizer = len(architectures) == 1
    found = [
        stages.extract(
            some,
            samples,
            dtype_name=dtype_name,
            ignore_config=ignore_config,
            ignore_tokenizers=ignore_tokenizers,
            memory=memory,
            progress=progress,
        )
        for some in ([specs] if share_tokenizer else [[spec] for spec in specs])
    ]
    models = [
        ModelStates(name, one.units, states)
        for one in found
        for name, states in zip(one.models, one.reps, strict=True)
    ]
    return _with_distinct_names(models), found[0].rows


def read_states(path: Path) -> tuple[list[ModelStates], np.ndarray]:
    """Return the models and the data rows (n,) of an .npz file, in one of two forms.

    The file holds `reps` (K, U, n, E), optionally with `units`, `models` and `rows`; or named
    arrays (n, E) and (U, n, E), each a model, for the same n samples and of any width. Raises
    InputError for anything else, or for numbers that are not finite in float32.
    """
    arrays = stages.read_arrays(path)
    if "reps" in arrays and arrays["reps"].ndim == 4:
        return _from_reps(path, arrays)
    rows = arrays.pop("rows", None)
    if not arrays:
        raise InputError(f"{path} holds no arrays: give representations (n, E) or (U, n, E)")
    models = []
    for name, array in arrays.items():
        states = _checked(f"{path}: {name}", array, (2, 3))
        states = states[None] if states.ndim == 2 else states
        models.append(ModelStates(name, tuple(map(str, range(len(states)))), states))
    first = models[0]
    for model in models:
        if (count := model.states.shape[1]) != (expected := first.states.shape[1]):
            raise InputError(
                f"{path}: {model.name} has {count} samples and {first.name} {expected}: row i of "
                "all must be of the same sample"
            )
    return models, _rows(path, rows, first.states.shape[1])


def choose_units(models: Sequence[ModelStates], text: str) -> list[ModelStates]:
    """Reduce the models to the units that `text` names, in the order of the forward pass.

    `text` is `all`, or comma-separated names and layer numbers: `embed,layers.3,8-12,last,head`;
    `last` is the last layer. Raises InputError for a unit that one of the models does not have.
    """
    if text.strip() == "all":
        return list(models)
    return [_choose(model, [word.strip() for word in text.split(",")]) for model in models]


def _choose(model: ModelStates, words: Sequence[str]) -> ModelStates:
    indices = sorted({index for word in words for index in _indices(model, word)})
    return replace(
        model,
        units=tuple(model.units[index] for index in indices),
        states=model.states[indices],
        all_units=model.all_units and len(indices) == len(model.units),
    )


def _indices(model: ModelStates, word: str) -> Iterator[int]:
    """Yield the indices of the units that one word names."""
    names: Iterable[str] = [word]
    if word == "last":
        names = [model.body[-1]]
    elif (numbers := _RANGE.match(word)) is not None:
        first, last = int(numbers[1]), int(numbers[2] or numbers[1])
        if last < first:
            raise InputError(f"--layers {shown(word)}: write the lower number first")
        names = map(str, range(first, last + 1))
    for name in names:
        # A number is the index of a layer, or the name of a unit without another name.
        if _NUMBER.fullmatch(name) and layer_unit(int(name)) in model.units:
            name = layer_unit(int(name))
        if name not in model.units:
            raise InputError(
                f"--layers {shown(word)}: {model.name} has no unit {shown(name)}, only "
                f"{_listed(model.units)}"
            )
        yield model.units.index(name)


def _from_reps(path: Path, arrays: dict[str, np.ndarray]) -> tuple[list[ModelStates], np.ndarray]:
    """Return the models and rows of `reps` (K, U, n, E), such as `recall extract` writes."""
    if unknown := [name for name in arrays if name not in ("reps", *_NAMES)]:
        raise InputError(
            f"{path} holds {', '.join(unknown)} besides reps (K, U, n, E): give either that, with "
            f"{', '.join(_NAMES)}, or arrays (n, E) and (U, n, E)"
        )
    reps = _checked(f"{path}: reps", arrays["reps"], (4,))
    num_models, num_units, num_samples, _ = reps.shape
    numbered = [f"model {index}" for index in range(num_models)]
    names = _names(path, "models", arrays.get("models"), numbered)
    units = _names(path, "units", arrays.get("units"), [str(unit) for unit in range(num_units)])
    if len(set(units)) < len(units):
        raise InputError(f"{path}: two units have the same name")
    models = [
        ModelStates(name, tuple(units), states) for name, states in zip(names, reps, strict=True)
    ]
    return _with_distinct_names(models), _rows(path, arrays.get("rows"), num_samples)


def _checked(where: str, array: np.ndarray, dimensions: Collection[int]) -> np.ndarray:
    """Return the array in float32; InputError if it holds no states, or values not finite."""
    if array.dtype.kind not in "fiu" or array.ndim not in {*dimensions} or 0 in array.shape:
        raise InputError(
            f"{where} is {array.dtype} {array.shape}: give representations as numbers, (n, E) or "
            "(U, n, E), or reps (K, U, n, E)"
        )
    with np.errstate(over="ignore"):
        states = array.astype(np.float32)
    if not np.isfinite(states).all():
        raise InputError(
            f"{where} holds values that are not finite in float32: leave out the samples with them"
        )
    return states


def _names(path: Path, key: str, array: np.ndarray | None, default: list[str]) -> list[str]:
    if array is None:
        return default
    if array.dtype.kind != "U" or array.shape != (len(default),):
        raise InputError(
            f"{path}: {key} is {array.dtype} {array.shape}, and reps needs {len(default)} names"
        )
    return [str(name) for name in array]


def _rows(path: Path, array: np.ndarray | None, num_samples: int) -> np.ndarray:
    """Return the numbers of the data rows, by default counted from zero."""
    if array is None:
        return np.arange(num_samples)
    if array.dtype.kind not in "iu" or array.shape != (num_samples,):
        raise InputError(
            f"{path}: rows is {array.dtype} {array.shape}, and the states are of {num_samples} rows"
        )
    return array


def _with_distinct_names(models: Sequence[ModelStates]) -> list[ModelStates]:
    """Append a number to each name that several models have."""
    names = [model.name for model in models]
    return [
        replace(model, name=f"{model.name} ({names[: index + 1].count(model.name)})")
        if names.count(model.name) > 1
        else model
        for index, model in enumerate(models)
    ]


def _listed(units: Sequence[str]) -> str:
    if len(units) <= 6:
        return ", ".join(units)
    return f"{', '.join(units[:3])} … {', '.join(units[-2:])}"
