"""What differs between two configs: what changes the function, whichever version wrote them."""

import json

import pytest
from transformers import AutoConfig

from recall_jax.checkpoint.class_defaults import completed
from recall_jax.models.differences import config_differences, describe_differences

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4}


def as_version_5(config, tmp_path):
    """The same config as transformers 5 reads and saves it."""
    known = dict(config)
    AutoConfig.for_model(known.pop("model_type"), **known).save_pretrained(tmp_path)
    return json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("one", "other", "name", "values"),
    [
        ({}, {"rope_theta": 1e6}, "rope_theta", (1e4, 1e6)),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_theta": 1e6}}, "rope_theta", (5e5, 1e6)),
        ({}, {"num_key_value_heads": 2}, "num_key_value_heads", (4, 2)),
        ({"hidden_act": "gelu"}, {}, "hidden_act", ("gelu", "silu")),
        ({"rms_norm_eps": 1e-5}, {}, "rms_norm_eps", (1e-5, 1e-6)),
        ({"attention_bias": True}, {}, "qkv_bias", (True, False)),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}},
            {"rope_scaling": {"type": "linear", "factor": 4}},
            "rope_factor",
            (2.0, 4.0),
        ),
    ],
)
def test_of_families_read_here_what_their_architecture_holds(one, other, name, values):
    found = config_differences(LLAMA | one, LLAMA | other)
    assert found[name] == values
    assert describe_differences({name: values}, "a", "b") == [
        f"{name} is {values[0]!r} in a and {values[1]!r} in b"
    ]


