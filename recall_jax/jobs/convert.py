"""Convert checkpoints between formats, and describe them.

Tensors are preserved bit for bit unless a dtype is given.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from recall_jax.checkpoint.companions import CONFIG_NAME, copy_companions
from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.lora import read_adapter
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG, base_of
from recall_jax.checkpoint.npz import NPZ_NAME, NpzTree, write_npz
from recall_jax.checkpoint.orbax import is_orbax, load_orbax, save_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.ties import is_tied
from recall_jax.checkpoint.units import stacks_of
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.configs import check_configs
from recall_jax.engine.inputs import common_architecture
from recall_jax.engine.plan import in_forward_order, plan_merge, units_of
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.files.json_objects import read_json_object
from recall_jax.files.output import output_folder
from recall_jax.models.architecture import LAYERS
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax, to_flax
from recall_jax.models.shapes import check_sizes


def convert(
    source: str,
    out: Path,
    to: str,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    ignore_config: Collection[str] = (),
    untie: bool = False,
) -> list[str]:
    """Convert the model `source` into the folder `out`, and return warnings for the user.

    `source` is any model that a recipe can name, including .bin weights and adapters, or a folder
    with a tree that this function wrote. "huggingface" writes safetensors; "orbax" and "npz" write
    the Flax tree {"embed", "layers" stacked on axis 0, "head"}. With `untie`, a tied output head is
    written as a separate tensor. Raises InputError for a source that is neither, for an unknown
    architecture (trees only), and if there is nothing to untie.
    """
    if to not in ("huggingface", "orbax", "npz"):
        raise InputError(f"cannot convert to {to!r}: use huggingface, orbax or npz")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    out_dtype = None if dtype is None else DTYPES[dtype]
    model = _open(source, ignore_config)
    if untie:
        model.untie()
    known = to != "huggingface" or isinstance(model, _TreeModel)
    arch = common_architecture([model], ignore_config) if known else None
    check_configs([model], ignore_config)
    specs = plan_merge(Inputs([model]), out_dtype=dtype).specs
    inputs = [model.folder, *model.tokenizer_folders]
    with output_folder(out, force=force, inputs=inputs) as hidden:
        warnings = copy_companions(
            model.folder,
            hidden,
            config=model.config,
            tokenizers=model.tokenizer_folders,
            dtype=out_dtype,
        )
        checksums = {}
        arrays = ((name, _cast(name, model.read(name), spec)) for name, spec in specs.items())
        if arch is not None and to == "orbax":
            save_orbax(hidden, to_flax(arch, dict(arrays)))
        elif arch is not None and to == "npz":
            leaves = flatten_dict(to_flax(arch, dict(arrays)), sep="/")
            write_npz(hidden / NPZ_NAME, leaves.items())
        else:
            with ShardedWriter(hidden, specs, shard_bytes) as writer:
                for name, array in arrays:
                    writer.write(name, array)
            checksums = dict(writer.checksums)
        write_checksums(hidden, checksums)
    return [*model.warnings, *warnings]


class _TreeModel:
    """Read a tree in our layout as a checkpoint with Hugging Face names, completely in memory."""

    def __init__(self, folder: Path, tree: Any, ignore_config: Collection[str]) -> None:
        path = folder / CONFIG_NAME
        self.name, self.folder, self.tokenizer_folders = str(folder), folder, (folder,)
        self.config = read_json_object(path)
        shapes = {str(index): np.shape(leaf) for index, leaf in enumerate(jax.tree.leaves(tree))}
        blocks = jax.tree.leaves(tree.get(LAYERS) if isinstance(tree, Mapping) else None)
        stacked = [np.shape(leaf)[0] for leaf in blocks if np.size(leaf) and np.ndim(leaf)]
        check_sizes(self.config, shapes, str(path), most_layers=max(stacked, default=0))
        arch = read_architecture(self.config, ignore=ignore_config, where=str(path))
        try:
            self._tensors = from_flax(arch, tree)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(
                f"{folder}: its tree is not that of the {arch.family} model of its config "
                f"({type(error).__name__}: {error})"
            ) from error
        stored = sum(np.size(leaf) for leaf in jax.tree.leaves(tree))
        if stored != (known := sum(array.size for array in self._tensors.values())):
            raise InputError(
                f"{folder}: its tree holds {stored:,} numbers, and the {arch.family} model of its "
                f"config {known:,}: they do not belong together"
            )
        self.specs = {name: TensorSpec(a.dtype, a.shape) for name, a in self._tensors.items()}
        self.stored = self.specs
        self.warnings: list[str] = []
        self.bytes_read = sum(spec.nbytes for spec in self.specs.values())

    def read(self, name: str) -> np.ndarray:
        return self._tensors[name]

    def read_rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Return rows `start` to `stop` of a tensor, as `TensorSource.read_rows` does."""
        return np.atleast_1d(self._tensors[name])[start:stop]

    def drop(self, name: str) -> None:
        """Do nothing: the tree is in memory."""

    def untie(self) -> None:
        """Raise InputError: whether a tree's head is tied is fixed by its config."""
        raise InputError(f"{self.name} is a tree: convert it to huggingface before --untie")


