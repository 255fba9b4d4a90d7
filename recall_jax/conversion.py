"""Checkpoints from one format to another, each tensor bit for bit unless a dtype is asked for."""

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from recall_jax.checkpoint.companions import CONFIG_NAME, copy_companions
from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.json_objects import read_json_object
from recall_jax.checkpoint.orbax import is_orbax, load_orbax, save_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.inputs import common_architecture
from recall_jax.engine.plan import DTYPES, is_float, units_of
from recall_jax.errors import InputError
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax, to_flax
from recall_jax.output import output_folder


def convert(
    source: str,
    out: Path,
    to: str,
    *,
    dtype: str | None = None,
    shard_bytes: int = DEFAULT_SHARD_BYTES,
    force: bool = False,
    ignore_config: Collection[str] = (),
) -> None:
    """Write the model `source` into `out`.

    `source` is any model a recipe can name, .bin weights and adapters included, or an Orbax folder
    written by this function. To "huggingface" gives safetensors; to "orbax" the Flax tree
    {"embed", "layers" stacked on axis 0, "head"}. Raises InputError for a source that is neither,
    or an architecture that is not known (Orbax only).
    """
    if to not in ("huggingface", "orbax"):
        raise InputError(f"cannot convert to {to!r}: use huggingface or orbax")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}: use {', '.join(DTYPES)}")
    wanted = None if dtype is None else DTYPES[dtype]
    folder = Path(source)
    if folder.is_dir() and is_orbax(folder):
        config = read_json_object(folder / CONFIG_NAME)
        arch = read_architecture(config, ignore=ignore_config, where=str(folder / CONFIG_NAME))
        tensors: Mapping[str, np.ndarray] = from_flax(arch, load_orbax(folder))
        specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
        read = tensors.__getitem__
        inputs = [folder]
    else:
        model = open_checkpoint(source)
        specs, read, folder = dict(model.specs), model.read, model.folder
        inputs = [model.folder, *model.adapters]
        if to == "orbax":
            arch = common_architecture([model], ignore_config)
    specs = {name: _with_dtype(spec, wanted) for name, spec in specs.items()}
    with output_folder(out, force=force, inputs=inputs) as hidden:
        copy_companions(folder, hidden, dtype=wanted)
        checksums = {}
        if to == "orbax":
            tree = to_flax(
                arch, {name: read(name).astype(spec.dtype) for name, spec in specs.items()}
            )
            save_orbax(hidden, tree)
        else:
            with ShardedWriter(hidden, specs, shard_bytes) as writer:
                for name, spec in specs.items():
                    writer.write(name, read(name).astype(spec.dtype, copy=False))
            checksums = dict(writer.checksums)
        write_checksums(hidden, checksums)


def _with_dtype(spec: TensorSpec, dtype: np.dtype | None) -> TensorSpec:
    return TensorSpec(dtype, spec.shape) if dtype is not None and is_float(spec.dtype) else spec


def describe(model: Checkpoint) -> dict[str, object]:
    """What a model is: family, units, sizes in bytes, dtypes, tied, adapters; plain values."""
    specs = model.specs
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
        common_architecture([model])
        note = None
    except InputError as error:
        note = str(error)
    return {
        "model": model.name,
        "folder": str(model.folder),
        "model_type": model.config.get("model_type"),
        "recall_can_run": note is None,
        "why_not": note,
        "parameters": sum(int(np.prod(spec.shape)) for spec in specs.values()),
        "bytes": model.nbytes,
        "dtypes": sorted({spec.dtype.name for spec in specs.values()}),
        "tied": bool(model.config.get("tie_word_embeddings", False)),
        "adapters": [str(adapter) for adapter in model.adapters],
        "units": units,
    }