GEMMA2 = {"model_type": "gemma2", "num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
OTHERS = {
    "gemma2": GEMMA2,
    "gemma3_text": {"model_type": "gemma3_text", "num_hidden_layers": 3, "hidden_size": 2304},
    "phi3": {"model_type": "phi3", "rope_theta": 5e4, "num_hidden_layers": 2},
    "gpt_neox": {"model_type": "gpt_neox", "rotary_pct": 0.5, "rotary_emb_base": 20_000},
    "gpt2": {"model_type": "gpt2", "n_layer": 2},
    "mixtral": {"model_type": "mixtral", "rope_theta": 1e6, "num_hidden_layers": 2},
    "bert": {"model_type": "bert", "hidden_act": "relu"},
    "t5": {"model_type": "t5", "d_model": 8},
    "opt": {"model_type": "opt", "ffn_dim": 32},
    "falcon": {"model_type": "falcon", "rope_theta": 5e5},
    "olmo2": {"model_type": "olmo2", "rope_theta": 5e5, "num_hidden_layers": 2},
    "starcoder2": {"model_type": "starcoder2", "sliding_window": 64, "num_hidden_layers": 2},
}


# As version 4 of transformers wrote them, of the models that many fine-tunes are made from.
PUBLISHED = {
    "gemma-2-2b": {
        "architectures": ["Gemma2ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "attn_logit_softcapping": 50.0, "bos_token_id": 2, "cache_implementation": "hybrid",
        "eos_token_id": 1, "final_logit_softcapping": 30.0, "head_dim": 256,
        "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2304, "initializer_range": 0.02, "intermediate_size": 9216,
        "max_position_embeddings": 8192, "model_type": "gemma2", "num_attention_heads": 8,
        "num_hidden_layers": 26, "num_key_value_heads": 4, "pad_token_id": 0,
        "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0,
        "sliding_window": 4096, "torch_dtype": "float32", "transformers_version": "4.42.4",
        "use_cache": True, "vocab_size": 256000,
    },
    "gpt2": {
        "activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"],
        "attn_pdrop": 0.1, "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256,
        "initializer_range": 0.02, "layer_norm_epsilon": 1e-05, "model_type": "gpt2",
        "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12, "n_positions": 1024,
        "resid_pdrop": 0.1, "summary_activation": None, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": True, "summary_type": "cls_index", "summary_use_proj": True,
        "task_specific_params": {"text-generation": {"do_sample": True, "max_length": 50}},
        "vocab_size": 50257,
    },
    "bert-base-uncased": {
        "architectures": ["BertForMaskedLM"], "attention_probs_dropout_prob": 0.1,
        "gradient_checkpointing": False, "hidden_act": "gelu", "hidden_dropout_prob": 0.1,
        "hidden_size": 768, "initializer_range": 0.02, "intermediate_size": 3072,
        "layer_norm_eps": 1e-12, "max_position_embeddings": 512, "model_type": "bert",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 0,
        "position_embedding_type": "absolute", "transformers_version": "4.6.0.dev0",
        "type_vocab_size": 2, "use_cache": True, "vocab_size": 30522,
    },
    "pythia-70m": {
        "architectures": ["GPTNeoXForCausalLM"], "bos_token_id": 0, "eos_token_id": 0,
        "hidden_act": "gelu", "hidden_size": 512, "initializer_range": 0.02,
        "intermediate_size": 2048, "layer_norm_eps": 1e-05, "max_position_embeddings": 2048,
        "model_type": "gpt_neox", "num_attention_heads": 8, "num_hidden_layers": 6,
        "rotary_emb_base": 10000, "rotary_pct": 0.25, "tie_word_embeddings": False,
        "torch_dtype": "float16", "transformers_version": "4.24.0", "use_cache": True,
        "use_parallel_residual": True, "vocab_size": 50304,
    },
}  # fmt: skip


@pytest.mark.parametrize("old", [*OTHERS.values(), *PUBLISHED.values()], ids=[*OTHERS, *PUBLISHED])
def test_versions_4_and_5_of_one_config_do_not_differ(old, tmp_path):
    new = as_version_5(old, tmp_path)
    assert new != old and completed(old) is not None
    assert config_differences(old, new) == config_differences(new, old) == {}


@pytest.mark.parametrize(
    ("family", "change", "name", "values"),
    [
        ("gemma2", {"sliding_window": 8}, "sliding_window", (4096, 8)),
        ("gemma2", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar", (256, 64)),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping", (30.0, None)),
        ("gemma2", {"rope_theta": 2e4}, "rope_parameters.rope_theta", (1e4, 2e4)),
        ("gemma3_text", {"rope_local_base_freq": 5.0}, None, (1e4, 5.0)),
        ("gpt_neox", {"use_parallel_residual": False}, "use_parallel_residual", (True, False)),
        ("gpt2", {"n_head": 4}, "n_head", (12, 4)),
        ("gpt2", {"activation_function": "relu"}, "activation_function", ("gelu_new", "relu")),
        ("mixtral", {"num_experts_per_tok": 1}, "num_experts_per_tok", (2, 1)),
        ("bert", {"layer_norm_eps": 1e-5}, "layer_norm_eps", (1e-12, 1e-5)),
        ("bert", {"is_decoder": True}, "is_decoder", (False, True)),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before", (True, False)),
        ("falcon", {"alibi": True}, "alibi", (False, True)),
    ],
)
def test_of_other_families_all_that_is_not_known_to_be_harmless(
    family, change, name, values, tmp_path
):
    old = OTHERS[family]
    changed = old | change
    for one, other in ((old, changed), (as_version_5(old, tmp_path), changed)):
        found = config_differences(one, other)
        assert values in found.values()
        assert name is None or found[name] == values


def test_what_is_harmless_is_none():
    harmless = {
        "torch_dtype": "float16", "transformers_version": "4.1", "_name_or_path": "x",
        "bos_token_id": 7, "eos_token_id": [1, 2], "image_token_id": 3, "resid_pdrop": 0.5,
        "attention_probs_dropout_prob": 0.7, "initializer_factor": 3.0, "use_cache": False,
        "router_aux_loss_coef": 0.5, "output_router_logits": True, "unsloth_version": "1",
        "auto_map": {"AutoConfig": "x.Y"}, "architectures": ["X"], "nothing": None,
        "_attn_implementation": "eager", "gradient_checkpointing": True,
    }  # fmt: skip
    for model_type in ("gemma2", "gpt2", "of_nobody"):
        config = {"model_type": model_type}
        assert config_differences(config, config | harmless) == {}
        assert config_differences(config | harmless, config) == {}


def test_of_families_that_nobody_knows_the_rope_is_brought_together():
    one = {"model_type": "of_nobody", "rope_theta": 1e4, "size": 3}
    same = {"model_type": "of_nobody", "size": 3, "rope_parameters": {"rope_theta": 1e4}}
    same["rope_parameters"]["rope_type"] = "default"
    assert config_differences(one, same) == config_differences(same, one) == {}
    scaled = one | {"rope_scaling": {"type": "linear", "factor": 2}, "deep": {"eps": 1e-5}}
    assert config_differences(one, scaled) == {
        "rope_parameters.rope_type": ("default", "linear"),
        "rope_parameters.factor": (None, 2),
        "deep.eps": (None, 1e-5),
    }
    assert describe_differences({"size": (None, 3)}, "a", "b") == [
        "size is not given in a and 3 in b"
    ]
    odd = one | {"rope_scaling": [1]}
    assert config_differences(one, odd)["rope_scaling"] == (None, [1])


def test_parts_are_compared_too(tmp_path):
    text = {"model_type": "llama", "num_hidden_layers": 1, "rope_theta": 1e4}
    one = {"model_type": "llava", "text_config": text}
    other = {"model_type": "llava", "text_config": text | {"rope_theta": 1e6}}
    assert config_differences(one, other) == {"text_config.rope_parameters.rope_theta": (1e4, 1e6)}
    assert config_differences(one, as_version_5(one, tmp_path)) == {}


def test_what_is_ignored_is_left_out():
    one, other = GEMMA2, GEMMA2 | {"sliding_window": 8, "mystery": 3}
    assert config_differences(one, other, {"sliding_window", "mystery"}) == {}
    plain = {"model_type": "llama", "mystery": 1}
    assert config_differences(plain, {"model_type": "llama"}, {"mystery"}) == {}
    assert config_differences(plain, {"model_type": "llama"}) == {"mystery": (1, None)}


def test_nothing_is_made_of_a_number_of_layers_that_nobody_has():
    one = {"model_type": "llama", "num_hidden_layers": 2**31 - 1}
    other = {"model_type": "llama", "num_hidden_layers": 32}
    assert config_differences(one, other) == {"num_hidden_layers": (2**31 - 1, 32)}
