"""Reading config.json: what transformers reads from the same file, and what is refused."""

import json

import pytest
from transformers import AutoConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config
from transformers.activations import ACT2FN

from recall_jax.errors import InputError
from recall_jax.models.architecture import ACTIVATIONS
from recall_jax.models.config import read_architecture
from recall_jax.models.decoder import ACTIVATIONS as ACTIVATION_FUNCTIONS
from recall_jax.models.families import FAMILIES

LLAMA_2 = {
    "_name_or_path": "meta-llama/Llama-2-7b-chat-hf", "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 4096,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "tie_word_embeddings": False, "torch_dtype": "float16", "transformers_version": "4.32.0",
    "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
LLAMA_32 = {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 64,
    "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
    "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False,
    "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 16,
    "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "rope_theta": 500000.0, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "unsloth_fixed": True, "use_cache": True,
    "vocab_size": 128256,
}  # fmt: skip
MISTRAL = {
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000,
}  # fmt: skip
QWEN2 = {
    "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
    "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 896,
    "initializer_range": 0.02, "intermediate_size": 4864, "max_position_embeddings": 32768,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.1", "use_cache": True,
    "use_mrope": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 151643, "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 1024, "initializer_range": 0.02, "intermediate_size": 3072,
    "max_position_embeddings": 40960, "max_window_layers": 28, "model_type": "qwen3",
    "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "transformers_version": "4.51.0",
    "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}


def rewritten(config, tmp_path):
    """The same config as transformers 5 reads and saves it."""
    known = dict(config)
    AutoConfig.for_model(known.pop("model_type"), **known).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config])
def test_defaults_are_those_of_transformers(kind):
    assert read_architecture({"model_type": kind.model_type}) == read_architecture(kind().to_dict())


@pytest.mark.parametrize(
    "config",
    [
        LLAMA_2,
        LLAMA_32,
        MISTRAL,
        QWEN2,
        QWEN3,
        MISTRAL | {"sliding_window": None, "head_dim": 128},
        LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 2}},
        LLAMA_2 | {"rope_scaling": {"rope_type": "dynamic", "type": "dynamic", "factor": 2.5}},
        LLAMA_2 | {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.0}},
        LLAMA_2 | {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_theta": 5e5},
        LLAMA_2 | {"rope_scaling": YARN | {"attention_factor": 1.5, "beta_fast": 16}},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 512},
        QWEN2 | {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 0},
        QWEN3 | {"use_sliding_window": True, "sliding_window": None},
    ],
)  # fmt: skip
def test_a_v4_file_means_what_transformers_5_makes_of_it(config, tmp_path):
    assert read_architecture(config) == read_architecture(rewritten(config, tmp_path))


def test_the_fields_of_known_checkpoints():
    arch = read_architecture(LLAMA_32)
    assert (arch.num_key_value_heads, arch.head_dim, arch.tie_word_embeddings) == (8, 64, True)
    assert (arch.rope.kind, arch.rope.theta, arch.rope.factor) == ("llama3", 500_000.0, 32.0)
    assert arch.rope.original_max_position_embeddings == 8192
    assert arch.windows == (None,) * 16
    assert len(arch.units) == 18

    assert read_architecture(MISTRAL).windows == (4096,) * 32
    assert read_architecture(QWEN2).windows == (None,) * 24
    upper = read_architecture(QWEN2 | {"use_sliding_window": True, "sliding_window": 512})
    assert upper.windows == (None,) * 21 + (512,) * 3
    assert upper.qkv_bias and not upper.output_bias
    assert read_architecture(QWEN3).qk_norm
    kinds = ["sliding_attention", "full_attention"] * 14
    mixed = QWEN3 | {"use_sliding_window": True, "sliding_window": 9, "layer_types": kinds}
    assert read_architecture(mixed).windows == (9, None) * 14


def test_what_does_not_affect_the_forward_is_not_in_the_architecture():
    noise = {"torch_dtype": "float32", "max_position_embeddings": 7, "attention_dropout": 0.5}
    noise |= {
        "pretraining_tp": 4,
        "unsloth_version": "1",
        "_model_name_or_path": "of a GGUF",
        "rope_interleaved": False,
    }
    assert read_architecture(LLAMA_2 | noise) == read_architecture(LLAMA_2)


