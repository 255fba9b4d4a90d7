"""What must not change a merge: equal models, the order of the models, the way it is run."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toys import UNITS, copy_model

from recall_jax import merge_trees, recall_merge
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.jobs import merge as job
from recall_jax.jobs import outcome
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import from_flax, to_flax
from recall_jax.models.forward import forward
from recall_jax.recipes.recipe import make_recipe

DTYPES = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float64": np.float64,
}


def merge(models, out, method="recall", *, samples=None, options=job.DEFAULTS, **more):
    values = {"merge_method": method, "models": [{"model": str(m)} for m in models], **more}
    if samples is not None:
        values["samples"] = samples
    return job.merge(make_recipe(values), out, options=options)


def tensors(folder) -> dict[str, np.ndarray]:
    model = open_checkpoint(folder)
    return {name: model.read(name) for name in model.specs}


def write_model(template: str, folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A model folder with other weights."""
    copy_model(template, folder)
    (folder / "model.safetensors").unlink()
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    with ShardedWriter(folder, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return folder


def extreme_values(dtype) -> np.ndarray:
    """Zeros of both signs, subnormals, the largest and the smallest normal numbers."""
    limits = ml_dtypes.finfo(dtype)
    edges = [0.0, limits.smallest_subnormal, limits.smallest_normal, limits.max, limits.eps, 1.0]
    values = np.asarray([float(edge) for edge in edges], np.float64).astype(dtype)
    return np.concatenate([values, -values])


@pytest.mark.parametrize("dtype", [*DTYPES, "mixed"])
@pytest.mark.parametrize("method", ["recall", "average", "linear"])
def test_identical_models_merge_to_themselves_bit_for_bit(method, dtype, toys, tmp_path):
    kinds = list(DTYPES.values())
    arrays = {}
    for index, (name, array) in enumerate(tensors(toys.qwen2[0]).items()):
        kind = kinds[index % 4] if dtype == "mixed" else DTYPES[dtype]
        arrays[name] = array.astype(np.float64).astype(kind)
    # No forward pass sees the output projection: it may hold anything that is finite.
    head = arrays["lm_head.weight"] = arrays["lm_head.weight"].copy()
    edges = extreme_values(head.dtype)
    head.reshape(-1)[: len(edges)] = edges
    model = write_model(toys.qwen2[0], tmp_path / "model", arrays)
    models = [{"model": str(model)} for _ in range(3)]
    if method == "linear":
        for entry, weight in zip(models, (0.1, 0.7, 1.3), strict=True):
            entry["parameters"] = {"weight": weight}
    values = {"merge_method": method, "models": models}
    if method == "recall":
        values["samples"] = {"data": toys.data, "count": 5}
    report = job.merge(make_recipe(values), tmp_path / "out")
    merged = tensors(tmp_path / "out")
    assert merged.keys() == arrays.keys()
    for name, array in arrays.items():
        assert merged[name].dtype == array.dtype
        assert merged[name].tobytes() == array.tobytes(), name
    if method == "recall":
        np.testing.assert_allclose(report["similarity"], 1.0, atol=1e-6)
        np.testing.assert_allclose(report["weights"], 1 / 3, atol=1e-6)
        assert any("look the same" in line for line in report["warnings"])


@pytest.mark.parametrize("order", [(1, 0, 2), (2, 0, 1), (2, 1, 0)])
def test_permuted_models_have_permuted_weights_and_one_result(order, toys, tmp_path):
    samples = {"data": toys.data, "count": 8}
    merge(toys.qwen2, tmp_path / "plain", samples=samples, out_dtype="float32")
    moved = order.index(2)
    shuffled = [toys.qwen2[k] for k in order]
    merge(
        shuffled,
        tmp_path / "shuffled",
        samples=samples,
        parameters={"reference": moved},
        out_dtype="float32",
    )
    plain, other = (
        json.loads((tmp_path / name / outcome.REPORT).read_text()) for name in ("plain", "shuffled")
    )
    assert other["reference"] == moved
    assert other["typical_samples"] == plain["typical_samples"]
    np.testing.assert_allclose(
        np.asarray(other["weights"]), np.asarray(plain["weights"])[list(order)], atol=1e-6
    )
    assert_same_to_rounding(
        tensors(tmp_path / "plain"),
        tensors(tmp_path / "shuffled"),
        [tensors(model) for model in toys.qwen2],
        weight_rounding=1e-6,
    )


def test_a_reference_may_be_named(toys, tmp_path):
    samples = {"data": toys.data, "count": 8}
    by_name = merge(
        toys.qwen2, tmp_path / "name", samples=samples, parameters={"reference": toys.qwen2[1]}
    )
    by_index = merge(toys.qwen2, tmp_path / "index", samples=samples, parameters={"reference": -2})
    assert by_name["reference"] == by_index["reference"] == 1
    assert by_name["weights"] == by_index["weights"]


def assert_same_to_rounding(first, second, inputs, weight_rounding=0.0):
    """Float32 tensors equal to one unit in the last place and four roundings of the inputs."""
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype == np.float32
        stack = np.stack([model[name].astype(np.float64) for model in inputs])
        allowed = np.spacing(np.abs(array)) + 4 * 2.0**-24 * np.abs(stack).max(axis=0)
        allowed += weight_rounding * np.abs(stack - stack[-1]).sum(axis=0)
        difference = np.abs(array.astype(np.float64) - second[name].astype(np.float64))
        assert (difference <= allowed).all(), name


@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_the_streamed_engine_and_the_tree_engine_agree(family, toys, tmp_path):
    models = getattr(toys, family)
    from transformers import AutoTokenizer

    streamed = merge(
        models, tmp_path / "out", samples={"data": toys.data, "count": 8}, out_dtype="float32"
    )
    checkpoints = [open_checkpoint(model) for model in models]
    arch = read_architecture(checkpoints[-1].config)
    as_float32 = [
        {name: array.astype(np.float32) for name, array in tensors(model).items()}
        for model in models
    ]
    trees = [to_flax(arch, arrays) for arrays in as_float32]

    # unlike the streamed engine: rows of the data in their order, padded to one length
    tokenizer = AutoTokenizer.from_pretrained(models[-1])
    texts = [json.loads(line)["text"] for line in Path(toys.data).read_text().splitlines()]
    rows = tokenizer(texts)["input_ids"]
    input_ids = np.zeros((len(rows), 32), np.int32)
    attention_mask = np.zeros_like(input_ids)
    for place, ids in enumerate(rows):
        input_ids[place, : len(ids)] = ids
        attention_mask[place, : len(ids)] = 1
    batches = [
        {"input_ids": input_ids[at : at + 20], "attention_mask": attention_mask[at : at + 20]}
        for at in (0, 20)
    ]

    def apply_fn(tree, batch):
        return forward(arch, tree, batch["input_ids"], batch["attention_mask"])[0]

    def unit_of(path):
        group = path[0].key
        return ("stacked", 0, 1) if group == "layers" else group

    rows = streamed["typical_samples"]
    merged, report = recall_merge(trees, apply_fn, batches, unit_of=unit_of, typical=rows)
    assert report["typical_samples"] == streamed["typical_samples"]
    assert report["units"] == streamed["units"] == list(UNITS)
    for key, tolerance in (("similarity", 1e-5), ("weights", 1e-6), ("adjacent", 1e-5)):
        np.testing.assert_allclose(report[key], streamed[key], atol=tolerance, err_msg=key)
    np.testing.assert_allclose(report["sigma"], streamed["sigma"], rtol=1e-5)

    # the tensors: with the very same weights, and with the tree engine's own
    again = merge_trees(trees, np.asarray(streamed["weights"]), unit_of=unit_of)
    result = tensors(tmp_path / "out")
    assert_same_to_rounding(result, from_flax(arch, again), as_float32)
    assert_same_to_rounding(result, from_flax(arch, merged), as_float32, weight_rounding=1e-6)
