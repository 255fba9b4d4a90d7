"""`recall convert` and `recall inspect`: every bit arrives, and a folder is told as it is."""

import json
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from toys import UNITS, copy_model

from recall_jax.checkpoint.folder import open_checkpoint


def tensors(folder) -> dict[str, np.ndarray]:
    model = open_checkpoint(folder)
    return {name: model.read(name) for name in model.specs}


def assert_same_bits(first, second) -> None:
    assert {name: (a.dtype, a.shape) for name, a in first.items()} == {
        name: (a.dtype, a.shape) for name, a in second.items()
    }
    for name, array in first.items():
        assert array.tobytes() == second[name].tobytes(), name


def load(folder):
    from transformers import AutoModelForCausalLM

    model, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(loading.values()), loading
    return model


@pytest.fixture
def convert(recall, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def run(source, out, *options):
        done = recall("convert", source, out, *options)
        assert done.status == 0, done.err
        assert done.err == ""
        recorded = json.loads(Path(out, "checksums.json").read_text())["files"]
        files = [path for path in Path(out).rglob("*") if path.is_file()]
        assert recorded.keys() | {"checksums.json"} == {str(f.relative_to(out)) for f in files}
        for name, entry in recorded.items():
            content = Path(out, name).read_bytes()
            assert entry == {"bytes": len(content), "crc32": f"{zlib.crc32(content):08x}"}
        return Path(out)

    return run


@pytest.mark.parametrize(
    ("family", "to"), [("qwen2", "orbax"), ("llama", "orbax"), ("qwen2", "npz")]
)
def test_to_a_tree_and_back_is_bit_exact(family, to, convert, toys):
    source = getattr(toys, family)[1]
    convert(source, "flax", "--to", to)
    assert not list(Path("flax").glob("*.safetensors"))
    back = convert("flax", "back")
    assert_same_bits(tensors(source), tensors(back))
    for name in ("config.json", "generation_config.json", "tokenizer.json"):
        assert (back / name).read_bytes() == Path(source, name).read_bytes()
    again = convert("flax", "again", "--to", "npz" if to == "orbax" else "orbax")
    assert_same_bits(tensors(back), tensors(convert(again, "last")))
    load(back)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"vocab_size": 7}, "of another shape"),
        ({"num_hidden_layers": 1, "layer_types": None}, "do not belong together"),
    ],
)
def test_a_tree_that_is_not_that_of_its_config_is_refused(config, said, recall, toys, tmp_path):
    assert recall("convert", toys.qwen2[1], tmp_path / "flax", "--to", "npz").status == 0
    flax = copy_model(tmp_path / "flax", tmp_path / "other", **config)
    done = recall("convert", flax, tmp_path / "out")
    assert done.status == 2 and said in done.err
    assert not (tmp_path / "out").exists()


def test_bin_to_safetensors(convert, toys, tmp_path):
    folder = copy_model(toys.llama[1], tmp_path / "bin")
    for path in folder.glob("model*"):
        path.unlink()
    state = load(toys.llama[1]).state_dict()
    assert "lm_head.weight" in state  # tied: stored under both names, as torch does
    torch.save(state, folder / "pytorch_model.bin")
    out = convert(folder, "out")
    assert_same_bits(tensors(toys.llama[1]), tensors(out))
    load(out)


def test_an_adapter_is_folded(convert, toys):
    import peft

    out = convert(f"{toys.llama[0]}+{toys.adapter}", "out", "--shard-size", "30KB")
    assert len(list(out.glob("*.safetensors"))) > 1
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own affairs
        folded = peft.PeftModel.from_pretrained(load(toys.llama[0]), toys.adapter)
        expected = folded.merge_and_unload().state_dict()
    base = tensors(toys.llama[0])
    changed = set()
    for name, array in tensors(out).items():
        np.testing.assert_allclose(array, expected[name].numpy(), rtol=1e-5, atol=1e-6)
        if not np.array_equal(array, base[name]):
            changed.add(name.split(".", 3)[-1])
    assert changed == {"self_attn.q_proj.weight", "mlp.down_proj.weight"}
    load(out)


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_to_another_dtype(dtype, to, convert, toys):
    out = convert(toys.llama[0], "out", "--dtype", dtype, "--to", to)
    assert json.loads((out / "config.json").read_text())["dtype"] == dtype
    result = tensors(convert(out, "plain"))
    expected = {n: a.astype(np.dtype(dtype)) for n, a in tensors(toys.llama[0]).items()}
    assert_same_bits(expected, result)


def test_inspect_tells_what_a_folder_is(recall, toys):
    done = recall("inspect", toys.qwen2[0], "--json")
    assert done.status == 0 and done.err == ""
    found = json.loads(done.out)
    model = load(toys.qwen2[0])
    count = sum(parameter.numel() for parameter in model.parameters())
    assert found["model"] == found["folder"] == toys.qwen2[0]
    assert (found["model_type"], found["tied"], found["adapters"]) == ("qwen2", False, [])
    assert (found["recall_can_run"], found["why_not"]) == (True, None)
    assert (found["parameters"], found["bytes"]) == (count, 2 * count)
    assert found["dtypes"] == ["bfloat16"]
    assert list(found["units"]) == list(UNITS)
    per_unit = {
        "embed": model.model.embed_tokens,
        **{f"layers.{i}": layer for i, layer in enumerate(model.model.layers)},
        "head": torch.nn.ModuleList([model.model.norm, model.lm_head]),
    }
    for unit, module in per_unit.items():
        parameters = list(module.parameters())
        size = sum(parameter.numel() for parameter in parameters)
        assert found["units"][unit] == {
            "tensors": len(parameters),
            "parameters": size,
            "bytes": 2 * size,
            "dtypes": ["bfloat16"],
        }


def test_inspect_for_people(recall, toys):
    model = f"{toys.llama[0]}+{toys.adapter}"
    done = recall("inspect", model)
    assert done.status == 0 and done.err == ""
    for words in (model, "llama", "float32", "tied", toys.adapter, "layers.2"):
        assert words in done.out
    assert "untied" not in done.out
    found = json.loads(recall("inspect", model, "--json").out)
    assert (found["tied"], found["adapters"]) == (True, [toys.adapter])
    assert recall("inspect", model, "--quiet").out == ""


def test_inspect_says_why_recall_cannot_run_a_model(recall, toys, tmp_path):
    odd = copy_model(toys.qwen2[0], tmp_path / "odd", new_trick=1)
    done = recall("inspect", odd)
    assert done.status == 0 and "new_trick" in done.out
    found = json.loads(recall("inspect", odd, "--json").out)
    assert found["recall_can_run"] is False and "new_trick" in found["why_not"]
    foreign = copy_model(toys.qwen2[0], tmp_path / "foreign", model_type="gpt_bigcode")
    found = json.loads(recall("inspect", foreign, "--json").out)
    assert found["recall_can_run"] is False and "gpt_bigcode" in found["why_not"]
