"""Detect whether the weights of a model are quantised.

Quantised integers are meaningless without their scales and codes, which each method stores in a
different form: the mean of two is no model. They are recognised by the config, or else by the
tensors. (No reader accepts floats of 8 bits or less.)
"""

import re
from collections.abc import Mapping
from typing import Any

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import shown

KEYS = ("quantization_config", "compression_config")
"""The config keys that declare it; older versions of llm-compressor write the second."""
# Names of integer tensors in gptq, awq, bitsandbytes, quanto, hqq, aqlm, mxfp4 and similar;
# numbered blocks are not among them.
_PACKED = re.compile(
    r"(?:^|[._:])(?:q?weight|qzeros|W_q|qdata|codes|blocks|packed)(?:[._:][a-z_]\w*)*$"
)


def quantised_by(config: Mapping[str, Any]) -> str | None:
    """Return the method that a config.json or a part of it names, such as "gptq"; else None.

    An empty object, or one of bitsandbytes with both kinds off, quantises nothing.
    """
    for key in KEYS:
        if (stated := config.get(key)) and (method := _method(stated)):
            return method
    parts = (part for part in config.values() if isinstance(part, Mapping))
    return next(filter(None, map(quantised_by, parts)), None)


def quantised_tensor(specs: Mapping[str, TensorSpec]) -> str | None:
    """Return the first integer weight tensor with its dtype, or None."""
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
