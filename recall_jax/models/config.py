"""Convert a Hugging Face config.json to an `Architecture`; unknown attributes are refused."""

from collections.abc import Collection, Mapping
from typing import Any

from recall_jax.checkpoint.class_defaults import completed
from recall_jax.checkpoint.quantised import KEYS, quantised_by
from recall_jax.errors import InputError, shown
from recall_jax.models.architecture import Architecture
from recall_jax.models.attributes import Attributes
from recall_jax.models.families import FAMILIES

_GENERIC = """
    _attn_implementation _attn_implementation_autoset _commit_hash _model_name_or_path _name_or_path
    add_cross_attention architectures attn_implementation bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size eos_token_id
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
"""Attributes that change nothing at this value in a family that does not read them."""


def read_architecture(
    config: Mapping[str, Any], *, ignore: Collection[str] = (), where: str = "config.json"
) -> Architecture:
    """Return the Architecture that a config.json, written by transformers 4 or 5, describes.

    Absent attributes take the defaults of the family's class in transformers. Names in `ignore` are
    treated as absent; those inside the rope object are written `rope_scaling.NAME`.

    Raises:
        InputError: for an unsupported model_type, a value of the wrong kind, or an attribute that
            is not handled, nor known to be harmless, nor null, nor its class's default.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        raise InputError(f"{where}: model_type is {shown(model_type)}; supported are {known}")
    reader = Attributes(without(config, ignore), where)
    architecture = FAMILIES[model_type].architecture(reader)
    unsloth = {name for name in reader.remaining if name.startswith("unsloth_")}
    harmless = {"model_type", *unsloth, *HARMLESS}
    if quantised_by(config) is None:
        harmless |= {*KEYS}
    reader.drop(harmless, INERT)
    if reader.remaining:  # the class's defaults apply whether the file states them or not
        reader.drop(inert=completed({"model_type": model_type}))
    reader.finish()
    return architecture


def without(config: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Return `config` without the names in `ignore`; "outer.inner" removes from an inner object."""
    kept = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            value = {key: item for key, item in value.items() if f"{name}.{key}" not in ignore}
        if name not in ignore:
            kept[name] = value
    return kept