def _open(source: str, ignore_config: Collection[str]) -> Checkpoint | _TreeModel:
    folder = Path(source)
    if folder.is_dir() and is_orbax(folder):
        return _TreeModel(folder, load_orbax(folder), ignore_config)
    if (folder / NPZ_NAME).is_file():
        file = NpzTree(source, folder / NPZ_NAME)
        leaves = {name: file.read(name) for name in file.specs}
        return _TreeModel(folder, unflatten_dict(leaves, sep="/"), ignore_config)
    return open_checkpoint(source)


def _cast(name: str, array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """Cast the array to the dtype of `spec`; InputError if a value overflows."""
    if array.dtype == spec.dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(spec.dtype)
    if (np.isfinite(cast) != np.isfinite(array)).any():
        raise InputError(f"tensor {name} overflows {spec.dtype}: choose a wider dtype")
    return cast


def describe_adapter(folder: Path) -> dict[str, object]:
    """Describe an adapter by JSON values: its base, ranks, targets and sizes.

    The base is not read. Raises InputError for an adapter that cannot be folded into a base.
    """
    adapter = read_adapter(folder)
    base, revision = base_of(folder / ADAPTER_CONFIG)
    modules: dict[str, list[str]] = {}
    for module in adapter.updates:
        modules.setdefault(module.rpartition(".")[2], []).append(module)
    specs = adapter.file.specs

    def described(names: Collection[str]) -> dict[str, object]:
        factors = [specs[key] for name in names for key in adapter.updates[name].values()]
        return {
            "modules": len(names),
            "ranks": sorted({adapter.config.rank(name) for name in names}),
            "parameters": sum(math.prod(spec.shape) for spec in factors),
            "bytes": sum(spec.nbytes for spec in factors),
        }

    return {
        "adapter": str(folder),
        "base_model": base,
        "revision": revision,
        "rank": adapter.config.r,
        "alpha": adapter.config.lora_alpha,
        "use_rslora": adapter.config.use_rslora,
        "use_dora": adapter.config.use_dora,
        "targets": {target: described(names) for target, names in modules.items()},
        "saved": list(adapter.saved),
        "parameters": sum(math.prod(spec.shape) for spec in specs.values()),
        "bytes": sum(spec.nbytes for spec in specs.values()),
        "dtypes": sorted({spec.dtype.name for spec in specs.values()}),
    }


def describe_checkpoint(
    model: Checkpoint, ignore_config: Collection[str] = ()
) -> dict[str, object]:
    """Describe a model by JSON values: family, layer stacks, units, sizes, dtypes, adapters."""
    specs = in_forward_order(model.stored)
    units = {
        unit: {
            "tensors": len(names),
            "parameters": sum(int(np.prod(specs[name].shape)) for name in names),
            "bytes": sum(specs[name].nbytes for name in names),
            "dtypes": sorted({specs[name].dtype.name for name in names}),
        }
        for unit, names in units_of(specs).items()
    }
    try:
        common_architecture([model], ignore_config)
        note = None
    except InputError as error:
        note = str(error)
    if model.quantised is not None:
        note = f"{model.name} is quantised ({model.quantised})"
    return {
        "model": model.name,
        "folder": str(model.folder),
        "model_type": model.config.get("model_type"),
        "recall_can_run": note is None,
        "why_not": note,
        "parameters": sum(int(np.prod(spec.shape)) for spec in specs.values()),
        "bytes": model.nbytes,
        "dtypes": sorted({spec.dtype.name for spec in specs.values()}),
        "tied": is_tied(model.stored, model.config),
        "adapters": [str(adapter) for adapter in model.adapters],
        "warnings": model.warnings,
        "stacks": list(stacks_of(model.specs)),
        "quantised": model.quantised,
        "units": units,
    }
