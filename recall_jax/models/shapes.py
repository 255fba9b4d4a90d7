"""Derive the shapes of parameters on disk from the config, and check tensors against them.

A merge that runs no model needs only these, so this imports no Flax module; tests compare the
shapes with those of the modules.
"""

import functools
from collections.abc import Mapping
from typing import Any

from recall_jax.checkpoint.units import EMBED, HEAD, LM_HEAD, unit_of_tensor
from recall_jax.errors import InputError, shown, some
from recall_jax.models.architecture import LAYERS, Architecture
from recall_jax.models.families import FAMILIES

# Attributes that equal the length of an axis of some tensor, or divide it.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


@functools.lru_cache(maxsize=32)
def group_shapes(arch: Architecture) -> dict[str, dict[str, tuple[int, ...]]]:
    """Return the shapes on disk by Flax path, for `embed`, one layer, and `head`."""
    width, inner = arch.hidden_size, arch.intermediate_size
    queries = arch.num_attention_heads * arch.head_dim
    keys = arch.num_key_value_heads * arch.head_dim
    linear = {
        "self_attn/q_proj": (queries, width, arch.qkv_bias),
        "self_attn/k_proj": (keys, width, arch.qkv_bias),
        "self_attn/v_proj": (keys, width, arch.qkv_bias),
        "self_attn/o_proj": (width, queries, arch.output_bias),
        "mlp/gate_proj": (inner, width, arch.mlp_bias),
        "mlp/up_proj": (inner, width, arch.mlp_bias),
        "mlp/down_proj": (width, inner, arch.mlp_bias),
    }
    norms = {"input_layernorm": width, "post_attention_layernorm": width}
    if arch.qk_norm:
        norms |= {"self_attn/q_norm": arch.head_dim, "self_attn/k_norm": arch.head_dim}
    layer: dict[str, tuple[int, ...]] = {f"{name}/scale": (size,) for name, size in norms.items()}
    for name, (outputs, inputs, has_bias) in linear.items():
        layer[f"{name}/kernel"] = (outputs, inputs)
        if has_bias:
            layer[f"{name}/bias"] = (outputs,)
    head: dict[str, tuple[int, ...]] = {"norm/scale": (width,)}
    if not arch.tie_word_embeddings:
        head["lm_head/kernel"] = (arch.vocab_size, width)
    return {EMBED: {"embedding": (arch.vocab_size, width)}, LAYERS: layer, HEAD: head}


def check_sizes(
    config: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
    most_layers: int | None = None,
) -> None:
    """Compare a config's sizes with the tensors, before anything of these sizes is allocated.

    Configs of other families are not checked. There are at most as many layers as tensors, or
    `most_layers`.

    Raises:
        InputError: if the config asks for more layers, or more along any axis, than there are.
    """
    if config.get("model_type") not in [*FAMILIES]:  # a list, as the value may be unhashable
        return
    if most_layers is None:
        most_layers = len(shapes)
    largest = max((max(shape, default=1) for shape in shapes.values() if 0 not in shape), default=0)
    for name, most in {"num_hidden_layers": most_layers, **dict.fromkeys(_SIZES, largest)}.items():
        size = config.get(name)
        if isinstance(size, int) and size > most:
            raise InputError(
                f"{where}: {name} is {shown(size)}, but the tensors allow {most} at most: they and "
                "the config do not belong together"
            )


def check_shapes(arch: Architecture, shapes: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Compare each tensor named in `arch` with the shape that its config implies.

    The model may be incomplete or have additional tensors; its layers, if any, must be as many as
    the config says. Raises InputError that lists the differences.
    """
    known = group_shapes(arch)
    said = []
    layers = {unit_of_tensor(name) for name in shapes if name.startswith("model.layers.")}
    if layers and len(layers) != arch.num_hidden_layers:
        said.append(f"{len(layers)} layers instead of {arch.num_hidden_layers}")
    for name, found in shapes.items():
        unit = unit_of_tensor(name)
        group = unit if unit in (EMBED, HEAD) else LAYERS
        inner = name.removeprefix(f"model.{unit}.")
        expected = known[group].get(FAMILIES[arch.family].tensors[group].get(inner, ""), found)
        if name == LM_HEAD:
            expected = (arch.vocab_size, arch.hidden_size)
        if tuple(found) != expected:
            said.append(f"{name} {list(found)} instead of {list(expected)}")
    if said:
        raise InputError(
            f"{where}: of another shape than its config says: {some(said)}; the tensors and the "
            f"config do not belong to the same {arch.family} model"
        )
