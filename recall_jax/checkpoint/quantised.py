"""What tells that the weights of a model are quantised.

Their integers mean nothing without the scales and codes beside them, which each method has in a
form of its own: the mean of two is no model. They are known by what the config says, and where it
is silent by the tensors. (Floats of 8 bits and less no reader takes.)
"""

import re
from collections.abc import Mapping
from typing import Any

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import shown

KEYS = ("quantization_config", "compression_config")
"""The attributes that say it; the second is of older llm-compressor."""
# What gptq, awq, bitsandbytes, quanto, hqq, aqlm, mxfp4 and their like call integers; blocks that
# are numbered are none of them.
_PACKED = re.compile(
    r"(?:^|[._:])(?:q?weight|qzeros|W_q|qdata|codes|blocks|packed)(?:[._:][a-z_]\w*)*$"
)


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """The method that a config.json, or a part of it, names, such as "gptq"; None if none does.

    An object that is empty, or of bitsandbytes with both kinds off, quantises nothing.
    """
    for key in KEYS:
        if (stated := config.get(key)) and (method := _method(stated)):
            return method
    parts = (part for part in config.values() if isinstance(part, Mapping))
    return next(filter(None, map(quantised_by, parts)), None)


def quantised_tensor(specs: Mapping[str, TensorSpec]) -> str | None:
    """The first tensor of integers that are weights, and its dtype; None if there is none."""
    for name, spec in specs.items():
        if spec.dtype.kind in "iu" and _PACKED.search(name):
            return f"{name}, {spec.dtype.name}"
    return None


def _method(stated: Any) -> str | None:
    if not isinstance(stated, Mapping):
        return shown(stated)
    loads = [stated.get(key, stated.get(f"_{key}")) for key in ("load_in_4bit", "load_in_8bit")]
    named = stated.get("quant_method") or stated.get("quant_algo")
    if any(loads):
        return "bitsandbytes"
    if named in (None, "bitsandbytes") and False in loads:
        return None
    return named[:80] if isinstance(named, str) else shown(stated, 80)
