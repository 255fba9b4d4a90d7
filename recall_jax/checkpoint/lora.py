"""Fold PEFT LoRA adapters into the tensors of the checkpoint they were trained on.

Gives what peft's `merge_and_unload` gives for a float32 model, tensor by tensor and without torch:
low-rank updates (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353) of
linear layers and embeddings, trained biases, fully trained modules (`modules_to_save`) and trained
embedding rows. Arithmetic and results are float32, because an update is often smaller than half a
unit in the last place of a bfloat16 base; the output is rounded once, when written.
"""

import re
from collections import defaultdict
from collections.abc import Collection, Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.dtypes import is_float
from recall_jax.checkpoint.lora_bound import BoundAdapter
from recall_jax.checkpoint.lora_config import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    LoraConfig,
    read_lora_config,
)
from recall_jax.checkpoint.lora_edits import (
    AddBias,
    Edit,
    EqualUpdates,
    LowRank,
    Replace,
    ReplaceRows,
)
from recall_jax.checkpoint.lora_names import find_places, refuse_missing
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.ties import (
    input_embedding,
    is_head,
    is_tied,
    is_vocabulary,
    untied,
    with_separate_head,
)
from recall_jax.errors import InputError

_PREFIX = "base_model.model."
_LINEAR_FACTORS = ("lora_A.weight", "lora_B.weight")
_EMBEDDING_FACTORS = ("lora_embedding_A", "lora_embedding_B")
_BIAS = "lora_B.bias"
_MAGNITUDE = "lora_magnitude_vector"
_TOKENS = "token_adapter.trainable_tokens_delta"
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>"
    + "|".join(map(re.escape, (*_LINEAR_FACTORS, *_EMBEDDING_FACTORS, _BIAS, _MAGNITUDE, _TOKENS)))
    + ")"
)
_WRAPPER = re.compile(r"\.(?:token_adapter\.)?base_layer(?=\.)")
_SECOND_COPY = re.compile(r"\.(?:original_module|modules_to_save)(?=\.)")

