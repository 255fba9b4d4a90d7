"""Quantised models: refused by name wherever weights are used, told where a folder is looked at."""

import json

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers
from safetensors.torch import save_file
from toys import copy_model

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.quantised import quantised_by
from recall_jax.errors import InputError
from recall_jax.jobs.merge import merge
from recall_jax.models.config import read_architecture
from recall_jax.recipes.recipe import make_recipe

METHODS = {
    "gptq": transformers.GPTQConfig(bits=4),
    "awq": transformers.AwqConfig(bits=4),
    "bitsandbytes": transformers.BitsAndBytesConfig(load_in_4bit=True),
    "fp8": transformers.FineGrainedFP8Config(),
    "quanto": transformers.QuantoConfig(weights="int8"),
    "eetq": transformers.EetqConfig("int8"),
    "hqq": {"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 4}}},
    "aqlm": transformers.AqlmConfig(),
    "mxfp4": transformers.Mxfp4Config(),
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "NVFP4": {"producer": {"name": "modelopt"}, "quant_algo": "NVFP4"},
}


def stated(config):
    """A quantization_config as transformers writes it."""
    return config if isinstance(config, dict) else json.loads(config.to_json_string(use_diff=False))


@pytest.mark.parametrize("method", METHODS)
def test_a_config_names_its_method(method):
    config = {"quantization_config": stated(METHODS[method])}
    assert quantised_by(config) == method
    assert quantised_by({"compression_config": config["quantization_config"]}) == method
    for part in ("text_config", "llm_config", "thinker_config"):
        assert quantised_by({"model_type": "llava", part: {"text_config": config}}) == method


@pytest.mark.parametrize(
    "nothing",
    [
        None,
        {},
        stated(transformers.BitsAndBytesConfig()),
        {"load_in_8bit": False, "load_in_4bit": False},
    ],
    ids=["null", "empty", "bitsandbytes off", "older"],
)
def test_a_config_that_quantises_nothing_passes(nothing, toys, tmp_path):
    folder = copy_model(toys.llama[0], tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | {"quantization_config": nothing}
    (folder / "config.json").write_text(json.dumps(config))
    model = open_checkpoint(folder)
    assert model.quantised is None
    assert read_architecture(model.config) == read_architecture(
        open_checkpoint(toys.llama[0]).config
    )


PACKED = {
    "gptq": {
        "q_proj.qweight": torch.int32,
        "q_proj.qzeros": torch.int32,
        "q_proj.g_idx": torch.int32,
    },
    "bitsandbytes in 8 bits": {"q_proj.weight": torch.int8, "q_proj.SCB": torch.float32},
    "bitsandbytes in 4 bits": {"q_proj.weight": torch.uint8, "q_proj.weight.absmax": torch.uint8},
    "compressed-tensors": {
        "q_proj.weight_packed": torch.int32,
        "q_proj.weight_scale": torch.float16,
    },
    "quanto": {"q_proj.weight._data": torch.int8, "q_proj.weight._scale": torch.float32},
    "hqq": {"q_proj.W_q": torch.uint8},
    "mxfp4": {"experts.down_proj_blocks": torch.uint8, "experts.down_proj_scales": torch.uint8},
    "aqlm": {"q_proj.codes": torch.int8, "q_proj.codebooks": torch.float16},
    "fp8": {"q_proj.weight": torch.float8_e4m3fn, "q_proj.weight_scale_inv": torch.float32},
}


@pytest.mark.parametrize("kind", PACKED)
def test_where_the_config_is_silent_the_tensors_tell(kind, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    dtypes = {"norm.weight": torch.float16} | {
        f"layers.0.{name}": t for name, t in PACKED[kind].items()
    }
    tensors = {name: torch.ones(4, 2).to(dtype) for name, dtype in dtypes.items()}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        InputError, match=r"quantised|F8_E4M3' is not supported; dequantise"
    ) as error:
        open_checkpoint(tmp_path)
    assert list(dtypes)[1] in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["embeddings.position_ids", "h.0.attn.bias", "blocks.0.attn.ids", "h.blocks.3.w.table"]
)
def test_buffers_of_integers_are_no_weights(name, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    tensors = {name: torch.ones(1, 4, dtype=torch.uint8), "norm.weight": torch.ones(4)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert open_checkpoint(tmp_path).quantised is None


@pytest.fixture
def quantised(toys, tmp_path):
    """A model whose config says gptq."""
    return copy_model(toys.llama[0], tmp_path / "gptq", quantization_config=stated(METHODS["gptq"]))


def test_every_command_that_uses_weights_refuses_it(quantised, toys, recall, tmp_path):
    recipe = tmp_path / "recipe.yml"
    models = [{"model": toys.llama[0]}, {"model": str(quantised)}]
    recipe.write_text(json.dumps({"merge_method": "average", "models": models}))
    relative = tmp_path / "relative.yml"
    entry = {"base_model": str(quantised), "models": models[:1], "parameters": {"weight": 1}}
    relative.write_text(json.dumps({"merge_method": "ties", **entry}))
    out, data = tmp_path / "out", toys.data
    for line in (
        ["merge", recipe, out],
        ["merge", relative, out],
        ["plan", recipe, "--devices", "cpu-8"],
        ["quick", toys.llama[0], quantised, "--data", data, "--out", out],
        ["convert", quantised, out],
        ["convert", f"{quantised}+{toys.adapter}", out, "--to", "npz"],
        ["inspect", f"{quantised}+{toys.adapter}"],
        ["select", quantised, "--data", data, "--out", out],
        ["extract", quantised, toys.llama[1], "--data", data, "--out", out],
        ["similarity", quantised, toys.llama[1], "--data", data],
        ["evaluate", quantised, "--tasks", "sst2", "--data-root", "tests/evaluation/data"],
        ["finetune", quantised, "--data", data, "--out", out],
    ):
        done = recall(*line)
        assert done.status == 2, line
        assert done.err.count("\n") == 1 and "quantised" in done.err and "gptq" in done.err, (
            done.err
        )
        assert not out.exists()


def test_verify_and_inspect_say_it(quantised, recall):
    done = recall("verify", quantised)
    assert done.status == 0
    assert (
        "good" in done.out
        and "quantised (quantization_config in its config.json: gptq)" in done.out
    )
    done = recall("inspect", quantised)
    assert done.status == 0 and "gptq" in done.out
    found = json.loads(recall("inspect", quantised, "--json").out)
    assert "gptq" in found["quantised"] and not found["recall_can_run"]


def test_a_folder_of_gguf_is_told_from_one_without_weights(tmp_path, toys, recall):
    (tmp_path / "model.Q4_K_M.gguf").write_bytes(b"GGUF")
    for part in (tmp_path, tmp_path / "model.Q4_K_M.gguf"):
        done = recall("convert", part, tmp_path / "out")
        assert done.status == 2 and "Q4_K_M.gguf: GGUF is not read yet" in done.err
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="GGUF is not read yet"):
        open_checkpoint(tmp_path)
    both = copy_model(toys.llama[0], tmp_path / "both")
    (both / "model.gguf").write_bytes(b"GGUF")
    assert open_checkpoint(both).specs


@pytest.mark.parametrize("name", ["layers.0.q_proj.weight", "norm.weight", "q_proj.bias"])
def test_what_zero_3_leaves_behind_is_refused(name, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "of_nobody"}')
    safetensors.numpy.save_file(
        {"a": np.ones(2), name: np.ones((0,), ml_dtypes.bfloat16)}, tmp_path / "model.safetensors"
    )
    with pytest.raises(InputError, match=rf"tensor {name} has shape \[0\].*zero_to_fp32"):
        open_checkpoint(tmp_path)


# ------------------------------------------------------------------------------------ integers


def average(tmp_path, *tensors):
    """What is merged from models of these tensors."""
    models = []
    for index, each in enumerate(tensors):
        folder = tmp_path / str(index)
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "of_nobody"}')
        safetensors.numpy.save_file(each, folder / "model.safetensors")
        models.append({"model": str(folder)})
    merge(make_recipe({"merge_method": "average", "models": models}), tmp_path / "out")
    return safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")


FLOATS = {"h.0.w": np.ones(3, np.float32)}
BUFFERS = {
    "tid2eid": np.arange(7)[None],
    "mask": np.tril(np.ones((5, 5), np.bool_)),
    "table": np.arange(6, dtype=np.uint16),
}


@pytest.mark.parametrize("name", BUFFERS)
def test_equal_integers_pass_bit_for_bit_and_others_are_refused(name, tmp_path):
    merged = average(tmp_path, FLOATS | BUFFERS, FLOATS | BUFFERS)
    assert merged[name].dtype == BUFFERS[name].dtype
    np.testing.assert_array_equal(merged[name], BUFFERS[name])
    (other := tmp_path / "other").mkdir()
    changed = BUFFERS[name].copy()
    changed.flat[-1] = 0
    mine, its = FLOATS | {name: changed}, FLOATS | {name: BUFFERS[name]}
    with pytest.raises(
        InputError, match=rf"tensor {name}, .* not the same in .*0 and .*1"
    ) as error:
        average(other, mine, its)
    assert "\n" not in str(error.value)
    assert not (other / "out").exists()


@pytest.mark.parametrize("kind", [np.int8, np.int64, np.bool_])
@pytest.mark.parametrize("floats_first", [True, False])
def test_integers_beside_floats_are_refused(kind, floats_first, tmp_path):
    both = [{"h.0.w": np.ones(3, np.float32)}, {"h.0.w": np.ones(3, kind)}]
    with pytest.raises(InputError, match=r"tensor h.0.w is \w+ in .* integers cannot be merged"):
        average(tmp_path, *both[:: 1 if floats_first else -1])
