"""Find the files of a model folder: its config, and the weight file of each tensor."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.companions import CONFIG_NAME
from recall_jax.checkpoint.pytorch_bin import PytorchFile
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, shown
from recall_jax.files.json_objects import read_json_object

WeightFile = SafetensorsFile | PytorchFile

# In the order in which transformers looks for them: the first that exists is read.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
INDICES = tuple(name for name in WEIGHTS if name.endswith(".index.json"))


def read_config(folder: Path) -> dict[str, Any]:
    """Read the config of a model folder; InputError if it is missing or not supported."""
    path = folder / CONFIG_NAME
    if not os.path.isfile(path):
        refuse_gguf(folder)
        raise InputError(f"{folder} has no {CONFIG_NAME}: it is not a model folder")
    config = read_json_object(path)
    if config.get("transformers_weights"):
        raise InputError(
            f"{path}: transformers_weights is not supported; rename the file to {WEIGHTS[0]} and "
            "remove the key"
        )
    return config


def weight_files(folder: Path) -> tuple[dict[str, WeightFile], list[str]]:
    """Map each tensor to its weight file; return also warnings about tensors left out.

    Raises InputError if there are no weights, or an index and its shards do not match.
    """
    for name in WEIGHTS:
        path = folder / name
        if os.path.isfile(path):
            if name in INDICES:
                return _indexed_files(path)
            file = _open(path)
            return dict.fromkeys(file.specs, file), []
    refuse_gguf(folder)
    raise InputError(f"{folder} has no weights: none of {', '.join(WEIGHTS)}")


def refuse_gguf(path: Path) -> None:
    """Raise InputError for a GGUF file, or a folder that holds one."""
    if found := sorted(file for file in (path, *path.glob("*")) if file.suffix == ".gguf"):
        raise InputError(
            f"{found[0]}: GGUF is not read yet; take the model in safetensors, or load this with "
            "transformers (gguf_file=...), dequantised, and save it"
        )


def refuse_empty(specs: Mapping[str, TensorSpec], model: str) -> None:
    """Raise InputError for a tensor with no elements, which no model has."""
    for name, spec in specs.items():
        if 0 in spec.shape:
            raise InputError(
                f"{model}: tensor {name} has shape {list(spec.shape)} and is empty, as "
                "DeepSpeed ZeRO-3 leaves it: gather the weights with its zero_to_fp32.py first"
            )


def _indexed_files(index: Path) -> tuple[dict[str, WeightFile], list[str]]:
    """Map each tensor in an index to its shard; warn about shards with further tensors."""
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{index} has no weight_map")
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not shard or shard != os.path.basename(shard):
            raise InputError(
                f"{index}: tensor {shown(tensor)} is in {shown(shard)}, which is no file beside it"
            )
    file_of: dict[str, WeightFile] = {}
    warnings = []
    for shard in sorted(set(weight_map.values())):
        path = index.parent / shard
        if not os.path.isfile(path):
            raise InputError(f"{index} names {shown(shard)}, which is missing")
        file = _open(path)
        expected = {tensor for tensor, its_shard in weight_map.items() if its_shard == shard}
        if missing := sorted(expected - file.specs.keys()):
            raise InputError(
                f"{path} lacks the tensor {shown(missing[0])} that {index.name} says it has"
            )
        file_of |= {tensor: file for tensor in file.specs if tensor in expected}
        if extra := sorted(file.specs.keys() - expected):
            why = "is in another shard" if extra[0] in weight_map else "it does not name"
            warnings.append(
                f"{path}: left out {len(extra)} tensors that {index.name} does not place there, "
                f"such as {extra[0]}, which {why}"
            )
    return file_of, warnings


def _open(path: Path) -> WeightFile:
    return PytorchFile(path) if path.suffix == ".bin" else SafetensorsFile(path)