SCALED = LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 2.0}}


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({}, ["model_type is None", "llama, mistral, qwen2, qwen3"]),
        ({"model_type": "gpt2"}, ["'gpt2'", "llama, mistral, qwen2, qwen3"]),
        (LLAMA_2 | {"mystery": 1}, ["mystery", "--ignore-config mystery"]),
        (LLAMA_2 | {"quantization_config": {"bits": 4}}, ["quantization_config"]),
        (LLAMA_2 | {"rope_interleaved": True}, ["rope_interleaved"]),
        (LLAMA_2 | {"partial_rotary_factor": 0.5}, ["partial_rotary_factor"]),
        (LLAMA_2 | {"sliding_window": 4096}, ["sliding_window"]),
        (MISTRAL | {"attention_bias": True}, ["attention_bias"]),
        (MISTRAL | {"layer_types": ["full_attention"] * 32}, ["layer_types"]),
        (MISTRAL | {"sliding_window": 0}, ["sliding_window is 0"]),
        (LLAMA_2 | {"hidden_size": "big"}, ["hidden_size is 'big'", "integer"]),
        (LLAMA_2 | {"hidden_size": True}, ["hidden_size is True", "integer"]),
        (LLAMA_2 | {"hidden_size": None}, ["hidden_size is None", "integer"]),
        (LLAMA_2 | {"num_hidden_layers": -1}, ["num_hidden_layers is -1"]),
        (LLAMA_2 | {"num_key_value_heads": 5}, ["num_key_value_heads is 5", "32"]),
        (LLAMA_2 | {"num_attention_heads": 3, "num_key_value_heads": 3}, ["is 3", "4096"]),
        (LLAMA_2 | {"head_dim": 7}, ["head_dim is 7", "even"]),
        (LLAMA_2 | {"hidden_act": "mish"}, ["hidden_act is 'mish'", "silu"]),
        (LLAMA_2 | {"rms_norm_eps": float("nan")}, ["rms_norm_eps is nan"]),
        (LLAMA_2 | {"tie_word_embeddings": 1}, ["tie_word_embeddings is 1", "true or false"]),
        (LLAMA_2 | {"rope_scaling": [1]}, ["rope_scaling is [1]", "object"]),
        (LLAMA_2 | {"rope_scaling": {"type": "longrope"}}, ["type is 'longrope'", "yarn"]),
        (LLAMA_2 | {"rope_scaling": {"type": "linear"}}, ["rope_scaling: factor is missing"]),
        (LLAMA_2 | {"rope_scaling": {"type": "linear", "factor": 0.5}}, ["factor is 0.5"]),
        (LLAMA_2 | {"rope_theta": 1}, ["rope_theta is 1.0"]),
        (LLAMA_2 | {"rope_scaling": YARN | {"short_factor": [1.0]}},
         ["rope_scaling", "--ignore-config rope_scaling.short_factor"]),
        (LLAMA_2 | {"rope_scaling": YARN | {"rope_type": "linear"}}, ["'yarn'", "'linear'"]),
        (LLAMA_2 | {"rope_parameters": {"full_attention": {}}}, ["full_attention"]),
        (LLAMA_32 | {"rope_scaling": LLAMA_32["rope_scaling"] | {"high_freq_factor": 1.0}},
         ["high_freq_factor is 1.0"]),
        (SCALED | {"rope_parameters": {"rope_type": "default"}}, ["disagree"]),
        (LLAMA_32 | {"rope_parameters": {"rope_theta": 1e4}, "rope_scaling": None},
         ["rope_theta", "500000.0"]),
        (QWEN2 | {"layer_types": ["full_attention"]}, ["layer_types", "24"]),
        (QWEN2 | {"layer_types": ["chunked_attention"] * 24}, ["layer_types"]),
        (QWEN2 | {"layer_types": ["sliding_attention"] * 24}, ["use_sliding_window is False"]),
        (QWEN2 | {"layer_types": "full"}, ["layer_types is 'full'"]),
    ],
)  # fmt: skip
def test_refusals_are_one_line_that_names_the_attribute_and_the_file(config, said):
    with pytest.raises(InputError) as error:
        read_architecture(config, where="merged/config.json")
    message = str(error.value)
    assert message.startswith("merged/config.json") and "\n" not in message
    for words in said:
        assert words in message


def test_ignored_attributes_read_as_absent():
    plain = read_architecture(LLAMA_2)
    assert read_architecture(LLAMA_2 | {"mystery": 1}, ignore={"mystery"}) == plain
    assert read_architecture(SCALED, ignore={"rope_scaling"}) == plain
    odd = SCALED | {"rope_scaling": SCALED["rope_scaling"] | {"odd": 1}}
    assert read_architecture(odd, ignore={"rope_scaling.odd"}) == read_architecture(SCALED)
    with pytest.raises(InputError, match="odd"):
        read_architecture(odd, ignore={"odd"})
    assert odd["rope_scaling"]["odd"] == 1


def test_every_activation_that_is_read_is_there():
    assert set(ACTIVATIONS) == set(ACTIVATION_FUNCTIONS)
    assert set(ACTIVATIONS) <= set(ACT2FN)


def test_a_family_is_registered_under_its_model_type():
    for model_type, family in FAMILIES.items():
        assert family.model_type == model_type
        assert read_architecture({"model_type": model_type}).family == model_type
