"""Names in checkpoints: buffers that carry no parameter, prefixes of other wrappers of a model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.parameter_names import is_buffer, match_names
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.inputs import common_architecture
from recall_jax.engine.plan import open_models
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.jobs.verify import verify
from recall_jax.recipes.recipe import make_recipe

WEIGHTS = "model.safetensors"
Tensors = dict[str, np.ndarray]
FLOAT = np.dtype(np.float32)


@pytest.mark.parametrize(
    ("name", "shape", "buffer"),
    [
        ("transformer.h.0.attn.bias", (1, 1, 8, 8), True),
        ("h.0.crossattention.bias", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.attention.bias", (1, 1, 8, 8), True),
        ("gpt_neox.layers.0.attention.bias", (1, 1, 8, 8), True),
        ("layers.0.attention.bias", (8,), False),
        ("transformer.h.0.attn.c_attn.bias", (8,), False),
        ("encoder.attention.bias", (1, 4, 8, 8), False),
        ("gpt_neox.layers.0.attention.masked_bias", (), True),
        ("transformer.h.0.attn.causal_mask", (1, 1, 8, 8), True),
        ("transformer.h.0.attn.embed_positions", (8, 4), True),
        ("model.encoder.embed_positions.weights", (8, 4), True),
        ("model.encoder.embed_positions.weight", (8, 4), False),
        ("embeddings.position_ids", (1, 8), True),
        ("bert.embeddings.token_type_ids", (1, 8), True),
        ("position_ids", (1, 8), True),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (4,), True),
        ("model.rotary_emb.full_attention_inv_freq", (4,), True),
        ("model.layers.0.self_attn.rotary_emb.cos_cached", (1, 1, 8, 4), True),
        ("visual.rotary_pos_emb.inv_freq", (4,), True),
        ("blocks.0.attn.rope.freqs_cos", (8, 4), True),
        ("rope.freqs", (4,), True),
        ("freqs_cis", (8, 4), True),
        ("blocks.0.rotary_mix.weight", (8, 4), False),
        ("layers.0.blocks.0.attn.relative_position_index", (4, 4), True),
        ("layers.0.blocks.0.attn.relative_position_bias_table", (4, 4), False),
        ("decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight", (4, 2), True),
        ("decoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", (4, 2), False),
        ("bn.num_batches_tracked", (), True),
        ("bn.running_mean", (4,), False),
        ("final_logits_bias", (1, 16), False),
        ("model.layers.1.mlp.gate.e_score_correction_bias", (8,), False),
    ],
)
def test_buffers_are_told_by_name_and_shape(name, shape, buffer):
    assert is_buffer(name, TensorSpec(FLOAT, shape)) == buffer


@pytest.mark.parametrize("kind", ["GPTNeo", "GPTJ", "Bert", "ModernBert", "Qwen2", "Swin", "XGLM"])
def test_what_transformers_does_not_store_is_a_buffer(kind):
    import transformers

    sizes = {"num_layers": 2, "attention_types": [[["global", "local"], 1]]}
    config = getattr(transformers, f"{kind}Config")(**(sizes if kind == "GPTNeo" else {}))
    with torch.device("meta"):
        model = getattr(transformers, f"{kind}Model")(config)

    def named(tensors: object) -> dict[str, bool]:
        return {n: is_buffer(n, TensorSpec(FLOAT, tuple(t.shape))) for n, t in tensors}

    stored = model.state_dict().keys()
    buffers = named(model.named_buffers())
    assert any(name not in stored for name in buffers)
    assert all(found for name, found in buffers.items() if name not in stored), buffers
    assert not any(named(model.named_parameters()).values())


def test_names_meet_those_of_another_wrapper():
    bare, wrapped = ["wte", "h.0.a", "ln_f"], ["model.wte", "model.h.0.a", "model.ln_f", "head"]
    assert match_names(bare, wrapped) == dict(zip(bare, wrapped[:3], strict=True))
    assert match_names(wrapped, bare) == dict(zip(wrapped[:3], bare, strict=True))
    assert match_names(["a.x", "b.x"], ["x"]) == {"a.x": "x"}
    assert match_names(["encoder.w", "decoder.w"], ["encoder.w"]) == {"encoder.w": "encoder.w"}
    assert match_names(["x"], ["y"]) == {}


# ------------------------------------------------------------------------------------ whole models


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> list[Path]:
    """Two models as transformers saves them now."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8)
    for k in range(2):
        torch.manual_seed(k)
        GPT2LMHeadModel(config).save_pretrained(folder / str(k))
    return [folder / "0", folder / "1"]


