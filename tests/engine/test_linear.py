"""`linear` and `average` against float64 numpy, with mergekit's kinds of weights."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from toys import LAYERS

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine import pooled
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import make_recipe

MLP_FIRST = [{"filter": "mlp", "value": [0.0, 1.0]}, {"filter": "norm", "value": 3}, {"value": 0.5}]

# weights of each of three models; the recipe's own; normalize; expected weight of a tensor
CASES = {
    "scalars": ([0.2, 0.3, 1.5], None, None),
    "negative": ([-0.5, 1, 2], None, True),
    "not normalised": ([0.2, 0.3, 1.5], None, False),
    "summing to zero is fine unless normalised": ([1, 0, -1], None, False),
    "gradients": ([[0.0, 1.0], [1.0, 0.5, 0.0], 1.0], None, True),
    "a gradient of one point": ([[0.25], 1, 1], None, True),
    "filters": ([MLP_FIRST, 1.0, [{"filter": "*", "value": 2.0}]], None, True),
    "the recipe's weight for models without": ([None, 3.0, None], 0.5, True),
    "a filter that does not match falls through": (
        [[{"filter": "q_proj", "value": 4.0}], 1, 1],
        0.5,
        True,
    ),
}


def depth_of(name: str) -> float:
    if match := re.search(r"layers\.(\d+)\.", name):
        return int(match[1]) / (LAYERS - 1)
    return 0.0 if "embed" in name else 1.0


def weight_of(value, name: str) -> float | None:
    if not isinstance(value, list):
        return value
    if isinstance(value[0], dict):
        for entry in value:
            if entry.get("filter", "*") == "*" or entry["filter"] in name:
                return weight_of(entry["value"], name)
        return None
    place = depth_of(name) * (len(value) - 1)
    low = int(np.floor(place))
    high = min(low + 1, len(value) - 1)
    return value[low] + (place - low) * (value[high] - value[low])


def tensors(folder):
    model = open_checkpoint(folder)
    return {name: model.read(name) for name in model.specs}


@pytest.mark.parametrize("case", list(CASES))
def test_linear_is_what_mergekit_means_by_it(case, toys, tmp_path):
    weights, shared, normalize = CASES[case]
    values = {"merge_method": "linear", "parameters": {}, "out_dtype": "float32"}
    values["models"] = [
        {"model": name} | ({} if weight is None else {"parameters": {"weight": weight}})
        for name, weight in zip(toys.qwen2, weights, strict=True)
    ]
    if shared is not None:
        values["parameters"]["weight"] = shared
    if normalize is not None:
        values["parameters"]["normalize"] = normalize
    report = job.merge(make_recipe(values), tmp_path / "out")
    inputs = [tensors(model) for model in toys.qwen2]
    used = {}
    for name, merged in tensors(tmp_path / "out").items():
        row = [weight_of(weight, name) for weight in weights]
        row = np.asarray([shared if w is None else w for w in row], np.float64)
        if normalize is not False:
            row /= row.sum()
        stack = np.stack([model[name].astype(np.float64) for model in inputs])
        expected = np.tensordot(row, stack, 1)
        # weights may be above 1 or below 0, which makes the terms larger than the inputs
        terms = np.tensordot(np.abs(row), np.abs(stack), 1)
        roundings = 4 * 2.0**-24 * np.maximum(terms, np.abs(stack).max(axis=0))
        allowed = np.spacing(np.abs(expected).astype(np.float32)) + roundings
        assert (np.abs(merged - expected) <= allowed).all(), name
        used.setdefault(name.split(".weight")[0].split(".bias")[0], row)
    assert report["reference"] is report["similarity"] is report["sigma"] is None
    assert report["typical"] is report["adjacent"] is None and report["typical_samples"] == []
    embed = [row[0] for row in report["weights"]]
    np.testing.assert_allclose(embed, used["model.embed_tokens"], rtol=1e-6)
    assert not (tmp_path / "out" / "typical.jsonl").exists()


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_the_output_has_the_dtype_asked_for(kind, key, toys, tmp_path):
    values = {
        "merge_method": "average",
        "models": [{"model": name} for name in toys.qwen2],
        key: kind,
    }
    job.merge(make_recipe(values), tmp_path / "out")
    inputs = [tensors(model) for model in toys.qwen2]
    for name, merged in tensors(tmp_path / "out").items():
        assert merged.dtype.name == kind
        expected = np.mean([model[name].astype(np.float64) for model in inputs], axis=0)
        nearest = np.abs(merged.astype(np.float64) - expected)
        step = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(kind, 2.0**-22)
        assert (nearest <= step * np.abs(expected) * 1.01 + 2.0**-24 * 2).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == kind


def test_out_dtype_wins_over_dtype(toys, tmp_path):
    values = {
        "merge_method": "average",
        "models": [{"model": name} for name in toys.qwen2],
        "dtype": "float32",
        "out_dtype": "float16",
    }
    job.merge(make_recipe(values), tmp_path / "out")
    assert {array.dtype.name for array in tensors(tmp_path / "out").values()} == {"float16"}


def test_one_model_is_copied(toys, tmp_path):
    values = {"merge_method": "average", "models": [{"model": toys.llama[0]}]}
    job.merge(make_recipe(values), tmp_path / "out")
    before, after = tensors(toys.llama[0]), tensors(tmp_path / "out")
    assert {n: a.tobytes() for n, a in before.items()} == {n: a.tobytes() for n, a in after.items()}


def test_the_average_reads_every_byte_once(toys, tmp_path):
    values = {"merge_method": "average", "models": [{"model": name} for name in toys.qwen2]}
    report = job.merge(make_recipe(values), tmp_path / "out")
    sizes = [open_checkpoint(name).nbytes for name in toys.qwen2]
    assert report["bytes"] == {"read": sum(sizes), "written": sizes[-1]}
    assert Path(tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize("fits", [True, False])
def test_recall_reads_every_byte_once_unless_the_newest_does_not_fit(
    fits, toys, tmp_path, monkeypatch
):
    if not fits:
        monkeypatch.setattr(pooled, "cacheable_bytes", lambda budget: 0)
    values = {"merge_method": "recall", "models": [{"model": name} for name in toys.qwen2]}
    values["samples"] = {"data": toys.data, "count": 8}
    report = job.merge(make_recipe(values), tmp_path / "out")
    sizes = [open_checkpoint(name).nbytes for name in toys.qwen2]
    # the pass that chooses the samples ends with the last block: no head
    head = sum(
        spec.nbytes
        for name, spec in open_checkpoint(toys.qwen2[-1]).specs.items()
        if name in ("model.norm.weight", "lm_head.weight")
    )
    assert report["selection_passes"] == (0 if fits else 1)
    assert report["bytes"]["read"] == sum(sizes) + (0 if fits else sizes[-1] - head)
    assert report["bytes"]["written"] == sizes[-1]
    values["samples"] = {"typical": str(tmp_path / "out" / "typical.jsonl")}
    given = job.merge(make_recipe(values), tmp_path / "given")
    assert given["selection_passes"] == 0
    assert given["bytes"]["read"] == sum(sizes)
    assert given["weights"] == report["weights"]


def test_any_architecture_may_be_averaged(tmp_path):
    """GPT-2 is no family that recall runs; a step count that both have passes as it is."""
    import safetensors.torch
    import torch
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=12, n_head=2)
    states = []
    for k in range(2):
        torch.manual_seed(k)
        folder = tmp_path / str(k)
        GPT2LMHeadModel(config).save_pretrained(folder)
        state = safetensors.torch.load_file(folder / "model.safetensors")
        state["transformer.steps"] = torch.tensor([7, 2**40])
        safetensors.torch.save_file(state, folder / "model.safetensors", {"format": "pt"})
        states.append(state)
    values = {
        "merge_method": "linear",
        "models": [{"model": str(tmp_path / str(k))} for k in range(2)],
        "parameters": {"weight": 1},
    }
    values["models"][1]["parameters"] = {"weight": [0.0, 1.0]}
    report = job.merge(make_recipe(values), tmp_path / "out")
    assert report["units"] == ["embed", *(f"layers.{i}" for i in range(12)), "head"]
    newest = np.asarray(report["weights"])[1]
    depth = np.asarray([0, *(i / 11 for i in range(12)), 1])
    np.testing.assert_allclose(newest, depth / (1 + depth), rtol=1e-6)
    merged = safetensors.torch.load_file(tmp_path / "out" / "model.safetensors")
    assert merged.keys() == states[0].keys()
    torch.testing.assert_close(merged["transformer.steps"], states[1]["transformer.steps"])
    for name in ("transformer.wpe.weight", "transformer.h.10.ln_1.weight", "transformer.ln_f.bias"):
        share = {"wpe": 0.0, "h": (10 / 11) / (21 / 11), "ln_f": 0.5}[name.split(".")[1]]
        expected = torch.lerp(states[0][name], states[1][name], share)
        torch.testing.assert_close(merged[name], expected)
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["mismatched_keys"]
