"""Merges that run no model: tensors are held to the config, and the configs to one another."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy
from toys import copy_model


def recipe(folder, method, models, **keys):
    """A file with a recipe of models by their names."""
    path = folder / "recipe.yml"
    entries = [{"model": str(name)} for name in models]
    path.write_text(json.dumps({"merge_method": method, "models": entries, **keys}))
    return path


CHANGES = {
    "rope_theta": (
        {"rope_theta": 77_000.0, "rope_parameters": None},
        "rope_theta is 77000.0 in {changed} and 10000.0 in {newest}",
    ),
    "heads": (
        {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4},
        "num_attention_heads is 8 in {changed} and 4 in {newest}",
    ),
    "activation": (
        {"hidden_act": "gelu"},
        "hidden_act is 'gelu' in {changed} and 'silu' in {newest}",
    ),
    "epsilon": ({"rms_norm_eps": 0.25}, "rms_norm_eps is 0.25 in {changed} and 1e-06 in {newest}"),
    "scaling": (
        {"rope_scaling": {"type": "linear", "factor": 8.0}, "rope_parameters": None},
        "rope_factor is 8.0 in {changed} and 1.0 in {newest}",
    ),
    "unknown": ({"mystery": 3}, "mystery is 3 in {changed} and not given in {newest}"),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_function_is_a_warning_in_a_mean_of_weights(
    change, toys, recall, tmp_path
):
    changes, said = CHANGES[change]
    changed = copy_model(toys.llama[0], tmp_path / "changed", **changes)
    newest = toys.llama[1]
    done = recall(
        "merge", recipe(tmp_path, "average", [changed, newest]), tmp_path / "out", "--quiet"
    )
    assert done.status == 0 and done.out == ""
    line = (
        said.format(changed=changed, newest=newest) + ": the merged model computes with the latter"
    )
    assert f"warning: {line}\n" in done.err
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert line in report["warnings"]
    assert "computes with the latter" in (tmp_path / "out" / "recall_report.html").read_text()


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_a_base_is_compared_too(method, toys, recall, tmp_path):
    base = copy_model(toys.llama[0], tmp_path / "base", rms_norm_eps=0.25)
    keys = {"base_model": str(base), "parameters": {"weight": 1, "density": 0.5}}
    if method != "ties":
        del keys["parameters"]["density"]
    done = recall("merge", recipe(tmp_path, method, [toys.llama[1]], **keys), tmp_path / "out")
    assert done.status == 0
    assert f"warning: rms_norm_eps is 0.25 in {base} and 1e-06 in {toys.llama[1]}" in done.err


def test_methods_that_run_the_models_refuse_it(toys, recall, tmp_path):
    changed = copy_model(toys.llama[0], tmp_path / "changed", rms_norm_eps=0.25, hidden_act="relu")
    line = ["quick", changed, toys.llama[1], "--data", toys.data, "--out", tmp_path / "out"]
    done = recall(*line)
    assert done.status == 2 and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert f"rms_norm_eps is 0.25 in {changed} and 1e-06 in {toys.llama[1]}" in done.err
    assert f"hidden_act is 'relu' in {changed} and 'silu' in {toys.llama[1]}" in done.err


def test_what_is_ignored_is_not_warned_of(toys, recall, tmp_path):
    changed = copy_model(toys.llama[0], tmp_path / "changed", mystery=3)
    file = recipe(tmp_path, "average", [changed, toys.llama[1]])
    done = recall("merge", file, tmp_path / "out", "--ignore-config", "mystery")
    assert (done.status, done.err) == (0, "")
    done = recall("plan", file, "--devices", "cpu-8")
    assert done.status == 0 and "warning: mystery is 3" in done.err


def test_the_same_models_as_versions_4_and_5_write_them_merge_without_a_word(
    toys, recall, tmp_path
):
    old = copy_model(
        toys.llama[0], tmp_path / "old", rope_parameters=None, dtype=None, torch_dtype="float32",
        rope_theta=10_000.0, rope_scaling=None, transformers_version="4.40.0", use_cache=False,
    )  # fmt: skip
    done = recall("merge", recipe(tmp_path, "average", [old, toys.llama[1]]), tmp_path / "out")
    assert (done.status, done.err) == (0, "")


# ---------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"hidden_size": 64, "head_dim": 16},
            r"model.embed_tokens.weight \[97, 32\] instead of \[97, 64\]",
        ),
        ({"num_hidden_layers": 2}, "3 layers instead of 2"),
        ({"num_hidden_layers": 4}, "3 layers instead of 4"),
        ({"vocab_size": 90}, r"model.embed_tokens.weight \[97, 32\] instead of \[90, 32\]"),
        (
            {"num_key_value_heads": 4},
            r"layers.0.self_attn.k_proj.weight \[16, 32\] instead of \[32, 32\]",
        ),
        ({"intermediate_size": 50}, r"layers.0.mlp.\w+_proj.weight \[\d+, \d+\] instead of"),
    ],
)
@pytest.mark.parametrize("command", ["merge", "convert"])
def test_tensors_are_held_to_the_config(command, changes, said, toys, recall, tmp_path):
    wrong = copy_model(toys.llama[0], tmp_path / "wrong", **changes)
    file = recipe(tmp_path, "average", [toys.llama[1], wrong])
    done = recall(command, file if command == "merge" else wrong, tmp_path / "out")
    assert done.status == 2 and done.err.count("\n") == 1 and not (tmp_path / "out").exists()
    assert re.search(rf"{wrong}: of another shape than its config says: .*{said}", done.err), (
        done.err
    )


def test_heads_and_buffers_of_their_own_are_let_through(toys, recall, tmp_path):
    folders = []
    for index in range(2):
        folder = copy_model(toys.qwen2[index], tmp_path / str(index))
        tensors = safetensors.numpy.load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        tensors["score.weight"] = np.full((2, 32), index, np.float32)
        safetensors.numpy.save_file(tensors, folder / "model.safetensors")
        folders.append(folder)
    done = recall("merge", recipe(tmp_path, "average", folders), tmp_path / "out")
    assert (done.status, done.err) == (0, "")
    merged = safetensors.numpy.load_file(tmp_path / "out" / "model.safetensors")
    np.testing.assert_array_equal(merged["score.weight"], np.full((2, 32), 0.5, np.float32))


def test_what_zero_3_leaves_is_no_model(toys, recall, tmp_path):
    hollow = copy_model(toys.qwen2[0], tmp_path / "hollow")
    names = safetensors.numpy.load_file(hollow / "model.safetensors")
    tensors = {name: np.empty((0,), np.float32) for name in names}
    safetensors.numpy.save_file(tensors, hollow / "model.safetensors")
    for models in ([hollow, hollow], [toys.qwen2[1], hollow]):
        done = recall("merge", recipe(tmp_path, "average", models), tmp_path / "out")
        assert done.status == 2 and "has shape [0]" in done.err and "zero_to_fp32" in done.err
        assert not (tmp_path / "out").exists()
    done = recall("verify", hollow)
    assert done.status == 1 and "has shape [0]" in done.out


def test_trees_that_carry_configs_are_compared_too(toys, recall, tmp_path):
    changed = copy_model(toys.llama[0], tmp_path / "changed", rms_norm_eps=0.25)
    for source, name in ((changed, "a"), (toys.llama[1], "b")):
        assert recall("convert", source, tmp_path / name, "--to", "npz").status == 0
    file = recipe(tmp_path, "average", [tmp_path / "a", tmp_path / "b"])
    done = recall("merge", file, tmp_path / "out")
    assert done.status == 0
    line = f"rms_norm_eps is 0.25 in {tmp_path / 'a'} and 1e-06 in {tmp_path / 'b'}"
    assert f"warning: {line}" in done.err
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert any(line in warning for warning in report["warnings"])
