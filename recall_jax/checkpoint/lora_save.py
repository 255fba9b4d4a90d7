"""Write a LoRA adapter as peft does: adapter_config.json and adapter_model.safetensors.

https://huggingface.co/docs/peft/developer_guides/checkpoint describes the format.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from recall_jax.checkpoint.hub import is_repository_id
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from recall_jax.checkpoint.writer import write_safetensors
from recall_jax.errors import storage_faults
from recall_jax.files.json_objects import write_json_object


class Factors(NamedTuple):
    """Hold the update of one linear layer, scale * B A: `a` (r, in), `b` (out, r)."""

    a: np.ndarray
    b: np.ndarray


def save_adapter(
    folder: Path,
    factors: Mapping[str, Factors],
    *,
    base_model: str,
    r: int,
    alpha: float,
    dropout: float,
    use_rslora: bool,
) -> None:
    """Write both files into `folder`, which exists.

    Use `files.output` to make the folder appear complete. `base_model` is a path, or a hub id with
    or without "@" and a revision. `factors` are keyed by the dotted path of their layer in it, such
    as `model.layers.0.self_attn.q_proj`.
    """
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a
        tensors[f"base_model.model.{module}.lora_B.weight"] = b
    write_safetensors(folder / ADAPTER_WEIGHTS, tensors)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        **_base(base_model),
        "inference_mode": True,
        "r": r,
        # peft declares it an integer
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted({module.rpartition(".")[2] for module in factors}),
        "use_rslora": use_rslora,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    path = folder / ADAPTER_CONFIG
    with storage_faults(f"write {path}"):
        write_json_object(path, config, indent=2)


def _base(model: str) -> dict[str, str | None]:
    """Return the base as peft names it, with the revision of a hub model as a separate key."""
    if not is_repository_id(model):
        return {"base_model_name_or_path": model, "revision": None}
    name, _, revision = model.partition("@")
    return {"base_model_name_or_path": name, "revision": revision or None}
