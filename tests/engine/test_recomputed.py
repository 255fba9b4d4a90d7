"""A merge recomputed from its report by other software: transformers, peft and numpy."""

import json
import re
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from recall_jax.jobs import merge as job
from recall_jax.jobs import outcome
from recall_jax.recipes.recipe import make_recipe, read_recipe

CASES = {
    # three untied bfloat16 models, everything at its default
    "qwen2": {},
    # a fine-tune and a LoRA adapter of one base, the adapter being the newest; a narrower dtype
    "llama": {"parameters": {"temperature": 0.3}, "out_dtype": "bfloat16"},
    # the reference is not the newest, another bandwidth, other measures
    "llama, base as reference": {
        "parameters": {
            "reference": 0,
            "sigma": "dim",
            "similarity": {"rbf": 0.25, "cosine": 0.5, "linear_cka": 0.25},
        },
        "samples": {"count": 7, "unit": "all", "max_tokens": 9, "pool": 30},
    },
    "qwen2, pairwise": {
        "parameters": {"reference": "pairwise"},
        "samples": {"count": 6, "unit": "embed", "batch_size": 4},
    },
    "qwen2, centred": {
        "parameters": {"alignment": "center", "sigma": 0.7, "temperature": 0.5},
        "samples": {"count": 9, "seed": 3},
        "out_dtype": "float32",
    },
}


@pytest.fixture(scope="module")
def folded(toys, tmp_path_factory) -> Path:
    """The adapter folded into its base by peft."""
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(toys.llama[0])
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft's own affairs
        model = peft.PeftModel.from_pretrained(base, toys.adapter).merge_and_unload()
    folder = tmp_path_factory.mktemp("folded")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=list(CASES))
def merged(request, toys, folded, tmp_path_factory):
    """(the recipe, the models as transformers can load them, OUT)"""
    if request.param.startswith("qwen2"):
        models = plain = toys.qwen2
    else:
        models = [*toys.llama, f"{toys.llama[0]}+{toys.adapter}"]
        plain = [*toys.llama, str(folded)]
    values = {
        "merge_method": "recall",
        "models": [{"model": name} for name in models],
        **CASES[request.param],
    }
    values["samples"] = {"data": toys.data, **values.get("samples", {})}
    recipe = make_recipe(values)
    out = tmp_path_factory.mktemp("merged") / "out"
    report = job.merge(recipe, out, options=job.MergeOptions(shard_bytes=30_000))
    assert report == json.loads((out / outcome.REPORT).read_text())
    return recipe, plain, out


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def texts_of(recipe, report) -> list[str]:
    rows = [json.loads(line) for line in Path(recipe.samples.data).read_text().splitlines()]
    return [rows[row]["text"] for row in report["typical_samples"]]


def tokenize(folder, texts, max_tokens):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    cut = {"truncation": True, "max_length": max_tokens, "return_tensors": "pt"}
    return [tokenizer(text, **cut) for text in texts]


def representations(folder, rows_of_tokens) -> np.ndarray:
    """(U, n, E): each row alone, so that no padding is involved."""
    model = load(folder)
    last_block = []
    model.model.layers[-1].register_forward_hook(lambda module, given, out: last_block.append(out))
    rows = []
    for tokens in rows_of_tokens:
        with torch.no_grad():
            states = model(**tokens, output_hidden_states=True).hidden_states
        block = last_block.pop()
        block = block[0] if isinstance(block, tuple) else block
        # transformers gives the last block's output after the final norm only
        states = [*states[:-1], block, states[-1]]
        rows.append([state[0].double().mean(dim=0).numpy() for state in states])
    return np.asarray(rows).swapaxes(0, 1)


def pair_distances(x):
    i, j = np.triu_indices(len(x), k=1)
    return ((x[i] - x[j]) ** 2).sum(axis=1)


def rbf(x, y, sigma):
    return np.exp(-((x - y) ** 2).sum(axis=1) / (2 * sigma**2)).mean()


def cosine(x, y, sigma):
    return ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).mean()


def linear_cka(x, y, sigma):
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    norm = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.linalg.norm(x.T @ y) ** 2 / norm


MEASURES = {"rbf": rbf, "cosine": cosine, "linear_cka": linear_cka}


