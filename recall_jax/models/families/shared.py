"""Read the attributes that Llama and its descendants share into fields of an `Architecture`."""

import math
from typing import Any

from recall_jax.errors import InputError, shown
from recall_jax.models.architecture import ACTIVATIONS, ROPE_KINDS, Rope
from recall_jax.models.attributes import Attributes


def read_shared(
    config: Attributes,
    *,
    vocab_size: int,
    intermediate_size: int,
    num_key_value_heads: int | None,
    head_dim: int | None,
    max_position_embeddings: int,
) -> dict[str, Any]:
    """Read the fields of `Architecture` that are the same in every family.

    The keywords are the defaults of the family's class in transformers where families differ. None
    means as many key-value heads as heads, and hidden_size / num_attention_heads for head_dim.
    Raises InputError for invalid values, and for head sizes that do not fit.
    """
    hidden_size = config.integer("hidden_size", 4096)
    heads = config.integer("num_attention_heads", 32)
    key_value_heads = config.integer("num_key_value_heads", num_key_value_heads, null=True) or heads
    if heads % key_value_heads:
        raise config.error("num_key_value_heads", key_value_heads, f"a divisor of {heads} heads")
    head_dim = config.integer("head_dim", head_dim)
    if head_dim is None:
        if hidden_size % heads:
            raise config.error("num_attention_heads", heads, f"a divisor of {hidden_size}")
        head_dim = hidden_size // heads
    rope = read_rope(config, max_position_embeddings)
    if head_dim % 2 or (rope.kind == "dynamic" and head_dim == 2):
        raise config.error("head_dim", head_dim, "even, and above 2 with dynamic rope scaling")
    return {
        "vocab_size": config.integer("vocab_size", vocab_size),
        "hidden_size": hidden_size,
        "intermediate_size": config.integer("intermediate_size", intermediate_size),
        "num_hidden_layers": config.integer("num_hidden_layers", 32),
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "head_dim": head_dim,
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6),
        "hidden_act": config.choice("hidden_act", ACTIVATIONS, "silu"),
        "tie_word_embeddings": config.flag("tie_word_embeddings", False),
        "rope": rope,
    }


def read_layer_windows(config: Attributes, num_hidden_layers: int) -> tuple[int | None, ...]:
    """Read the windows of the Qwen families from `layer_types` (v5) or `max_window_layers` (v4).

    Raises InputError if the attributes contradict each other.
    """
    used = config.flag("use_sliding_window", False)
    window = config.integer("sliding_window", 4096, null=True)
    first = config.integer("max_window_layers", 28, minimum=0)
    kinds = config.words("layer_types")
    if kinds is None:
        return tuple(window if used and i >= first else None for i in range(num_hidden_layers))
    if len(kinds) != num_hidden_layers or not {*kinds} <= {"full_attention", "sliding_attention"}:
        what = f"{num_hidden_layers} times full_attention or sliding_attention"
        raise config.error("layer_types", kinds, what)
    if "sliding_attention" in kinds and not (used and window):
        said = f"use_sliding_window is {used} and sliding_window {window}"
        raise InputError(f"{config.where}: layer_types has sliding_attention, but {said}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def read_rope(config: Attributes, max_position_embeddings: int) -> Rope:
    """Read a rotary embedding from `rope_parameters` (v5), or `rope_theta` and `rope_scaling` (v4).

    Precedence and defaults are those of transformers 5. `max_position_embeddings` is the family's
    default. Raises InputError for invalid values, and if two places disagree.
    """
    max_position_embeddings = config.integer("max_position_embeddings", max_position_embeddings)
    outer_theta = config.number("rope_theta", None)
    scaling, parameters = config.object("rope_scaling"), config.object("rope_parameters")
    if scaling and parameters and scaling != parameters:
        raise InputError(f"{config.where}: rope_scaling and rope_parameters disagree; keep one")
    name = "rope_scaling" if scaling else "rope_parameters"
    rope = Attributes(scaling or parameters, f"{config.where}: {name}")

    old_kind = rope.choice("type", ROPE_KINDS, None)
    kind = rope.choice("rope_type", ROPE_KINDS, old_kind) or "default"
    if old_kind not in (None, kind):
        raise InputError(
            f"{rope.where}: type {shown(old_kind)} and rope_type {shown(kind)} disagree"
        )
    theta = rope.number("rope_theta", outer_theta) or 10_000.0
    if outer_theta not in (None, theta):
        raise InputError(f"{rope.where}: rope_theta {theta} is {outer_theta} at the top level")
    if theta <= 1:
        raise rope.error("rope_theta", theta, "above 1")
    fields: dict[str, Any] = {}
    if kind != "default":
        fields["factor"] = rope.number("factor", minimum=1.0)
    if kind == "dynamic":
        fields["original_max_position_embeddings"] = max_position_embeddings
    if kind == "llama3":
        fields |= _read_llama3(rope, max_position_embeddings)
    if kind == "yarn":
        fields |= _read_yarn(rope, max_position_embeddings, fields["factor"])
    rope.drop(inert={"partial_rotary_factor": 1.0})
    rope.finish(f"{name}.")
    return Rope(kind=kind, theta=theta, **fields)


def _read_llama3(rope: Attributes, max_position_embeddings: int) -> dict[str, Any]:
    low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
    if high <= low:
        raise rope.error("high_freq_factor", high, f"above low_freq_factor, {low}")
    trained = rope.integer("original_max_position_embeddings", max_position_embeddings)
    return {
        "original_max_position_embeddings": trained,
        "low_freq_factor": low,
        "high_freq_factor": high,
    }


def _read_yarn(rope: Attributes, max_position_embeddings: int, factor: float) -> dict[str, Any]:
    mscale, mscale_all_dim = rope.number("mscale", None), rope.number("mscale_all_dim", None)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0

    derived = magnitude(1.0)
    if mscale and mscale_all_dim:
        derived = magnitude(mscale) / magnitude(mscale_all_dim)
    trained = rope.integer("original_max_position_embeddings", max_position_embeddings)
    return {
        "original_max_position_embeddings": trained,
        "attention_factor": rope.number("attention_factor", None) or derived,
        "beta_fast": rope.number("beta_fast", None) or 32.0,
        "beta_slow": rope.number("beta_slow", None) or 1.0,
        "truncate": rope.flag("truncate", True),
    }
