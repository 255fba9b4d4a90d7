"""Read adapter_config.json of a PEFT LoRA adapter, and refuse what we cannot fold.

peft writes every option it knows. Those that only affect training are listed here and ignored; any
other option that is set and that we do not read could change the weights, so it is refused by name.
"""

import math
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from recall_jax.errors import InputError, shown
from recall_jax.files.json_objects import read_json_object
from recall_jax.foreign.process import ForeignError, run_limited
from recall_jax.foreign.worker import matching

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"

_T = TypeVar("_T")
_REPEATS = set("*+?{|")  # patterns with these may take unlimited time

# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, LoRA-GA) subtract B A from the base first,
# so that the adapter fits weights which the checkpoint does not hold.
_INITIALISATIONS_THAT_KEEP_THE_BASE = frozenset(
    {"none", "false", "true", "gaussian", "eva", "orthogonal", "mica"}
)

_WITHOUT_EFFECT_ON_THE_WEIGHTS = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "bias",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "target_modules",
        "task_type",
    }
)


@dataclass(frozen=True)
class LoraConfig:
    """Hold the options that decide what an adapter's tensors mean, under peft's names."""

    r: int
    lora_alpha: float
    use_rslora: bool
    use_dora: bool
    lora_bias: bool
    fan_in_fan_out: bool
    ensure_weight_tying: bool
    rank_pattern: Mapping[str, int]  # keys are patterns, or module names
    alpha_pattern: Mapping[str, float]  # once `resolved` has matched them
    modules_to_save: tuple[str, ...]
    trainable_token_indices: Mapping[str, tuple[int, ...]]

    def resolved(self, modules: Collection[str], where: Path) -> "LoraConfig":
        """Replace the patterns by the modules that they match.

        Raises InputError, which names `where`, if matching the patterns takes too long.
        """
        return replace(
            self,
            rank_pattern=_by_module(self.rank_pattern, modules, f"{where}: rank_pattern"),
            alpha_pattern=_by_module(self.alpha_pattern, modules, f"{where}: alpha_pattern"),
        )

    def rank(self, module: str) -> int:
        """Return the rank r of the update of `module`, a dotted path within the base model."""
        return self.rank_pattern.get(module, self.r)

    def scale(self, module: str) -> float:
        """Return the factor of B A: alpha / r, or alpha / sqrt(r) for rsLoRA (arXiv:2312.03732)."""
        alpha = self.alpha_pattern.get(module, self.lora_alpha)
        rank = self.rank(module)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Return whether peft trained a full copy of `module` (`modules_to_save`)."""
        return module.endswith(self.modules_to_save)

    def token_indices(self, module: str) -> tuple[int, ...]:
        """Return the trained rows of the embedding `module`; empty if it is not listed."""
        listed = self.trainable_token_indices
        if len(listed) == 1:  # it also applies to an output head tied to the listed embedding
            return next(iter(listed.values()))
        return next((rows for name, rows in listed.items() if module.endswith(name)), ())


def base_of(path: Path) -> tuple[str | None, str | None]:
    """Return the base model that an adapter's config names, and its revision.

    Raises InputError if the config cannot be read, or a name is not a string.
    """
    options = read_json_object(path)
    base, revision = (options.get(key) for key in ("base_model_name_or_path", "revision"))
    for key, value in (("base_model_name_or_path", base), ("revision", revision)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{path}: {key} must be a name, not {shown(value)}")
    return base or None, revision or None


def read_lora_config(path: Path) -> LoraConfig:
    """Read and check the adapter_config.json at `path`.

    Raises InputError that names the file and the key if the adapter is not LoRA, if a value has
    the wrong type, or if an option is set that changes the weights in a way not supported.
    """
    options = read_json_object(path)
    _refuse_other_kinds(options, path)

    def take(key: str, fits: Callable[[Any], bool], expected: str, default: Any = None) -> Any:
        """Remove `key` and return its value, or `default` if null or absent, as in older peft."""
        value = options.pop(key, None)
        if value is None:
            value = default
        if not fits(value):
            raise InputError(f"{path}: {key} must be {expected}, not {shown(value)}")
        return value

    def flag(key: str) -> bool:
        return take(key, lambda value: isinstance(value, bool), "true or false", False)

    token_indices = take("trainable_token_indices", _are_token_indices, "lists of row numbers", {})
    if isinstance(token_indices, list):
        token_indices = {"": token_indices}
    config = LoraConfig(
        r=take("r", _is_rank, "a positive integer"),
        lora_alpha=take("lora_alpha", _is_number, "a number"),
        use_rslora=flag("use_rslora"),
        use_dora=flag("use_dora"),
        lora_bias=flag("lora_bias"),
        fan_in_fan_out=flag("fan_in_fan_out"),
        ensure_weight_tying=flag("ensure_weight_tying"),
        rank_pattern=take("rank_pattern", _maps_patterns(_is_rank), "patterns to ranks", {}),
        alpha_pattern=take("alpha_pattern", _maps_patterns(_is_number), "patterns to numbers", {}),
        modules_to_save=tuple(take("modules_to_save", _are_strings, "a list of names", [])),
        trainable_token_indices={name: tuple(rows) for name, rows in token_indices.items()},
    )
    for key, value in options.items():
        if value and key not in _WITHOUT_EFFECT_ON_THE_WEIGHTS:
            raise InputError(
                f"{path}: {key} = {shown(value)} is not supported; merge with peft instead"
            )
    return config


def _refuse_other_kinds(options: dict[str, Any], path: Path) -> None:
    kind = options.pop("peft_type", None)
    if kind != "LORA":
        raise InputError(f"{path}: peft_type is {shown(kind)}; only LORA adapters can be folded")
    start = options.pop("init_lora_weights", True)
    if str(start).lower() not in _INITIALISATIONS_THAT_KEEP_THE_BASE:
        raise InputError(
            f"{path}: init_lora_weights = {shown(start)} is not supported, as it changes the base; "
            "convert the adapter to plain LoRA with peft first"
        )


def _by_module(patterns: Mapping[str, _T], modules: Collection[str], where: str) -> dict[str, _T]:
    """Map each module that a pattern matches to the value of the first such pattern, as in peft."""
    full = [_full_pattern(pattern) for pattern in patterns]
    if any(_REPEATS & set(pattern) for pattern in patterns):
        try:
            found = run_limited("matching", patterns=full, names=list(modules))
        except ForeignError as error:
            raise InputError(f"{where} cannot be matched: {error}") from error
    else:  # without repetitions the time is bounded
        found = matching()(full, list(modules))
    values = list(patterns.values())
    return {
        module: values[place]
        for module, place in zip(modules, found, strict=True)
        if place is not None
    }


def _full_pattern(pattern: str) -> str:
    """Return the regular expression by which peft matches a module's full name."""
    return rf"(.*\.)?({pattern})$"


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return type(value) is int and value > 0


def _are_strings(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _are_token_indices(value: Any) -> bool:
    if isinstance(value, dict):
        return all(isinstance(rows, list) and _are_token_indices(rows) for rows in value.values())
    return isinstance(value, list) and all(type(row) is int for row in value)


def _maps_patterns(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """Return a check for mappings from regular expressions to values that fit."""

    def check(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _is_pattern(pattern) and fits(item) for pattern, item in value.items()
        )

    return check


def _is_pattern(text: str) -> bool:
    try:
        with warnings.catch_warnings(action="ignore"):  # such as a FutureWarning about syntax
            re.compile(_full_pattern(text))
    except (re.error, RecursionError, OverflowError):
        return False
    return True
