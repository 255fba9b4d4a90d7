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

import numpy as np

from recall_jax.checkpoint.lora_config import LoraConfig, read_lora_config
from recall_jax.checkpoint.lora_edits import AddBias, Edit, LowRank, Replace, ReplaceRows
from recall_jax.checkpoint.lora_names import (
    find_places,
    input_embedding,
    is_head,
    is_tied,
    is_vocabulary,
    refuse_missing,
)
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import DTYPE_OF_NAME, TensorSpec
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
_FLOATS = frozenset(DTYPE_OF_NAME[name] for name in ("F16", "BF16", "F32", "F64"))

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

    def bind(
        self, base_specs: Mapping[str, TensorSpec], config: Mapping[str, Any]
    ) -> "BoundAdapter":
        """Find each tensor's place in a base with these specs and this config.json.

        Raises InputError if a tensor has no place, or several, or does not fit its place.
        """
        places, config = self._places(base_specs, dict(config))
        for place in places.values():
            if place in base_specs and base_specs[place].dtype not in _FLOATS:
                raise InputError(
                    f"{self.file.path} changes {place}, which the base holds as "
                    f"{base_specs[place].dtype}; only floats can be folded"
                )
        specs = dict(base_specs)
        edits: dict[str, list[Edit]] = defaultdict(list)

        copies: dict[str, list[str]] = defaultdict(list)
        for name, key in self.saved.items():
            copies[places[name]].append(key)
        for place, keys in copies.items():
            specs[place] = self._copied(place, keys, specs)
            edits[place].append(Replace(tuple(keys)))
        if any(map(is_vocabulary, copies)):
            config = {**config, "vocab_size": self._vocabulary(specs)}

        # of two tied weights peft merges the embedding first, in the order of the forward pass
        for module in sorted(self.updates, key=lambda module: is_head(f"{module}.weight")):
            place = places[f"{module}.weight"]
            edits[place].append(self._update(module, place, specs[place], config))
            if bias := self.updates[module].get(_BIAS):
                place = places[f"{module}.bias"]
                self._check_shape(bias, specs[place].shape, place)
                edits[place].append(AddBias(bias, self.config.scale(module)))
        return BoundAdapter(self.file, specs, config, dict(edits))

    def _places(
        self, base_specs: Mapping[str, TensorSpec], config: dict[str, Any]
    ) -> tuple[dict[str, str], dict[str, Any]]:
        """The place of every tensor by its name in the adapted model, and the config of the result.

        For peft too, tied weights are one, unless either is in `modules_to_save`: then a copy of
        that one was trained, and they part.
        """
        where = str(self.file.path)
        weights = [f"{module}.weight" for module in self.updates]
        biases = [f"{module}.bias" for module, parts in self.updates.items() if _BIAS in parts]
        places = find_places([*weights, *biases, *self.saved], base_specs, where)

        ends = [name for name in places if is_vocabulary(name)]
        heads = [name for name in ends if is_head(name)]
        if not ends or not is_tied(base_specs, config):
            return refuse_missing(places, where), config
        if not self.config.ensure_weight_tying and any(map(self._saves, ends)):
            if not any(name in self.saved for name in heads):
                raise InputError(
                    f"{where}: {ends[0]} in modules_to_save parts it from the output head it was "
                    "tied to, which the adapter does not hold; merge it with peft first"
                )
            places |= {name: name for name in heads if places[name] is None}
            config = {**config, "tie_word_embeddings": False}
        elif any(map(is_head, base_specs)):
            raise InputError(
                f"{where} changes tied embeddings, and the base stores both of them; save the base "
                "again with transformers, which stores one"
            )
        elif self.config.ensure_weight_tying and any(name in weights for name in ends):
            raise InputError(
                f"{where}: ensure_weight_tying with an update of the embeddings is not supported; "
                "peft itself adds that update twice when it merges"
            )
        else:
            places |= dict.fromkeys(heads, input_embedding(base_specs, where))
        return refuse_missing(places, where), config

    def _saves(self, name: str) -> bool:
        return name in self.saved and self.config.saves(name.rpartition(".")[0])

    def _copied(
        self, place: str, keys: Sequence[str], specs: Mapping[str, TensorSpec]
    ) -> TensorSpec:
        """Spec of a tensor that the adapter holds whole, which may have another vocabulary."""
        base = specs.get(place) or specs[input_embedding(specs, str(self.file.path))]
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


@dataclass
class BoundAdapter:
    """An adapter on its base: which tensors it changes, what they are afterwards, and how.

    `specs` and `config` are the folded checkpoint's, in the dtypes of the base: a vocabulary may
    have grown, and an output head that was trained apart from the embedding it was tied to is a
    tensor of its own. `edits` gives, for each tensor that is touched, the steps to it in their
    order.
    """

    file: SafetensorsFile
    specs: Mapping[str, TensorSpec]
    config: dict[str, Any]
    edits: Mapping[str, Sequence[Edit]]
    bytes_read: int = 0

    def touches(self, name: str) -> bool:
        """Whether folding changes the tensor `name`, or adds it."""
        return name in self.edits

    def fold(self, name: str, array: np.ndarray | None) -> np.ndarray:
        """The folded tensor of a touched `name`, from the base's `array`; None if it has none.

        In the dtype that it is computed in, `folded_dtype` of that in `specs`.
        """
        wide = folded_dtype(self.specs[name].dtype)

        def read(key: str) -> np.ndarray:
            self.bytes_read += self.file.specs[key].nbytes
            return self.file.read(key).astype(wide, copy=False)

        tensor = np.empty(0, wide) if array is None else array.astype(wide, copy=False)
        # what is not finite is found, and named, where tensors are merged
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            for edit in self.edits[name]:
                tensor = edit(tensor, read)
            return tensor


def folded_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype of a folded tensor that its base stores in `dtype`: float32, or float64 of one."""
    return np.promote_types(dtype, np.float32)


def read_adapter(folder: Path) -> Adapter:
    """Read adapter_config.json, and the header of adapter_model.safetensors, in `folder`.

    Raises InputError if either is missing or malformed, if the adapter is of a kind that cannot be
    folded (see `read_lora_config`), or if it is a pickle (.bin).
    """
    config = read_lora_config(folder / "adapter_config.json")
    path = folder / "adapter_model.safetensors"
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
        if spec.dtype not in _FLOATS:
            raise InputError(f"{path}: {key} is {spec.dtype}; only floats can be folded")
        name = key.removeprefix(_PREFIX)
        if part := _PART.fullmatch(name):
            updates[part["module"]][part["part"]] = key
        elif not _is_second_copy(key, file.specs):
            name = _WRAPPER.sub("", name)
            if name in saved:
                raise InputError(f"{path}: {saved[name]} and {key} are both {name}")
            saved[name] = key
    return Adapter(file, config.of(updates, folder / "adapter_config.json"), dict(updates), saved)


def _is_second_copy(key: str, keys: Container[str]) -> bool:
    """Whether peft wrote this tensor beside itself, as it does after a vocabulary has grown."""
    plain = _SECOND_COPY.sub("", key)
    return plain != key and plain in keys
