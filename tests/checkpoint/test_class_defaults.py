"""What a config.json leaves unsaid, held against the classes of transformers and their files."""

import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModelForCausalLM, GemmaConfig, GemmaForCausalLM

from recall_jax.checkpoint.class_defaults import attribute, completed
from recall_jax.jobs.merge import merge
from recall_jax.recipes.recipe import make_recipe

FAMILIES = """
    bert bloom cohere falcon gemma gemma2 gemma3 gemma3_text gpt2 gpt_neo gpt_neox granite llama
    llava mistral mixtral olmo olmo2 opt phi phi3 qwen2 qwen2_moe qwen3 stablelm starcoder2 t5
"""


@pytest.mark.parametrize("model_type", FAMILIES.split())
def test_what_a_file_leaves_out_is_as_transformers_has_it(model_type):
    ours, theirs = {"model_type": model_type}, AutoConfig.for_model(model_type)
    for name in ("tie_word_embeddings", "max_position_embeddings", "hidden_size", "vocab_size"):
        expected = getattr(theirs, name, getattr(theirs.get_text_config(), name, None))
        assert attribute(ours, name) == expected, name


def test_the_families_whose_head_is_tied_unless_the_file_says_otherwise():
    tied = {
        each for each in FAMILIES.split() if attribute({"model_type": each}, "tie_word_embeddings")
    }
    assert tied == {
        "bert", "bloom", "cohere", "falcon", "gemma", "gemma2", "gemma3", "gemma3_text", "gpt2",
        "gpt_neo", "opt", "starcoder2", "t5",
    }  # fmt: skip


def test_what_is_asked_of_the_most_usual_models_loads_no_transformers():
    code = """
import sys
from recall_jax.checkpoint.class_defaults import attribute
for family in ("llama", "mistral", "qwen2", "qwen3"):
    assert attribute({"model_type": family}, "tie_word_embeddings") is False
assert "transformers" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_a_file_says_stands():
    gemma = {"model_type": "gemma", "tie_word_embeddings": False, "rms_norm_eps": None}
    assert attribute(gemma, "tie_word_embeddings") is False
    assert attribute(gemma, "rms_norm_eps", 1.0) is None
    assert attribute({"model_type": "gpt2", "n_positions": 77}, "max_position_embeddings") == 77


def test_of_a_config_of_parts_the_text_part_speaks_for_what_the_whole_lacks():
    text = {"model_type": "gemma2", "max_position_embeddings": 99}
    assert attribute({"model_type": "gemma3", "text_config": text}, "max_position_embeddings") == 99
    assert attribute({"model_type": "of_nobody", "text_config": text}, "tie_word_embeddings")
    llava = {
        "model_type": "llava",
        "text_config": {"model_type": "llama", "tie_word_embeddings": True},
    }
    assert attribute(llava, "tie_word_embeddings") is True


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"model_type": None},
        {"model_type": ["gemma"]},
        {"model_type": "of_nobody", "text_config": 3},
        {"model_type": "gemma", "hidden_size": "big"},
        {"model_type": "gemma2", "num_hidden_layers": 10**12},
        {"model_type": "gpt_neo", "attention_types": [[["global"], 10**12]]},
        {"model_type": "qwen2", "num_labels": 10**12},
        {"model_type": "detr", "backbone": "somebody/something"},
    ],
    ids=str,
)  # fmt: skip
def test_no_class_is_shown_what_it_cannot_take(config, capfd):
    before = str(config)
    assert completed(config) is None
    assert attribute(config, "of_nobody", 7) == 7
    assert str(config) == before
    assert capfd.readouterr() == ("", "")


def test_a_class_keeps_silent_and_changes_nothing(capfd):
    level = logging.getLogger("transformers").level
    config = {
        "model_type": "gpt_neox",
        "vocab_size": 3,
        "rope_scaling": {"type": "linear", "factor": 2},
    }
    filled = completed(config)
    assert filled["rope_parameters"]["rope_theta"] == 10_000
    assert config["rope_scaling"] == {"type": "linear", "factor": 2}
    assert capfd.readouterr() == ("", "")
    assert logging.getLogger("transformers").level == level
    refused = {"model_type": "gemma", "hidden_size": "big"}
    assert completed(refused) is None and attribute(refused, "tie_word_embeddings") is True


def test_a_base_and_a_fine_tune_that_other_versions_saved_merge(tmp_path):
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    config = GemmaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    for name in ("base", "tuned"):
        GemmaForCausalLM(config).save_pretrained(tmp_path / name)
    file = tmp_path / "base" / "config.json"
    lines = [line for line in file.read_text().splitlines() if "tie_word_embeddings" not in line]
    file.write_text("\n".join(lines))  # as transformers 4 writes it
    models = [{"model": str(tmp_path / name)} for name in ("base", "tuned")]
    recipe = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}}
    merge(make_recipe(recipe), tmp_path / "out")
    both = [load_file(tmp_path / name / "model.safetensors") for name in ("base", "tuned", "out")]
    assert "lm_head.weight" not in both[2]
    for name, merged in both[2].items():
        np.testing.assert_allclose(
            merged, (both[0][name] + both[1][name]) / 2, rtol=1e-6, atol=1e-8
        )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(loaded.lm_head.weight, loaded.model.embed_tokens.weight)
