"""From a Hugging Face config.json to an `Architecture`; what is not known is refused by name."""

import math
from collections.abc import Collection, Mapping
from typing import Any

from recall_jax.errors import InputError
from recall_jax.models.architecture import Architecture, Rope

_GENERIC = """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path add_cross_attention
    architectures attn_implementation bad_words_ids begin_suppress_tokens bos_token_id
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty
    do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id
    id2label is_decoder is_encoder_decoder label2id length_penalty max_length min_length
    name_or_path no_repeat_ngram_size num_beam_groups num_beams num_labels num_return_sequences
    output_attentions output_hidden_states output_scores pad_token_id prefix problem_type
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id
    suppress_tokens task_specific_params temperature tf_legacy_loss tie_encoder_decoder
    tie_last_hidden_states tokenizer_class top_k top_p torch_dtype torchscript transformers_version
    typical_p use_bfloat16
"""
_TRAINING_AND_TOOLS = """
    attention_dropout gradient_checkpointing initializer_range is_llama_config max_sequence_length
    model_max_length pretraining_tp transformers.js_config unk_token_id use_cache
"""
HARMLESS = frozenset((_GENERIC + _TRAINING_AND_TOOLS).split())
"""Attributes that no forward pass here depends on, whatever their value: those that transformers 4
and 5 write for every model, and those that training and export tools leave behind."""

INERT: Mapping[str, Any] = {
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "pruned_heads": {},
    "rope_interleaved": False,
    "use_mrope": False,
}
"""Attributes that change nothing at this value (or null) in a family that does not read them."""

ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "relu")

_REQUIRED = object()


class Config:
    """The attributes of one JSON object, each checked as it is taken; what is left is unknown."""

    def __init__(self, attributes: Mapping[str, Any], where: str) -> None:
        """`where` names the file, and the object in it, in errors."""
        self.remaining = dict(attributes)
        self.where = where

    def _take(self, name: str, default: Any, kind: Any, what: str, null: bool = False) -> Any:
        if name not in self.remaining:
            if default is _REQUIRED:
                raise InputError(f"{self.where}: {name} is missing, and must be {what}")
            return default
        value = self.remaining.pop(name)
        if value is None and (null or default is None):
            return None
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.error(name, value, what)
        return value

    def error(self, name: str, value: Any, what: str) -> InputError:
        """The error that `name` has a value it cannot have; `what` says what it must be."""
        return InputError(f"{self.where}: {name} is {value!r}, and must be {what}")

    def integer(
        self, name: str, default: Any = _REQUIRED, *, minimum: int = 1, null: bool = False
    ) -> Any:
        """An integer of at least `minimum`; null where `null`, or where the default is None."""
        what = f"an integer of at least {minimum}"
        value = self._take(name, default, int, what, null)
        if value is not None and value < minimum:
            raise self.error(name, value, what)
        return value

    def number(self, name: str, default: Any = _REQUIRED, minimum: float = 0.0) -> Any:
        """A finite number above zero and no less than `minimum`; null where the default is None."""
        what = f"a number of at least {minimum:g}" if minimum else "a number above zero"
        value = self._take(name, default, (int, float), what)
        if value is not None and not (math.isfinite(value) and value > 0 and value >= minimum):
            raise self.error(name, value, what)
        return None if value is None else float(value)

    def flag(self, name: str, default: Any = _REQUIRED) -> Any:
        """True or false."""
        return self._take(name, default, bool, "true or false")

    def choice(self, name: str, choices: Collection[str], default: Any = _REQUIRED) -> Any:
        """One of a few words; null where the default is None."""
        what = "one of " + ", ".join(choices)
        value = self._take(name, default, str, what)
        if value is not None and value not in choices:
            raise self.error(name, value, what)
        return value

    def object(self, name: str) -> dict[str, Any]:
        """A JSON object, empty if absent or null."""
        return self._take(name, None, dict, "an object or null") or {}

    def words(self, name: str) -> list[str] | None:
        """A list of strings, or None if absent or null."""
        value = self._take(name, None, list, "a list of strings or null")
        if value is not None and not all(isinstance(word, str) for word in value):
            raise self.error(name, value, "a list of strings or null")
        return value

    def drop(self, harmless: Collection[str] = (), inert: Mapping[str, Any] | None = None) -> None:
        """Forget attributes that change nothing: by name, or by name and value (or null)."""
        for name, value in list(self.remaining.items()):
            if name in harmless or (
                inert and name in inert and (value is None or value == inert[name])
            ):
                del self.remaining[name]

    def finish(self, flag_prefix: str = "") -> None:
        """Refuse what nobody took."""
        if self.remaining:
            names = ", ".join(sorted(self.remaining))
            flags = " ".join(
                f"--ignore-config {flag_prefix}{name}" for name in sorted(self.remaining)
            )
            raise InputError(
                f"{self.where}: not understood, and may change what the model computes: {names}; "
                f"if you are sure that it does not, pass {flags}"
            )