def changed(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    shutil.copytree(source, target)
    tensors = safetensors.numpy.load_file(target / WEIGHTS)
    safetensors.numpy.save_file(change(tensors), target / WEIGHTS, {"format": "pt"})
    return target


def of_the_hub(tensors: Tensors) -> Tensors:
    """As gpt2 itself lies on the hub: without `transformer.`, with masks, here of no use at all."""
    bare = {name.removeprefix("transformer."): array for name, array in tensors.items()}
    for k in range(2):
        bare[f"h.{k}.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
        bare[f"h.{k}.attn.masked_bias"] = np.array(-np.inf, np.float32)
    return bare


def average(*models: Path) -> dict[str, object]:
    return {"merge_method": "average", "models": [{"model": str(model)} for model in models]}


@pytest.mark.parametrize("newest", ["now", "hub"])
def test_a_model_of_the_hub_merges_with_its_fine_tune(newest, gpt2, tmp_path):
    from transformers import GPT2LMHeadModel

    hub = changed(gpt2[0], tmp_path / "hub", of_the_hub)
    models = [hub, gpt2[1]] if newest == "now" else [gpt2[1], hub]
    job.merge(make_recipe(average(*models)), tmp_path / "out")
    merged = safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)
    first, second = (safetensors.numpy.load_file(folder / WEIGHTS) for folder in gpt2)
    prefix = "" if newest == "now" else "transformer."
    assert merged.keys() == {name.removeprefix(prefix) for name in first}
    for name, array in first.items():
        expected = (array + second[name]) / 2
        np.testing.assert_allclose(merged[name.removeprefix(prefix)], expected, atol=1e-7)
    loaded, info = GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    both = [GPT2LMHeadModel.from_pretrained(folder) for folder in gpt2]
    with torch.no_grad():
        for own, *parts in zip(loaded.parameters(), *(m.parameters() for m in both), strict=True):
            parts[0].copy_((parts[0] + parts[1]) / 2)
            torch.testing.assert_close(own, parts[0], atol=1e-7, rtol=0)


def test_a_prefix_does_not_hide_what_one_model_lacks(gpt2, tmp_path):
    def without_a_norm(tensors: Tensors) -> Tensors:
        return {n: a for n, a in of_the_hub(tensors).items() if n != "ln_f.bias"}

    hub = changed(gpt2[0], tmp_path / "hub", without_a_norm)
    with pytest.raises(InputError, match=r"has none; only \S+ has transformer\.ln_f\.bias$"):
        job.merge(make_recipe(average(hub, gpt2[1])), tmp_path / "out")


def test_an_adapter_finds_the_tensors_of_a_base_that_is_called_otherwise(gpt2, tmp_path):
    key = "base_model.model.transformer.h.0.attn.c_attn.lora_"
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["c_attn"]}
    config |= {"fan_in_fan_out": True, "bias": "none", "task_type": "CAUSAL_LM"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    factors = {f"{key}A.weight": np.ones((1, 8), np.float32)}
    factors[f"{key}B.weight"] = np.ones((24, 1), np.float32)
    safetensors.numpy.save_file(factors, adapter / "adapter_model.safetensors")
    hub = changed(gpt2[0], tmp_path / "hub", of_the_hub)
    older, _ = open_models([f"{hub}+{adapter}", str(gpt2[1])])
    name = "transformer.h.0.attn.c_attn.weight"
    before = safetensors.numpy.load_file(gpt2[0] / WEIGHTS)[name]
    np.testing.assert_array_equal(older.read(name), before + 1)
    np.testing.assert_array_equal(older.read_rows(name, 2, 5), before[2:5] + 1)
    older.drop(name)


@pytest.mark.parametrize("method", ["recall", "linear"])
def test_a_decoder_saved_without_its_head_is_merged(method, toys, tmp_path):
    """As embedding models are: transformers reads the same model from both."""
    from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

    bare = [tmp_path / "bare" / str(k) for k in range(2)]
    for folder, path in zip(toys.llama, bare, strict=True):
        AutoModel.from_pretrained(folder).save_pretrained(path)
        AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    names = safetensors.numpy.load_file(bare[0] / WEIGHTS)
    assert not any(name.startswith("model.") for name in names)
    merged = [tmp_path / "of bare", tmp_path / "of whole"]
    for models, out in zip((bare, toys.llama), merged, strict=True):
        recipe = {"merge_method": method, "models": [{"model": str(model)} for model in models]}
        if method == "recall":
            recipe["samples"] = {"data": toys.data, "count": 4}
        else:
            recipe["models"] = [entry | {"parameters": {"weight": 1}} for entry in recipe["models"]]
        job.merge(make_recipe(recipe), out)
    ours, theirs = (AutoModel.from_pretrained(out).state_dict() for out in merged)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    found = AutoModelForCausalLM.from_pretrained(merged[0], output_loading_info=True)[1]
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_buffers_are_needed_by_no_method(toys, tmp_path):
    """Nor are they compared, or held to finiteness, by what runs models of families it knows."""

    def with_caches(tensors: Tensors) -> Tensors:
        layer = "model.layers.0.self_attn.rotary_emb"
        return {**tensors, f"{layer}.inv_freq": np.full(4, np.nan, np.float32)}

    shutil.copytree(toys.llama[0], tmp_path / "sharded")
    folder = tmp_path / "whole"
    model = open_checkpoint(tmp_path / "sharded")
    folder.mkdir()
    shutil.copy(model.folder / "config.json", folder)
    whole = {name: np.array(model.read(name)) for name in model.specs}
    safetensors.numpy.save_file(with_caches(whole), folder / WEIGHTS)
    models = open_models([toys.llama[1], str(folder)])
    common_architecture(models)
    assert dict(models[1].specs).keys() == model.specs.keys()
    assert verify(folder).faults == ()


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_copies_of_a_shared_embedding_are_needed_by_nobody(kind, tmp_path):
    import transformers

    sizes = {"T5": {"d_kv": 4, "d_ff": 8, "num_layers": 1, "num_heads": 2}}
    config_class = getattr(transformers, f"{kind}Config")
    small = {"encoder_layers": 1, "decoder_layers": 1, "max_position_embeddings": 8}
    small |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = config_class(vocab_size=16, d_model=8, **sizes.get(kind, small))
    model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
    for k in range(2):
        torch.manual_seed(k)
        model_class(config).save_pretrained(tmp_path / str(k))
    now = safetensors.numpy.load_file(tmp_path / "0" / WEIGHTS)
    shared = next(name for name in now if name.endswith("shared.weight"))

    def with_copies(tensors: Tensors) -> Tensors:
        """As older versions wrote all names of the one tensor."""
        prefix = shared.removesuffix("shared.weight")
        own = [f"{prefix}{part}.embed_tokens.weight" for part in ("encoder", "decoder")]
        names = [*own, "lm_head.weight"]
        return {**tensors, **{name: tensors[shared].copy() for name in names}}

    old = changed(tmp_path / "0", tmp_path / "old", with_copies)
    assert open_checkpoint(old).specs.keys() == now.keys()
    for out, models in (("first", (old, tmp_path / "1")), ("second", (tmp_path / "1", old))):
        job.merge(make_recipe(average(*models)), tmp_path / out)
        merged = safetensors.numpy.load_file(tmp_path / out / WEIGHTS)
        other = safetensors.numpy.load_file(tmp_path / "1" / WEIGHTS)
        assert merged.keys() == now.keys()
        for name in now:
            np.testing.assert_allclose(merged[name], (now[name] + other[name]) / 2, atol=1e-6)
    loaded, info = model_class.from_pretrained(tmp_path / "second", output_loading_info=True)
    assert not any(info.values()) and loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_an_embedding_of_its_own_beside_the_shared_one_stays(tmp_path):
    tensors = {name: np.full(3, k, np.float32) for k, name in enumerate(("shared", "e", "d"))}
    names = {"e": "encoder.embed_tokens", "d": "decoder.embed_tokens", "shared": "shared"}
    (tmp_path / "config.json").write_text("{}")
    stored = {f"{names[name]}.weight": array for name, array in tensors.items()}
    stored["encoder.embed_tokens.weight"] = stored["shared.weight"].copy()
    safetensors.numpy.save_file(stored, tmp_path / WEIGHTS)
    left = open_checkpoint(tmp_path).specs.keys()
    assert left == {"shared.weight", "decoder.embed_tokens.weight"}


def test_weights_that_are_buffers_alone_are_no_model(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    safetensors.numpy.save_file({"position_ids": np.arange(4)}, tmp_path / WEIGHTS)
    with pytest.raises(InputError, match="its weights hold no parameters"):
        open_checkpoint(tmp_path)


# ----------------------------------------------------------------------------------------- indexes


def sharded(folder: Path, **weight_map: str) -> Path:
    """Shards `1` and `2`: both hold `a` and `b`, in 1 as ones, in 2 as twos; `2` holds `c` too."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    for shard in (1, 2):
        tensors = {name: np.full(3, shard, np.float32) for name in "abc"[: shard + 1]}
        safetensors.numpy.save_file(tensors, folder / f"{shard}.safetensors")
    names = {name: f"{shard}.safetensors" for name, shard in weight_map.items()}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": names}))
    return folder


@pytest.mark.parametrize(("first", "second"), [("1", "2"), ("2", "1")])
def test_of_two_copies_the_one_that_the_index_names_is_read(first, second, tmp_path):
    model = open_checkpoint(sharded(tmp_path / "model", a=first, b=second, c="2"))
    assert model.specs.keys() == set("abc")
    assert [model.read(name)[0] for name in "abc"] == [int(first), int(second), 2]
    assert model.read_rows("b", 0, 1)[0] == int(second)
    assert model.nbytes == 36
    assert [line.count("left out 1 tensors") for line in model.warnings] == [1, 1]


def test_an_index_of_bins_decides_too(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    for shard in (1, 2):
        torch.save({name: torch.full((3,), shard) for name in "abc"}, tmp_path / f"{shard}.bin")
    index = {"weight_map": {"a": "2.bin", "b": "1.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    model = open_checkpoint(tmp_path)
    assert {name: model.read(name)[0] for name in model.specs} == {"a": 2, "b": 1}
    assert [line.count("left out 2 tensors") for line in model.warnings] == [1, 1]


def test_tensors_that_the_index_does_not_name_are_left_out_with_a_warning(
    recall,
    tmp_path,
):
    models = [sharded(tmp_path / str(k), a="1", b="2") for k in range(2)]
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(average(*models)))
    done = recall("merge", recipe, tmp_path / "out")
    assert done.status == 0, done
    warned = [line for line in done.err.splitlines() if line.startswith("warning: ")]
    assert len(warned) == 4 and all("index.json" in line for line in warned)
    assert sum("such as c, which it does not name" in line for line in warned) == 0
    assert "left out 2 tensors" in warned[1] and "such as a, which is in another" in warned[1]
    merged = safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)
    assert {name: array[0] for name, array in merged.items()} == {"a": 1, "b": 2}
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert [f"warning: {line}" for line in report["warnings"]] == warned
    converted = recall("convert", models[0], tmp_path / "converted")
    assert converted.status == 0 and converted.err.splitlines() == warned[:2]
    assert recall("inspect", models[0]).err.splitlines() == warned[:2]
    assert [f"warning: {note}" for note in verify(models[0]).notes][1:3] == warned[:2]