def compare(unit, parameters, reference):
    """(S (K,), sigma) of one unit's representations (K, n, E)."""
    if parameters.alignment == "center":
        unit = unit - unit.mean(axis=1, keepdims=True)
    inside = unit if reference is None else unit[[reference]]
    sigma = parameters.sigma
    if sigma == "median":
        sigma = np.sqrt(np.median(np.concatenate([pair_distances(x) for x in inside])) / 2)
    elif sigma == "dim":
        sigma = np.sqrt(unit.shape[-1] / 2)
    asked = parameters.similarity
    mix = {asked: 1.0} if isinstance(asked, str) else asked

    def similarity(x, y):
        parts = [weight * MEASURES[name](x, y, sigma) for name, weight in mix.items()]
        return sum(parts) / sum(mix.values())

    if reference is not None:
        return np.asarray([similarity(x, unit[reference]) for x in unit]), sigma
    others = [[similarity(x, y) for y in np.delete(unit, k, 0)] for k, x in enumerate(unit)]
    return np.mean(others, axis=1), sigma


def weigh(similarity, temperature):
    raised = np.exp((similarity - similarity.max(axis=0)) / temperature)
    return raised / raised.sum(axis=0)


def unit_index(name, num_units) -> int:
    if match := re.search(r"layers\.(\d+)\.", name):
        return int(match[1]) + 1
    return 0 if "embed_tokens" in name else num_units - 1


def test_similarity_sigma_and_weights(merged):
    recipe, models, out = merged
    report = json.loads((out / outcome.REPORT).read_text())
    texts = texts_of(recipe, report)
    # the folder with peft's result has no tokenizer; all these models have the same one
    tokens = tokenize(models[0], texts, recipe.samples.max_tokens)
    reps = [representations(folder, tokens) for folder in models]
    units = np.stack(reps, axis=1)  # (U, K, n, E)
    found = [compare(unit, recipe.parameters, report["reference"]) for unit in units]
    similarity = np.stack([s for s, _ in found], axis=1)
    sigma = np.asarray([s for _, s in found])
    assert np.ptp(similarity) > 0.05, "models that all look alike would show little"
    np.testing.assert_allclose(report["similarity"], similarity, atol=1e-3)
    np.testing.assert_allclose(report["sigma"], sigma, rtol=1e-3)
    weights = weigh(similarity, recipe.parameters.temperature)
    np.testing.assert_allclose(report["weights"], weights, atol=1e-4)
    newest = units[:, -1]
    pairs = zip(newest[:-2], newest[1:-1], sigma, strict=False)
    adjacent = [rbf(x, y, width) for x, y, width in pairs]
    assert len(report["adjacent"]) == len(report["units"]) - 2
    np.testing.assert_allclose(report["adjacent"], adjacent, atol=1e-3)


def test_every_merged_tensor(merged):
    recipe, models, out = merged
    report = json.loads((out / outcome.REPORT).read_text())
    weights = np.asarray(report["weights"])
    result = read_tensors(out)
    inputs = [read_tensors(folder) for folder in models]
    assert {name: t.shape for name, t in result.items()} == {
        name: t.shape for name, t in inputs[-1].items()
    }
    for name, tensor in result.items():
        dtype = getattr(torch, recipe.out_dtype) if recipe.out_dtype else inputs[-1][name].dtype
        assert tensor.dtype == dtype
        stack = np.stack([model[name].double().numpy() for model in inputs])
        row = weights[:, unit_index(name, len(report["units"]))]
        expected = np.tensordot(row / row.sum(), stack, 1)
        # one unit in the last place of the output dtype, and four float32 roundings
        last_place = 2.0 ** np.floor(np.log2(np.abs(expected) + 1e-30)) * torch.finfo(dtype).eps
        allowed = last_place + 4 * 2.0**-24 * np.abs(stack).max(axis=0)
        worst = np.abs(tensor.double().numpy() - expected) / allowed
        assert worst.max() <= 1, (name, worst.max())


def read_tensors(folder) -> dict[str, torch.Tensor]:
    tensors = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        tensors |= safetensors.torch.load_file(path)
    return tensors


def test_transformers_loads_the_result_and_generates(merged):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    recipe, models, out = merged
    model, loading = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    dtype = recipe.out_dtype or str(next(iter(read_tensors(models[-1]).values())).dtype)
    assert str(model.dtype) == f"torch.{dtype.removeprefix('torch.')}"
    tokens = AutoTokenizer.from_pretrained(out)("abc", return_tensors="pt")
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert tied == ("llama" in models[0])
    assert model.generate(**tokens, max_new_tokens=3, do_sample=False).shape[1] > 3


