"""Which unit a tensor belongs to, by the names that transformers writes, and what has no one order.

A model with two stacks of layers (an encoder and a decoder, a vision tower) numbers both alike.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from jax.tree_util import DictKey
from toys import Recall

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.units import stacks_of, unit_of_tensor
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.jobs.trees.merge_trees import merge_trees, unit_of_path
from recall_jax.recipes.recipe import make_recipe

TEXT = {
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
SEQ2SEQ = {
    "vocab_size": 16,
    "d_model": 8,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 8,
    "decoder_ffn_dim": 8,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}
GPT = {"vocab_size": 16, "n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 16}
VISION = {
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
MROPE = {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
T5 = {"vocab_size": 16, "d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 2, "num_heads": 2}

# class -> config, stacks, all that is embed and some that is head: stems of names as on disk
MODELS: dict[str, tuple[dict[str, Any], tuple[str, ...], set[str], set[str]]] = {
    "LlamaForCausalLM": (TEXT, ("model.layers",), {"model.embed_tokens"}, {"model.norm"}),
    "PhiForCausalLM": (TEXT, ("model.layers",), {"model.embed_tokens"}, {"lm_head"}),
    "GPT2LMHeadModel": (
        GPT,
        ("transformer.h",),
        {"transformer.wte", "transformer.wpe"},
        {"transformer.ln_f"},
    ),
    "GPTNeoXForCausalLM": (TEXT, ("gpt_neox.layers",), {"gpt_neox.embed_in"}, {"embed_out"}),
    "BloomForCausalLM": (
        {"vocab_size": 16, "hidden_size": 8, "n_layer": 2, "n_head": 2},
        ("transformer.h",),
        {"transformer.word_embeddings", "transformer.word_embeddings_layernorm"},
        {"transformer.ln_f"},
    ),
    "OPTForCausalLM": (
        {**TEXT, "ffn_dim": 8, "word_embed_proj_dim": 4},
        ("model.decoder.layers",),
        {
            "model.decoder.embed_tokens",
            "model.decoder.embed_positions",
            "model.decoder.project_in",
        },
        {"model.decoder.project_out"},
    ),
    "MixtralForCausalLM": (
        {**TEXT, "num_local_experts": 4},
        ("model.layers",),
        {"model.embed_tokens"},
        {"lm_head"},
    ),
    "BertForSequenceClassification": (
        TEXT,
        ("bert.encoder.layer",),
        {
            "bert.embeddings.word_embeddings",
            "bert.embeddings.position_embeddings",
            "bert.embeddings.token_type_embeddings",
            "bert.embeddings.LayerNorm",
        },
        {"bert.pooler.dense", "classifier"},
    ),
    "ElectraForMaskedLM": (
        {**TEXT, "embedding_size": 4},
        ("electra.encoder.layer",),
        {
            "electra.embeddings.word_embeddings",
            "electra.embeddings.position_embeddings",
            "electra.embeddings.token_type_embeddings",
            "electra.embeddings.LayerNorm",
            "electra.embeddings_project",
        },
        {"generator_predictions.dense", "generator_lm_head"},
    ),
    "T5ForConditionalGeneration": (
        T5,
        ("decoder.block", "encoder.block"),
        {"shared"},
        {"encoder.final_layer_norm", "decoder.final_layer_norm"},
    ),
    "BartForConditionalGeneration": (
        SEQ2SEQ,
        ("model.decoder.layers", "model.encoder.layers"),
        {
            "model.shared",
            "model.encoder.embed_positions",
            "model.decoder.embed_positions",
            "model.encoder.layernorm_embedding",
            "model.decoder.layernorm_embedding",
        },
        set(),
    ),
    "WhisperForConditionalGeneration": (
        SEQ2SEQ
        | {"max_source_positions": 16, "max_target_positions": 16, "num_mel_bins": 4}
        | {"bos_token_id": 0, "eos_token_id": 0, "decoder_start_token_id": 0},
        ("model.decoder.layers", "model.encoder.layers"),
        {
            "model.encoder.embed_positions",
            "model.decoder.embed_positions",
            "model.decoder.embed_tokens",
        },
        {"model.decoder.layer_norm"},
    ),
    "CLIPModel": (
        {
            "text_config": {k: v for k, v in TEXT.items() if k != "num_key_value_heads"},
            "vision_config": VISION,
            "projection_dim": 4,
        },
        ("text_model.encoder.layers", "vision_model.encoder.layers"),
        {
            "text_model.embeddings.token_embedding",
            "text_model.embeddings.position_embedding",
            "vision_model.embeddings",
            "vision_model.embeddings.patch_embedding",
            "vision_model.embeddings.position_embedding",
        },
        {"text_projection", "vision_model.post_layernorm"},
    ),
    "Qwen2VLForConditionalGeneration": (
        {
            "text_config": {**TEXT, **MROPE},
            "vision_config": {"depth": 2, "embed_dim": 8, "hidden_size": 8, "num_heads": 2}
            | {"mlp_ratio": 1, "patch_size": 2},
        },
        ("model.layers", "visual.blocks"),
        {"model.embed_tokens", "visual.patch_embed.proj"},
        {"visual.merger.mlp.0", "visual.merger.mlp.2", "model.norm"},
    ),
    "Gemma3ForConditionalGeneration": (
        {"text_config": TEXT, "vision_config": VISION, "mm_tokens_per_image": 4},
        (
            "language_model.model.layers",
            "vision_tower.encoder.layers",
        ),
        {
            "language_model.model.embed_tokens",
            "vision_tower.embeddings.patch_embedding",
            "vision_tower.embeddings.position_embedding",
        },
        {"language_model.model.norm"},
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_units_of_the_names_that_transformers_writes(kind, tmp_path):
    import transformers

    config, stacks, embed, head = MODELS[kind]
    model_class = getattr(transformers, kind)
    model_class(model_class.config_class(**config)).save_pretrained(tmp_path)
    names = list(open_checkpoint(tmp_path).specs)
    assert set(names) == set(safetensors.numpy.load_file(tmp_path / "model.safetensors"))
    by_unit: dict[str, set[str]] = {}
    for name in names:
        by_unit.setdefault(unit_of_tensor(name), set()).add(name.rpartition(".")[0])
    assert by_unit.keys() == {"embed", "layers.0", "layers.1", "head"}
    assert by_unit["embed"] == embed
    assert by_unit["head"] >= head
    assert tuple(sorted(stacks_of(names))) == stacks


@pytest.mark.parametrize(
    ("name", "unit", "stack"),
    [
        ("gpt_neox.layers.3.attention.dense.weight", "layers.3", "gpt_neox.layers"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "layers.1", "encoder.block"),
        ("model.layers.5.mlp.experts.3.w1.weight", "layers.5", "model.layers"),
        ("model.layers.1.block_sparse_moe.experts.7.w2.weight", "layers.1", "model.layers"),
        ("bert.encoder.layer.11.attention.output.dense.bias", "layers.11", "bert.encoder.layer"),
        ("model.layers.61.shared_head.head.weight", "layers.61", "model.layers"),
        ("model.layers.61.embed_tokens.weight", "layers.61", "model.layers"),
        ("mtp.layers.0.self_attn.q_proj.weight", "layers.0", "mtp.layers"),
        ("visual.transformer.resblocks.2.ln_1.weight", "layers.2", "visual.transformer.resblocks"),
        ("encoder.stages.1.layers.0.dwconv.weight", "layers.0", "encoder.stages.1.layers"),
        ("wav2vec2.feature_extractor.conv_layers.4.conv.weight", "layers.4", None),
        ("mm_projector.0.weight", "head", None),
        ("classifier.1.weight", "head", None),
        ("embed_out.weight", "head", None),
        ("transformer.output_layer.weight", "head", None),
        ("output.weight", "head", None),
        ("tok_embeddings.weight", "embed", None),
        ("transformer.embedding.word_embeddings.weight", "embed", None),
        ("encoder.embed_tokens.weight", "embed", None),
        ("vit.embeddings.cls_token", "embed", None),
        ("albert.encoder.embedding_hidden_mapping_in.weight", "embed", None),
        ("layers.99999999999999999999999.w", "head", None),
    ],
)
def test_units_of_names_seen_on_the_hub(name, unit, stack):
    assert unit_of_tensor(name) == unit
    if stack is not None:
        assert stacks_of([name]) == (stack,)


# ------------------------------------------------------------------------------------ two stacks


@pytest.fixture(scope="module")
def t5(tmp_path_factory) -> list[str]:
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    folder = tmp_path_factory.mktemp("t5")
    for k in range(2):
        torch.manual_seed(k)
        T5ForConditionalGeneration(T5Config(**T5)).save_pretrained(folder / str(k))
    return [str(folder / str(k)) for k in range(2)]


def linear(models: list[str], first: Any, second: Any, **keys: Any) -> dict[str, Any]:
    weights = (first, second)
    return keys | {
        "merge_method": "linear",
        "models": [
            {"model": model, "parameters": {"weight": weight}}
            for model, weight in zip(models, weights, strict=True)
        ],
    }


def by_filter(encoder: float, rest: float) -> list[dict[str, Any]]:
    return [{"filter": "encoder.", "value": encoder}, {"value": rest}]


@pytest.mark.parametrize("filtered", [False, True])
def test_numbers_and_filters_merge_models_of_two_stacks(filtered, t5, tmp_path):
    parts = (by_filter(0.5, 0.25), by_filter(0.5, 0.75)) if filtered else (0.25, 0.75)
    job.merge(make_recipe(linear(t5, *parts)), tmp_path / "out")
    merged = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    first, second = (safetensors.numpy.load_file(f"{folder}/model.safetensors") for folder in t5)
    assert merged.keys() == second.keys()
    for name, array in merged.items():
        weight = 0.5 if filtered and "encoder." in name else 0.75
        expected = (1 - weight) * first[name] + weight * second[name]
        np.testing.assert_allclose(array, expected, atol=1e-6)


def refused(values: dict[str, Any], out: Path) -> str:
    with pytest.raises(InputError) as caught:
        job.merge(make_recipe(values), out)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.glob("*out*"))
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t5: linear(t5, [0, 1], 0.5), "the gradient of models.0.parameters.weight is"),
        (
            lambda t5: linear(t5, 0.5, [{"filter": "encoder.", "value": [1, 0]}, {"value": 1}]),
            "the gradient of models.1.parameters.weight is",
        ),
        (
            lambda t5: {
                "merge_method": "task_arithmetic",
                "base_model": t5[0],
                "models": [{"model": t5[1], "parameters": {"weight": 1}}],
                "parameters": {"lambda": [0, 1]},
            },
            "the gradient of parameters.lambda is",
        ),
        (lambda t5: linear(t5, 0.5, 0.5, weights="weights.json"), "weights is"),
        (
            lambda t5: {
                "merge_method": "recall",
                "models": [{"model": model} for model in t5],
                "samples": {"data": "data.jsonl"},
            },
            "merge_method recall is",
        ),
    ],
    ids=["gradient", "filtered", "lambda", "weights", "recall"],
)
def test_what_tells_layers_apart_is_refused_for_two_stacks(change, words, t5, tmp_path):
    said = refused(change(t5), tmp_path / "out")
    assert said.startswith(words)
    assert "encoder.block" in said and "decoder.block" in said


def test_layers_that_no_name_tells_have_no_order(tmp_path):
    """XLM numbers the parts of its layers: attentions.0, ffns.0."""
    from transformers import XLMConfig, XLMModel

    config = XLMConfig(vocab_size=16, emb_dim=8, n_layers=2, n_heads=2, max_position_embeddings=8)
    for k in range(2):
        XLMModel(config).save_pretrained(tmp_path / str(k))
    models = [str(tmp_path / str(k)) for k in range(2)]
    said = refused(linear(models, [0, 1], 0.5), tmp_path / "out")
    assert "these have none in their tensor names" in said
    job.merge(make_recipe(linear(models, by_filter(1, 0), 1)), tmp_path / "out")


def test_the_command_and_its_plan_refuse_alike(recall: Recall, t5, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(linear(t5, [0, 1], 0.5)))
    for words in (["merge", recipe, tmp_path / "out"], ["plan", recipe, "--devices", "v5e-1"]):
        done = recall(*words)
        assert (done.status, done.out, done.err.count("\n")) == (2, "", 1), done
        assert "more, decoder.block and encoder.block" in done.err


def test_what_a_model_holds_is_told_by_its_stacks(recall: Recall, t5):
    found = json.loads(recall("inspect", t5[0], "--json").out)
    assert found["stacks"] == ["decoder.block", "encoder.block"]
    assert "layers that share their units" in recall("inspect", t5[0]).out


# ----------------------------------------------------------------------------------------- trees


def two_stacks(name: Callable[[str, int], str]) -> dict[str, np.ndarray]:
    leaves = {"token_embed": np.ones(3, np.float32)}
    for stack in ("encoder", "decoder"):
        for layer in range(2):
            leaves[name(stack, layer)] = np.full(3, layer + 2, np.float32)
    return leaves


@pytest.mark.parametrize(
    "name",
    [
        lambda stack, layer: f"{stack}/layers_{layer}/w",
        lambda stack, layer: f"{stack}_blocks/{layer}/w",
        lambda stack, layer: f"{stack}/TransformerBlock_{layer}/w",
    ],
)
def test_trees_of_two_stacks_are_told_by_their_names(name, tmp_path):
    for k in range(2):
        leaves = {leaf: array * (k + 1) for leaf, array in two_stacks(name).items()}
        np.savez(tmp_path / f"{k}.npz", **leaves)
    models = [str(tmp_path / f"{k}.npz") for k in range(2)]
    job.merge(make_recipe(linear(models, 0.5, 0.5)), tmp_path / "merged")
    said = refused(linear(models, [0, 1], 0.5), tmp_path / "out")
    assert "encoder" in said and "decoder" in said
    patterns = {"embed": "token_embed", "layers": [name("encoder", 7), name("decoder", 7)]}
    patterns["layers"] = [layers.replace("7", "{i}") for layers in patterns["layers"]]
    values = linear(models, [0, 1], [1, 0], tree=patterns)  # these say which stack comes first
    job.merge(make_recipe(values), tmp_path / "ordered")


def test_weights_by_unit_of_a_tree_in_memory_are_refused_for_two_stacks():
    trees = [
        {"enc": {"layers_0": np.ones(2) * k}, "dec": {"layers_0": np.ones(2)}} for k in range(2)
    ]
    same = np.full((2, 3), 0.5, np.float32)
    assert float(merge_trees(trees, same, unit_of=unit_of_path)["enc"]["layers_0"][0]) == 0.5
    weights = np.float32([[0.5, 0.2, 0.5], [0.5, 0.8, 0.5]])
    with pytest.raises(InputError, match=r"dec\.layers and enc\.layers"):
        merge_trees(trees, weights, unit_of=unit_of_path)
    merge_trees(trees, weights, unit_of=lambda path: 1)
    assert unit_of_path((DictKey("gpt"), DictKey("embed_out"), DictKey("kernel"))) == "head"
