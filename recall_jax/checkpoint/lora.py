"""PEFT LoRA adapters, folded into the tensors of the checkpoint they were trained on.

What peft's `merge_and_unload` gives of a float32 model, tensor by tensor and without torch:
low-rank updates (LoRA, arXiv:2106.09685; rsLoRA, arXiv:2312.03732; DoRA, arXiv:2402.09353) of
linear layers and embeddings, trained biases, whole modules trained beside them (`modules_to_save`)
and trained embedding rows. All arithmetic is float32, and so is what it gives: an update is often
smaller than half a unit in the last place of a bfloat16 base, and whoever writes it rounds once.
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
    LowRank,
    Replace,
    ReplaceRows,
    SaidTwice,
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
    with_a_head,
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
# `fan_in_fan_out` of the layer it adapted last, so the flag alone does not tell.
_FAN_IN_FAN_OUT_FAMILIES = ("gpt2", "openai-gpt")


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk: what its config says, and its tensors by what they are.

    `updates` maps a module to the keys of its parts (`lora_A.weight`, ...), `saved` the name of a
    tensor to the key of its trained copy. Modules and names are the adapted model's.
    """

    file: SafetensorsFile
    config: LoraConfig
    updates: Mapping[str, Mapping[str, str]]
    saved: Mapping[str, str]

    def bind(self, base_specs: Mapping[str, TensorSpec], config: Mapping[str, Any]) -> BoundAdapter:
        """Find each tensor's place in a base with these specs and this config.json.

        An output head that the base ties to its embedding is a tensor of its own afterwards, where
        the adapter changes one use of that weight and not the other. Raises InputError if a tensor
        has no place, or several, or does not fit its place.
        """
        where, specs, config = str(self.file.path), dict(base_specs), dict(config)
        origins: dict[str, str] = {}
        tied = any(map(is_vocabulary, self._names)) and is_tied(specs, config)
        heads = list(filter(is_head, self._names))
        if tied and self._parts_ends(heads):
            specs, origins = with_a_head(specs, where, *heads[:1])
            config = untied(config, where)
        places = find_places(self._names, specs, where)
        if tied and not origins:
            places |= dict.fromkeys(heads, input_embedding(specs, where))
        return self._bound(refuse_missing(places, where), specs, config, origins)

    @property
    def _names(self) -> list[str]:
        """The tensors that it changes, by their names in the adapted model."""
        weights = [f"{module}.weight" for module in self.updates]
        biases = [f"{module}.bias" for module, parts in self.updates.items() if _BIAS in parts]
        return [*weights, *biases, *self.saved]

    def _parts_ends(self, heads: Collection[str]) -> bool:
        """Whether it changes an embedding and the head tied to it in two ways.

        `ensure_weight_tying` is to change both in one. Without it a copy of either that is trained
        (`modules_to_save`), or an update, is of that use alone; but rows of tokens are of both,
        unless the head has rows that are not the embedding's.
        """
        ends = [module for module in self.updates if is_vocabulary(f"{module}.weight")]
        if self.config.ensure_weight_tying:
            # DoRA scales the rows of the one, the columns of the other
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
        """The adapter with a place for each of its names, checked against the specs."""
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

        updated: dict[str, str] = {}  # by which module
        for module in sorted(self.updates, key=lambda module: is_head(f"{module}.weight")):
            place = places[f"{module}.weight"]
            edits[place].append(self._update(module, place, specs[place], config))
            if (first := updated.setdefault(place, module)) != module:
                edits[place][-1] = self._again(first, module)
            if bias := self.updates[module].get(_BIAS):
                place = places[f"{module}.bias"]
                self._check_shape(bias, specs[place].shape, place)
                edits[place].append(AddBias(bias, self.config.scale(module)))
        return BoundAdapter(self.file, specs, config, dict(edits), origins)

    def _copies(
        self, places: Mapping[str, str], origins: Mapping[str, str]
    ) -> dict[str, list[str]]:
        """The keys of the tensors that the adapter holds whole, by their places.

        A copy of an end of the model that was not trained, as peft keeps it once the vocabulary
        has grown, is of both ends that part.
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

    def _again(self, first: str, second: str) -> SaidTwice:
        """The update of an embedding once more, as that of the head tied to it."""
        one, other = self.updates[first], self.updates[second]
        if _TOKENS in one:
            return SaidTwice(((one[_TOKENS], other[_TOKENS]),), transposed=False)
        pairs = zip(_EMBEDDING_FACTORS, reversed(_LINEAR_FACTORS), strict=True)
        return SaidTwice(tuple((one[a], other[b]) for a, b in pairs), transposed=True)

    def _saves(self, name: str) -> bool:
        return name in self.saved and self.config.saves(name.rpartition(".")[0])

    def _copied(self, place: str, keys: Sequence[str], base: TensorSpec) -> TensorSpec:
        """Spec of a tensor that the adapter holds whole, which may have another vocabulary."""
        shape = base.shape
        if is_vocabulary(place):
            shape = self.file.specs[keys[0]].shape[:1] + shape[1:]
        for key in keys:
            self._check_shape(key, shape, place)
        return TensorSpec(base.dtype, shape)

    def _vocabulary(self, specs: Mapping[str, TensorSpec]) -> int:
        """Number of tokens of the input embedding and the output head, which must agree."""
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
        """The update of `module`, whose weight is `place`, checked against its spec."""
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
            raise InputError(f"{path}: {key} is no adapter tensor, which start with {_PREFIX}")
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
    return Adapter(file, config.of(updates, folder / ADAPTER_CONFIG), dict(updates), saved)


def _is_second_copy(key: str, keys: Container[str]) -> bool:
    """Whether peft wrote this tensor beside itself, as it does after a vocabulary has grown."""
    plain = _SECOND_COPY.sub("", key)
    return plain != key and plain in keys