# Families whose blocks keep their weights (in, out). peft goes by each layer's class and saves the
# `fan_in_fan_out` of the layer it adapted last, so the flag is not enough.
_FAN_IN_FAN_OUT_FAMILIES = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class Adapter:
    """Describe a LoRA adapter on disk: its config, and the role of each of its tensors.

    `updates` maps a module to the keys of its parts (`lora_A.weight`, ...), `saved` maps the name
    of a tensor to the key of its trained copy. Modules and names are those of the adapted model.
    """

    file: SafetensorsFile
    config: LoraConfig
    updates: Mapping[str, Mapping[str, str]]
    saved: Mapping[str, str]

    def bind(self, base_specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> BoundAdapter:
        """Match each tensor with a tensor of a base that has these specs and this config.json.

        An output head that the base ties to its embedding becomes a separate tensor if the adapter
        changes one use of that weight and not the other. Raises InputError if a tensor matches none
        or several of the base, or does not fit in shape.
        """
        where, specs, config = str(self.file.path), dict(base_specs), dict(config)
        origins: dict[str, str] = {}
        tied = any(map(is_vocabulary, self._names)) and is_tied(specs, config)
        heads = list(filter(is_head, self._names))
        if tied and self._separates_head(heads):
            specs, origins = with_separate_head(specs, where, *heads[:1])
            config = untied(config, where)
        places = find_places(self._names, specs, where)
        if tied and not origins:
            places |= dict.fromkeys(heads, input_embedding(specs, where))
        return self._bound(refuse_missing(places, where), specs, config, origins)

    @property
    def _names(self) -> list[str]:
        """Return the adapted model's names of the tensors that the adapter changes."""
        weights = [f"{module}.weight" for module in self.updates]
        biases = [f"{module}.bias" for module, parts in self.updates.items() if _BIAS in parts]
        return [*weights, *biases, *self.saved]

    def _separates_head(self, heads: Collection[str]) -> bool:
        """Return whether the adapter changes an embedding and the head tied to it differently.

        With `ensure_weight_tying`, both change together. Without it, a trained copy of either
        (`modules_to_save`) or an update applies only to that use; trained token rows apply to
        both, unless the head has rows that differ from the embedding's.
        """
        ends = [module for module in self.updates if is_vocabulary(f"{module}.weight")]
        if self.config.ensure_weight_tying:
            # DoRA scales the rows of one, the columns of the other
            scales = {self.config.scale(module) for module in ends}
            return len(scales) > 1 or any(_MAGNITUDE in self.updates[module] for module in ends)
        if any(is_vocabulary(name) and self._saves(name) for name in self.saved):
            return True
        rows: dict[bool, tuple[int, ...]] = {}
        for module in ends:
            if _TOKENS not in self.updates[module]:
                return True
            rows[is_head(f"{module}.weight")] = self.config.token_indices(module)
        return True in rows and rows[True] != rows.get(False)

    def _bound(
        self,
        places: Mapping[str, str],
        specs: dict[str, TensorSpec],
        config: dict[str, Any],
        origins: Mapping[str, str],
    ) -> BoundAdapter:
        """Build the bound adapter from the place of each name, checked against the specs."""
        for place in places.values():
            if not is_float(specs[place].dtype):
                raise InputError(
                    f"{self.file.path} changes {place}, which the base holds as "
                    f"{specs[place].dtype}; only floats can be folded"
                )
        edits: dict[str, list[Edit]] = defaultdict(list)
        copies = self._copies(places, origins)
        for place, keys in copies.items():
            specs[place] = self._copied(place, keys, specs[place])
            edits[place].append(Replace(tuple(keys)))
        if any(map(is_vocabulary, copies)):
            config = {**config, "vocab_size": self._vocabulary(specs)}

        updated: dict[str, str] = {}  # tensor to the module that updates it
        for module in sorted(self.updates, key=lambda module: is_head(f"{module}.weight")):
            place = places[f"{module}.weight"]
            edits[place].append(self._update(module, place, specs[place], config))
            if (first := updated.setdefault(place, module)) != module:
                edits[place][-1] = self._equal_updates(first, module)
            if bias := self.updates[module].get(_BIAS):
                place = places[f"{module}.bias"]
                self._check_shape(bias, specs[place].shape, place)
                edits[place].append(AddBias(bias, self.config.scale(module)))
        return BoundAdapter(self.file, specs, config, dict(edits), origins)

    def _copies(
        self, places: Mapping[str, str], origins: Mapping[str, str]
    ) -> dict[str, list[str]]:
        """Return the keys of the full tensors that the adapter holds, by the tensor they replace.

        peft keeps an untrained copy of one end of the model once the vocabulary has grown; where
        embedding and head are separated, it serves for both.
        """
        copies: dict[str, list[str]] = defaultdict(list)
        for name, key in self.saved.items():
            copies[places[name]].append(key)
        for ends in origins.items():
            kept = [
                key
                for name, key in self.saved.items()
                if places[name] in ends and not self._saves(name)
            ]
            copies |= {end: kept for end in ends if kept and end not in copies}
        return dict(copies)

    def _equal_updates(self, first: str, second: str) -> EqualUpdates:
        """Build the check that a tied head's update equals the embedding's."""
        one, other = self.updates[first], self.updates[second]
        if _TOKENS in one:
            return EqualUpdates(((one[_TOKENS], other[_TOKENS]),), transposed=False)
        pairs = zip(_EMBEDDING_FACTORS, reversed(_LINEAR_FACTORS), strict=True)
        return EqualUpdates(tuple((one[a], other[b]) for a, b in pairs), transposed=True)

    def _saves(self, name: str) -> bool:
        return name in self.saved and self.config.saves(name.rpartition(".")[0])

    def _copied(self, place: str, keys: Sequence[str], base: TensorSpec) -> TensorSpec:
        """Return the spec of a full tensor in the adapter, whose vocabulary may have grown."""
        shape = base.shape
        if is_vocabulary(place):
            shape = self.file.specs[keys[0]].shape[:1] + shape[1:]
        for key in keys:
            self._check_shape(key, shape, place)
        return TensorSpec(base.dtype, shape)

    def _vocabulary(self, specs: Mapping[str, TensorSpec]) -> int:
        """Return the vocabulary size, which input embedding and output head must agree on."""
        rows = {spec.shape[0] for name, spec in specs.items() if is_vocabulary(name)}
        if len(rows) > 1:
            raise InputError(
                f"{self.file.path}: input embedding and output head would be left with different "
                f"vocabularies, of {' and '.join(map(str, sorted(rows)))} tokens"
            )
        return rows.pop()

    def _update(
        self, module: str, place: str, spec: TensorSpec, config: Mapping[str, Any]
    ) -> LowRank | ReplaceRows:
        """Build the update of `module`, whose weight is `place`, checked against its spec."""
        parts = self.updates[module]
        if len(spec.shape) != 2:
            raise InputError(
                f"{self.file.path} updates {place}, which is no matrix but of shape {spec.shape}"
            )
        if _TOKENS in parts:
            rows = self.config.token_indices(module)
            self._check_parts(module, {_TOKENS})
            self._check_shape(parts[_TOKENS], (len(rows), spec.shape[1]), place)
            if not all(0 <= row < spec.shape[0] for row in rows):
                raise InputError(
                    f"{self.file.path}: trainable_token_indices name rows that {place}, of shape "
                    f"{spec.shape}, does not have"
                )
            return ReplaceRows(parts[_TOKENS], rows)

        embedding = "lora_embedding_A" in parts
        a, b = _EMBEDDING_FACTORS if embedding else _LINEAR_FACTORS
        extra = {_MAGNITUDE: self.config.use_dora, _BIAS: self.config.lora_bias and not embedding}
        self._check_parts(module, {a, b} | {part for part, given in extra.items() if given})
        transposed = embedding or (
            not is_head(f"{module}.weight")
            and (self.config.fan_in_fan_out or config.get("model_type") in _FAN_IN_FAN_OUT_FAMILIES)
        )
        rank = self.config.rank(module)
        outputs, inputs = spec.shape[::-1] if transposed else spec.shape
        self._check_shape(parts[a], (rank, inputs), place)
        self._check_shape(parts[b], (outputs, rank), place)
        if _MAGNITUDE in parts:
            self._check_shape(parts[_MAGNITUDE], (outputs,), place)
        scale = self.config.scale(module)
        return LowRank(parts[a], parts[b], parts.get(_MAGNITUDE), scale, transposed)

    def _check_parts(self, module: str, expected: Collection[str]) -> None:
        found = self.updates[module]
        if found.keys() != set(expected):
            raise InputError(
                f"{self.file.path}: {module} has {', '.join(sorted(found))}, where the adapter's "
                f"config calls for {', '.join(sorted(expected))}"
            )

    def _check_shape(self, key: str, expected: tuple[int, ...], place: str) -> None:
        shape = self.file.specs[key].shape
        if shape != expected:
            raise InputError(
                f"{self.file.path}: {key} has shape {shape}, where {place} of the base and the "
                f"adapter's config call for {expected}"
            )


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json, and the header of adapter_model.safetensors, in `folder`.

    Raises InputError if either is missing or malformed, if the adapter is of a kind that cannot be
    folded (see `read_lora_config`), or if it is a pickle (.bin).
    """
    config = read_lora_config(folder / ADAPTER_CONFIG)
    path = folder / ADAPTER_WEIGHTS
    pickle = path.with_suffix(".bin")
    if pickle.exists() and not path.exists():
        raise InputError(
            f"{pickle} is a pickle, which is not read; save the adapter as safetensors"
        )
    file = SafetensorsFile(path)
    if not file.specs:
        raise InputError(f"{path} holds no tensors")
    updates: dict[str, dict[str, str]] = defaultdict(dict)
    saved: dict[str, str] = {}
    for key, spec in file.specs.items():
        if not key.startswith(_PREFIX):
            raise InputError(
                f"{path}: {key} is no adapter tensor: their names start with {_PREFIX}"
            )
        if not is_float(spec.dtype):
            raise InputError(f"{path}: {key} is {spec.dtype}; only floats can be folded")
        name = key.removeprefix(_PREFIX)
        if part := _PART.fullmatch(name):
            updates[part["module"]][part["part"]] = key
        elif not _is_second_copy(key, file.specs):
            name = _WRAPPER.sub("", name)
            if name in saved:
                raise InputError(f"{path}: {saved[name]} and {key} are both {name}")
            saved[name] = key
    return Adapter(file, config.resolved(updates, folder / ADAPTER_CONFIG), dict(updates), saved)


def _is_second_copy(key: str, keys: Container[str]) -> bool:
    """Return whether peft wrote this tensor twice, as it does after a vocabulary has grown."""
    plain = _SECOND_COPY.sub("", key)
    return plain != key and plain in keys