KEYS = {
    "format", "method", "models", "reference", "units", "typical_samples", "sigma", "similarity",
    "weights", "adjacent", "typical", "warnings", "settings", "timing_s", "bytes",
    "peak_memory_bytes", "versions",
}  # fmt: skip


def test_the_report_keeps_its_contract(merged):
    recipe, models, out = merged
    report = json.loads((out / outcome.REPORT).read_text())
    assert report.keys() >= KEYS
    assert (report["format"], report["method"]) == (1, "recall")
    assert report["models"] == [entry.model for entry in recipe.models]
    pairwise = recipe.parameters.reference == "pairwise"
    expected = {"newest": 2, "pairwise": None}.get(recipe.parameters.reference, 0)
    assert report["reference"] == expected
    assert report["units"] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert np.shape(report["weights"]) == np.shape(report["similarity"]) == (3, 5)
    rows = report["typical_samples"]
    assert rows == sorted(set(rows)) and 1 < len(rows) <= recipe.samples.count
    assert len(report["typical"]["cluster_sizes"]) == len(rows)
    assert sum(report["typical"]["cluster_sizes"]) == min(40, recipe.samples.pool)
    assert report["typical"]["inertia"] > 0 and -1 <= report["typical"]["silhouette"] <= 1
    settings = report["settings"]
    for name in ("sigma", "temperature", "similarity", "alignment", "reference"):
        assert settings[name] == getattr(recipe.parameters, name)
    assert settings["samples"]["count"] == recipe.samples.count
    read = sum(Path(p).stat().st_size for folder in models for p in safetensors_of(folder))
    assert 0 < report["bytes"]["read"] <= 2 * read  # one walk, and one to choose the samples
    written = sum(t.nbytes for t in read_tensors(out).values())
    assert report["bytes"]["written"] == written
    assert report["peak_memory_bytes"] > written
    assert {"python", "jax", "numpy", "recall-jax"} <= report["versions"].keys()
    assert all(seconds >= 0 for seconds in report["timing_s"].values())
    if not pairwise:
        # the reference is at distance zero of itself, and its weight is the largest
        assert np.allclose(np.asarray(report["similarity"])[expected], 1, atol=1e-6)
        weights = np.asarray(report["weights"])
        assert (weights[expected] == weights.max(axis=0)).all()


def safetensors_of(folder):
    return Path(folder).glob("*.safetensors")


def test_out_holds_every_file_of_the_contract(merged):
    recipe, _, out = merged
    names = {path.name for path in out.iterdir()}
    shards = {name for name in names if re.fullmatch(r"model-\d{5}-of-\d{5}\.safetensors", name)}
    assert len(shards) > 1
    assert names - shards == {
        "README.md",
        "checksums.json",
        "config.json",
        "generation_config.json",
        "model.safetensors.index.json",
        "recall_recipe.yml",
        "recall_report.html",
        "recall_report.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "typical.jsonl",
    }
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == shards
    report = json.loads((out / outcome.REPORT).read_text())
    rows = [json.loads(line) for line in (out / "typical.jsonl").read_text().splitlines()]
    texts = texts_of(recipe, report)
    numbered = zip(texts, report["typical_samples"], strict=True)
    assert rows == [{"text": text, "row": row} for text, row in numbered]
    page = (out / outcome.PAGE).read_text()
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", page)


def test_checksums_cover_every_file(merged):
    *_, out = merged
    recorded = json.loads((out / "checksums.json").read_text())
    assert (recorded["format"], recorded["algorithm"]) == (1, "crc32")
    found = {
        path.name: {"bytes": path.stat().st_size, "crc32": f"{zlib.crc32(path.read_bytes()):08x}"}
        for path in out.iterdir()
        if path.name != "checksums.json"
    }
    assert recorded["files"] == found


def test_the_resolved_recipe_repeats_the_run_from_anywhere(merged, tmp_path, monkeypatch):
    *_, out = merged
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(out / outcome.RECIPE)
    job.merge(recipe, Path("again"), options=job.MergeOptions(shard_bytes=30_000))
    same = [p.name for p in out.iterdir() if p.suffix in {".safetensors", ".jsonl", ".yml"}]
    assert len(same) > 3
    for name in same:
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