def read_architecture(
    config: Mapping[str, Any], *, ignore: Collection[str] = (), where: str = "config.json"
) -> Architecture:
    """Architecture that a config.json, written by transformers 4 or 5, describes.

    Absent attributes take the defaults of the family's class in transformers. Names in `ignore` are
    read as absent; those inside the rope object are written `rope_scaling.NAME`.

    Raises:
        InputError: for an unsupported model_type, a value of the wrong kind, or an attribute that
            is neither handled nor known to be harmless.
    """
    from recall_jax.models.families import FAMILIES

    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise InputError(
            f"{where}: model_type is {model_type!r}; supported are {', '.join(sorted(FAMILIES))}"
        )
    reader = Config(without(config, ignore), where)
    architecture = FAMILIES[model_type].architecture(reader)
    unsloth = {name for name in reader.remaining if name.startswith("unsloth_")}
    reader.drop({"model_type", *unsloth, *HARMLESS}, INERT)
    reader.finish()
    return architecture


def without(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """`config` less the names in `ignore`, "outer.inner" reaching into an object."""
    kept = {}
    for name, value in config.items():
        if name in ignore:
            continue
        inner = {dotted.removeprefix(f"{name}.") for dotted in ignore}
        if isinstance(value, Mapping):
            value = {key: item for key, item in value.items() if key not in inner}
        kept[name] = value
    return kept


def read_rope(config: Config, max_position_embeddings: int) -> Rope:
    """Rotary embedding from `rope_parameters` (v5), or `rope_theta` and `rope_scaling` (v4).

    Precedence and defaults are those of transformers 5, except that two places which disagree are
    an error. `max_position_embeddings` is the family's default.
    """
    max_position_embeddings = config.integer("max_position_embeddings", max_position_embeddings)
    outer_theta = config.number("rope_theta", None)
    found = {name: config.object(name) for name in ("rope_scaling", "rope_parameters")}
    found = {name: rope for name, rope in found.items() if rope}
    if len(found) == 2 and found["rope_scaling"] != found["rope_parameters"]:
        raise InputError(f"{config.where}: rope_scaling and rope_parameters disagree; keep one")
    name, attributes = next(iter(found.items()), ("rope_parameters", {}))
    rope = Config(attributes, f"{config.where}: {name}")

    kinds = ("default", "linear", "dynamic", "llama3", "yarn")
    old_kind = rope.choice("type", kinds, None)
    kind = rope.choice("rope_type", kinds, old_kind) or "default"
    if old_kind not in (None, kind):
        raise InputError(f"{rope.where}: type {old_kind!r} and rope_type {kind!r} disagree")
    theta = rope.number("rope_theta", outer_theta) or 10_000.0
    if outer_theta not in (None, theta):
        raise InputError(f"{rope.where}: rope_theta {theta} is {outer_theta} at the top level")
    fields: dict[str, Any] = {}
    if kind in ("linear", "dynamic", "llama3"):
        fields["factor"] = rope.number("factor", minimum=1.0)
    if kind == "dynamic":
        fields["original_max_position_embeddings"] = max_position_embeddings
    if kind in ("llama3", "yarn"):
        fields["original_max_position_embeddings"] = (
            rope.integer("original_max_position_embeddings", None) or max_position_embeddings
        )
    if kind == "llama3":
        fields["low_freq_factor"] = rope.number("low_freq_factor")
        fields["high_freq_factor"] = rope.number("high_freq_factor")
        if fields["high_freq_factor"] <= fields["low_freq_factor"]:
            raise rope.error(
                "high_freq_factor", fields["high_freq_factor"], "above low_freq_factor"
            )
    if kind == "yarn":
        fields |= _read_yarn(
            rope, max_position_embeddings / fields["original_max_position_embeddings"]
        )
    rope.drop(inert=INERT)
    rope.finish(f"{name}.")
    return Rope(kind=kind, theta=theta, **fields)


def _read_yarn(rope: Config, implied_factor: float) -> dict[str, Any]:
    factor = rope.number("factor", None, minimum=1.0) or implied_factor
    mscale, mscale_all_dim = rope.number("mscale", None), rope.number("mscale_all_dim", None)

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    derived = magnitude(1.0)
    if mscale and mscale_all_dim:
        derived = magnitude(mscale) / magnitude(mscale_all_dim)
    return {
        "factor": factor,
        "attention_factor": rope.number("attention_factor", None) or derived,
        "beta_fast": rope.number("beta_fast", None) or 32.0,
        "beta_slow": rope.number("beta_slow", None) or 1.0,
        "truncate": rope.flag("truncate", True),
    }
