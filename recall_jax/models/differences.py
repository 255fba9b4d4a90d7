"""Find the differences between two configs that change what their models compute."""

import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from recall_jax.checkpoint.class_defaults import completed, is_safe
from recall_jax.errors import InputError, shown
from recall_jax.models.architecture import Architecture
from recall_jax.models.config import HARMLESS, read_architecture, without

Differences = dict[str, tuple[Any, Any]]
"""Maps an attribute to its values in the two configs; None if it has none."""

# Harmless in families that we do not read: training, tokens, and library implementation.
_HARMLESS = re.compile(
    r"^_|drop|initializer|init_std|_loss|_token_ids?$|_token_index$|^unsloth_|^auto_map$|"
    r"_implementation$|_impl$|^output_|checkpointing|^quantization_config$|^processor_class$"
)
_MATTERS = {"add_cross_attention", "is_decoder", "is_encoder_decoder", "tie_encoder_decoder"}


def config_differences(
    one: Mapping[str, Any], other: Mapping[str, Any], ignore: Collection[str] = ()
) -> Differences:
    """Return the differences between two configs that may change what is computed.

    The version of transformers that wrote them does not matter. For a family that we read, these
    are differences between the `Architecture`s; for another, all attributes but those known to be
    harmless. Names in `ignore` are left out, as by `read_architecture`.
    """
    if is_safe(one) and is_safe(other):
        with suppress(InputError):
            architectures = [read_architecture(config, ignore=ignore) for config in (one, other)]
            return architecture_differences(*architectures)
    return _differences(*_alike_in_form(without(one, ignore), without(other, ignore)))


def architecture_differences(one: Architecture, other: Architecture) -> Differences:
    """Return the fields in which two architectures differ; rope fields are called `rope_NAME`."""
    return _differences(_fields(one), _fields(other))


def describe_differences(differences: Differences, one: str, other: str) -> list[str]:
    """Describe each difference: "rope_theta is 10000.0 in ONE and 1000000.0 in OTHER"."""
    return [
        f"{name} is {_said(mine)} in {one} and {_said(its)} in {other}"
        for name, (mine, its) in differences.items()
    ]


def _said(value: Any) -> str:
    return "not given" if value is None else shown(value, 80)


def _differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> Differences:
    names = dict.fromkeys([*one, *other])
    return {
        name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)
    }


def _fields(arch: Architecture) -> dict[str, Any]:
    fields = asdict(arch)
    rope = fields.pop("rope")
    return fields | {f"rope_{name}": value for name, value in rope.items()}


def _alike_in_form(
    one: Mapping[str, Any], other: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the attributes that may matter, completed by their class unless they are equal."""
    as_written = dict(_leaves(one)), dict(_leaves(other))
    if as_written[0] == as_written[1]:
        return as_written
    complete = completed(one), completed(other)
    if complete[0] is None or complete[1] is None:
        return dict(_leaves(_rope_together(one))), dict(_leaves(_rope_together(other)))
    return dict(_leaves(complete[0])), dict(_leaves(complete[1]))


def _leaves(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the attributes not known to be harmless; "outer.inner" for those in an object."""
    for name, value in config.items():
        if name in HARMLESS - _MATTERS or _HARMLESS.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _rope_together(config: Mapping[str, Any]) -> dict[str, Any]:
    """Collect rope attributes in one object, as transformers 5 does."""
    outer = {name: config.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    inner = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(inner, Mapping):
        return dict(config)
    kind = inner.get("rope_type") or inner.get("type") or "default"
    rope = {**outer, **inner, "rope_type": kind, "type": None}
    rest = {name: config[name] for name in config if name not in (*outer, "rope_scaling")}
    return {**rest, "rope_parameters": rope}
