"""Convert Hugging Face tensors to Flax parameters and back, by transposes only: bits are kept.

The names come from the family's table; `shapes` defines which parameters a model has.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from recall_jax.checkpoint.units import EMBED, HEAD, LM_HEAD, unit_of_tensor
from recall_jax.errors import InputError, some
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.decoder import SAME_INPUTS
from recall_jax.models.families import FAMILIES
from recall_jax.models.shapes import group_shapes


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return the shape on disk of every parameter by Hugging Face name, in the units' order."""
    shapes: dict[str, tuple[int, ...]] = {}
    for unit in arch.units:
        group = unit if unit in (EMBED, HEAD) else LAYERS
        known = group_shapes(arch)[group]
        shapes |= {name: known[path] for name, path in _names(arch, unit)}
    return shapes


def unit_tensors(arch: Architecture, unit: str) -> tuple[str, ...]:
    """Return the Hugging Face names of the parameters of `unit`, without a tied lm_head."""
    return tuple(name for name, _ in _names(arch, unit))


def state_tensors(arch: Architecture, unit: str) -> tuple[str, ...]:
    """Return the `unit_tensors` that hidden states depend on: all but the output projection."""
    return tuple(name for name in unit_tensors(arch, unit) if name != LM_HEAD)


def linear_inputs(arch: Architecture, unit: str) -> dict[str, str]:
    """Map the weight of each linear layer of `unit` to the path of the layer's input.

    Weights have Hugging Face names; paths are those of `forward.block_with_inputs`, and "lm_head"
    for the output projection.
    """
    kernels = {
        name: path.removesuffix("/kernel")
        for name, path in _names(arch, unit)
        if path.endswith("/kernel")
    }
    return {name: SAME_INPUTS.get(path, path) for name, path in kernels.items()}


def flax_path(family: str, name: str) -> str:
    """Return the path of a parameter within its unit, such as "mlp/up_proj/kernel"."""
    unit = unit_of_tensor(name)
    group = unit if unit in (EMBED, HEAD) else LAYERS
    return FAMILIES[family].tensors[group][name.removeprefix(f"model.{unit}.")]


def unit_params(arch: Architecture, unit: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Build the Flax parameters of `unit` from Hugging Face arrays (numpy or jax).

    Can be traced, and copies no array. The output projection may be missing from `tensors`.
    """
    params: dict[str, Any] = {}
    for name, path in _names(arch, unit):
        if name == LM_HEAD and name not in tensors:
            continue
        *modules, leaf = path.split("/")
        place = functools.reduce(lambda node, key: node.setdefault(key, {}), modules, params)
        place[leaf] = _transposed(path, tensors[name])
    return params


def to_flax(arch: Architecture, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Build the full tree on the host in numpy: {"embed", "layers" stacked on axis 0, "head"}.

    Raises:
        InputError: if the tensors are not those of `arch`.
    """
    arrays = {name: np.asarray(array) for name, array in tensors.items()}
    check_tensors(arch, {name: array.shape for name, array in arrays.items()}, "tensors")
    embed, *layers, head = (unit_params(arch, unit, arrays) for unit in arch.units)
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    return {EMBED: embed, LAYERS: stacked, HEAD: head}


def from_flax(arch: Architecture, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Invert `to_flax`: return C-contiguous numpy arrays in the order of `tensor_shapes`."""
    leaves = {
        group: {path: np.asarray(leaf) for path, leaf in flatten_dict(tree[group], sep="/").items()}
        for group in (EMBED, LAYERS, HEAD)
    }
    tensors = {}
    for index, unit in enumerate(arch.units):
        for name, path in _names(arch, unit):
            outer = unit in (EMBED, HEAD)
            array = leaves[unit][path] if outer else leaves[LAYERS][path][index - 1]
            tensors[name] = np.ascontiguousarray(_transposed(path, array))
    return tensors


def check_tensors(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare the tensors in `where` with those that its config implies.

    The lm_head of a tied model is optional.

    Raises:
        InputError: if they differ; lists missing and unexpected tensors, and wrong shapes.
    """
    expected = tensor_shapes(arch)
    allowed = dict(expected)
    if arch.tie_word_embeddings:
        allowed[LM_HEAD] = (arch.vocab_size, arch.hidden_size)
    found = {name: tuple(shape) for name, shape in shapes.items()}
    faults = []
    if missing := [name for name in expected if name not in found]:
        faults.append(f"missing {some(missing)}")
    if extra := [name for name in found if name not in allowed]:
        faults.append(f"unexpected {some(extra)}")
    if wrong := [name for name in allowed if found.get(name, allowed[name]) != allowed[name]]:
        said = [f"{name} {found[name]} instead of {allowed[name]}" for name in wrong]
        faults.append(f"of another shape {some(said)}")
    if faults:
        hint = (
            "; this is a model saved without its head: save it with AutoModelForCausalLM"
            if missing == [LM_HEAD] and not extra and not wrong
            else f"; the tensors and the config do not belong to the same {arch.family} model"
        )
        raise InputError(f"{where}: " + "; ".join(faults) + hint)


def _names(arch: Architecture, unit: str) -> Iterator[tuple[str, str]]:
    """Yield (Hugging Face name, Flax path) for each parameter of `unit`."""
    group = unit if unit in (EMBED, HEAD) else LAYERS
    prefix = "" if group == unit else f"model.{unit}."
    for name, path in FAMILIES[arch.family].tensors[group].items():
        if path in group_shapes(arch)[group]:
            yield prefix + name, path


def _transposed(path: str, array: Any) -> Any:
    """Transpose a kernel between (out, in) on disk and (in, out) in Flax; others are unchanged."""
    return array.T if path.endswith("kernel") else array
