"""Models of any depth and width, and merges of them in processes that watch their own memory."""

import json
import math
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from toys import copy_model, environment

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import unit_of_tensor
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import tensor_shapes

# A layer takes 2.1 million parameters: 4.2 MB in bfloat16.
WIDTHS = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_key_value_heads": 2,
    "head_dim": 128,
}

# On two cores, as more of them mean more threads, each with a stack that counts as data.
MERGE_AND_WATCH = """
import os, resource, sys, threading, time
from pathlib import Path

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

from recall_jax.cli.main import main

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
try:
    main(sys.argv[2:])
finally:
    print(peak * 1024)
"""


def write_model(
    template: str | Path,
    folder: Path,
    dtype: Any,
    *,
    seed: int,
    shard_bytes: int = 5 << 30,
    **config: Any,
) -> Path:
    """A tied model with the config of `template` but for `config`, `WIDTHS` by default.

    Weights are random, the same in every layer.
    """
    copy_model(template, folder, **{**WIDTHS, **config})
    for path in folder.glob("model*"):
        path.unlink()
    arch = read_architecture(json.loads((folder / "config.json").read_text()))
    shapes = tensor_shapes(arch)
    specs = {name: TensorSpec(np.dtype(dtype), shape) for name, shape in shapes.items()}
    draws = np.random.default_rng(seed)
    arrays: dict[str, np.ndarray] = {}
    with ShardedWriter(folder, specs, shard_bytes) as writer:
        for name, spec in specs.items():
            kind = re.sub(r"\.\d+\.", ".", name)
            if kind not in arrays:
                drawn = draws.standard_normal(spec.shape, np.float32) * np.float32(0.02)
                arrays[kind] = drawn.astype(spec.dtype)
            writer.write(name, arrays[kind])
    return folder


def move_off_alignment(folder: Path) -> Path:
    """Shift every tensor of a model by eight bytes: as other software may have written it."""
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        with path.open("wb") as file:
            file.write((length + 8).to_bytes(8, "little") + content[8 : 8 + length] + b" " * 8)
            file.write(memoryview(content)[8 + length :])
    return folder


def largest_unit(folder: Path) -> int:
    """Parameters of a model's largest unit."""
    arch = read_architecture(json.loads((folder / "config.json").read_text()))
    sizes: dict[str, int] = {}
    for name, shape in tensor_shapes(arch).items():
        unit = unit_of_tensor(name)
        sizes[unit] = sizes.get(unit, 0) + math.prod(shape)
    return max(sizes.values())


@dataclass(frozen=True)
class Watched:
    """A merge in a process of its own: its peak anonymous memory in bytes, and what it left."""

    peak: int
    report: dict[str, Any]
    checksums: dict[str, Any]  # of the weights


# What is freed goes back at once, so that the count is of what is held and not of what the C
# library keeps for later, which varies with how threads happened to meet.
PROMPT_FREE = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10)}


def watch(
    cache: Path,
    out: Path,
    *command: Any,
    data_limit: int = resource.RLIM_INFINITY,
    variables: Mapping[str, str] = MappingProxyType({}),
) -> Watched:
    """Run a merge to `out` as a user would, with RLIMIT_DATA if a limit is given."""
    done = subprocess.run(
        [sys.executable, "-c", MERGE_AND_WATCH, str(data_limit), *map(str, command), "--quiet"],
        capture_output=True,
        text=True,
        env=environment(cache) | variables,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((out / "recall_report.json").read_text())
    files = json.loads((out / "checksums.json").read_text())["files"]
    weights = {name: checksum for name, checksum in files.items() if name.endswith(".safetensors")}
    return Watched(int(done.stdout), report, weights)


def write_linear_recipe(path: Path, models: list[Path]) -> Path:
    """Every model with the same weight; a recipe in YAML, of which JSON is a part."""
    entries = [{"model": str(model), "parameters": {"weight": 0.5}} for model in models]
    path.write_text(json.dumps({"merge_method": "linear", "models": entries}))
    return path


def write_adapter(base: Path, folder: Path, *, seed: int) -> Path:
    """A random LoRA adapter of every down projection."""
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8}
    (folder / "adapter_config.json").write_text(
        json.dumps(config | {"target_modules": ["down_proj"]})
    )
    arch = read_architecture(json.loads((base / "config.json").read_text()))
    draws = np.random.default_rng(seed)
    arrays = {}
    for name, (outputs, inputs) in (
        (name, shape) for name, shape in tensor_shapes(arch).items() if "down_proj" in name
    ):
        module = "base_model.model." + name.removesuffix(".weight")
        arrays[f"{module}.lora_A.weight"] = draws.standard_normal((4, inputs), np.float32)
        arrays[f"{module}.lora_B.weight"] = draws.standard_normal((outputs, 4), np.float32)
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array * np.float32(0.01))
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")
    return folder
