"""The plan fits the memory allowed: smaller batches, then more passes, then a refusal in a line."""

import ctypes
import mmap
import os
import resource
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from deep_models import PROMPT_FREE, watch, write_adapter, write_model

from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine import batching, budget, pooled
from recall_jax.engine.chunks import CHUNK
from recall_jax.engine.needs import NO_NEEDS, Needs, always, linear_weights
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.methods.registry import METHODS
from recall_jax.models.config import read_architecture
from recall_jax.recipes.recipe import make_recipe

MIB = 1 << 20


@pytest.fixture
def holding_nothing(monkeypatch):
    """As if this process held nothing and compiled for nothing, so that arrays are all there is."""
    for module in (budget, batching):
        monkeypatch.setattr(module, "held_bytes", lambda: 0)
        monkeypatch.setattr(module, "_COMPILATION_BYTES", 0)
    for module in (batching, pooled):
        monkeypatch.setattr(module, "SELECTION_BYTES", 0)


def recall_recipe(toys):
    values = {"merge_method": "recall", "models": [{"model": name} for name in toys.qwen2]}
    return make_recipe(values | {"samples": {"data": toys.data, "count": 12, "pool": 30}})


@pytest.mark.parametrize("method", ["recall", "linear"])
def test_too_little_is_refused_before_a_weight_is_read(method, toys, tmp_path, monkeypatch, recall):
    monkeypatch.setattr(Checkpoint, "read", lambda self, name: pytest.fail("a weight is read"))
    if method == "recall":
        command = ["quick", *toys.qwen2, "--data", toys.data, "--out", tmp_path / "out"]
    else:
        recipe = tmp_path / "average.yml"
        models = "".join(f"- model: {name}\n" for name in toys.qwen2)
        recipe.write_text(f"merge_method: average\nmodels:\n{models}")
        command = ["merge", recipe, tmp_path / "out"]
    done = recall(*command, "--memory", "3MiB")
    assert done.status == 2
    assert done.err.count("\n") == 1
    assert " MiB of memory and may take 3 MiB: " in done.err and "--memory" in done.err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_the_forward_is_cut_finer_and_then_refused(toys, holding_nothing):
    arch = read_architecture(open_checkpoint(toys.qwen2[0]).config)
    sizes = {"num_models": 2, "batch_size": 8, "itemsize": 4, "stored_itemsize": 2, "overhead": 0}
    whole = batching.fit_batching(arch, [40] * 20, budget=1 << 40, **sizes)
    assert whole.batch_size == 8
    seen = [whole]
    while True:
        try:
            finer = batching.fit_batching(
                arch, [40] * 20, budget=seen[-1].needed_bytes - 1, **sizes
            )
        except InputError as refusal:
            assert "\n" not in str(refusal)
            break
        assert finer.needed_bytes < seen[-1].needed_bytes
        seen.append(finer)
    assert [each.batch_size for each in seen] == [8, 4, 2, 1]


def test_selection_takes_more_passes_within_the_budget(toys, holding_nothing):
    arch = read_architecture(open_checkpoint(toys.qwen2[0]).config)
    sizes = {"num_units": 1, "batch_size": 4, "itemsize": 4, "stored_itemsize": 2, "overhead": 0}
    lengths = [40] * 400
    whole = batching.fit_passes(arch, lengths, budget=1 << 40, **sizes)
    assert len(whole.rows) == 1
    halved = batching.fit_passes(arch, lengths, budget=whole.needed_bytes - 1, **sizes)
    assert len(halved.rows) == 2 and halved.needed_bytes < whole.needed_bytes
    assert halved.batch_size == whole.batch_size
    assert sorted(np.concatenate(halved.rows)) == list(range(400))


def test_pieces_become_smaller_before_a_merge_is_refused(toys, holding_nothing):
    models = [open_checkpoint(name) for name in toys.qwen2]
    specs = models[-1].specs
    chunk, most = budget.fit_chunk_size(models, specs, 8, 1 << 40)
    assert chunk == CHUNK and most == 10 * CHUNK * 4 * 2  # four bfloat16 elements at a time
    smaller, least = budget.fit_chunk_size(models, specs, 8, most - 1)
    assert smaller < chunk and least < most
    with pytest.raises(InputError, match=r"needs .* may take .*--memory"):
        budget.fit_chunk_size(models, specs, 8, 1000)


def test_a_cut_merge_agrees_with_a_whole_one(toys, tmp_path, monkeypatch, holding_nothing):
    recipe = recall_recipe(toys)
    whole = job.merge(recipe, tmp_path / "whole", options=job.MergeOptions(memory=1 << 40))
    tight = None
    for allowed in range(16 << 10, 8 << 20, 16 << 10):  # the least that is not refused
        try:
            options = job.MergeOptions(memory=allowed)
            tight = job.merge(recipe, tmp_path / "tight", options=options)
            break
        except InputError:
            continue
    assert tight is not None
    assert whole["memory"]["batch_size"] == 8 and tight["memory"]["batch_size"] == 1
    assert tight["memory"]["chunk_elements"] < whole["memory"]["chunk_elements"]
    assert tight["memory"]["planned_bytes"] <= allowed
    assert (whole["selection_passes"], tight["selection_passes"]) == (0, 1)
    assert tight["typical_samples"] == whole["typical_samples"]
    np.testing.assert_allclose(tight["weights"], whole["weights"], atol=1e-6)


def test_what_is_free_ends_at_the_limits_of_process_and_group(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "_CONTROL_GROUPS", tmp_path)
    monkeypatch.setattr(budget, "_control_group", lambda: "/job/step")
    unlimited = budget.free_bytes()
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 100\ninactive_file 300\nactive_file 400\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert budget.free_bytes() > 100 * MIB and unlimited > 100 * MIB
    (tmp_path / "memory.max").write_text("5000\n")
    assert budget.free_bytes() == 4700  # files in the cache can go
    (tmp_path / "job").mkdir()
    for name, content in (("max", "2000"), ("current", "500"), ("stat", "anon 500\n")):
        (tmp_path / "job" / f"memory.{name}").write_text(content)
    assert budget.free_bytes() == 1500
    (tmp_path / "job" / "memory.max").unlink()
    (tmp_path / "memory.max").write_text("200\n")  # which the group has passed
    assert budget.free_bytes() == 0
    (tmp_path / "memory.max").unlink()
    held = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
    monkeypatch.setattr(resource, "getrlimit", lambda which: (held + 64 * MIB, -1))
    assert 48 * MIB < budget.free_bytes() < 80 * MIB
    assert budget.memory_budget(None) >= budget.held_bytes()
    assert budget.memory_budget(12345) == 12345


def cached_share(folder: Path) -> float:
    """Of the pages of a model's files, how many the system keeps."""
    libc = ctypes.CDLL(None, use_errno=True)
    pages = kept = 0
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        array = np.frombuffer(mapped, np.uint8)
        found = np.zeros(-(-array.size // mmap.PAGESIZE), np.uint8)
        arguments = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.size)
        assert libc.mincore(*arguments, ctypes.c_void_p(found.ctypes.data)) == 0
        pages, kept = pages + found.size, kept + int((found & 1).sum())
    return kept / pages


@pytest.mark.skipif(sys.platform != "linux", reason="mincore and the page cache are Linux's")
def test_models_larger_than_the_memory_do_not_stay_in_the_cache(toys, tmp_path):
    config = {"num_hidden_layers": 12, "vocab_size": 97}
    models = [
        write_model(toys.llama[0], tmp_path / str(k), ml_dtypes.bfloat16, seed=k, **config)
        for k in range(2)
    ]
    os.sync()  # what is not on disk yet cannot be dropped
    size = sum(open_checkpoint(model).nbytes for model in models)
    recipe = make_recipe({"merge_method": "average", "models": [{"model": str(m)} for m in models]})
    job.merge(recipe, tmp_path / "roomy", options=job.MergeOptions(memory=1 << 40))
    assert min(map(cached_share, models)) > 0.9  # the system may take a page back
    # all that this process holds counts, which is more than these models: so count nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "held_bytes", lambda: 0)
        patch.setattr(budget, "_COMPILATION_BYTES", 0)
        job.merge(recipe, tmp_path / "tight", options=job.MergeOptions(memory=size - 1))
    # the last units are still in use when the walk ends
    assert max(map(cached_share, models)) < 0.25


@pytest.mark.optimised
@pytest.mark.skipif(sys.platform != "linux", reason="RssAnon is Linux's")
def test_adapters_are_in_the_plan(toys, tmp_path, cache):
    """Two models of one base, each with an adapter: folded into memory a unit at a time."""
    base = write_model(
        toys.llama[0],
        tmp_path / "base",
        ml_dtypes.bfloat16,
        seed=0,
        num_hidden_layers=4,
        intermediate_size=8192,
    )
    models = [f"{base}+{write_adapter(base, tmp_path / f'adapter-{k}', seed=k)}" for k in range(2)]
    out = tmp_path / "out"
    command = ("quick", *models, "--data", toys.data, "--out", out)
    watched = watch(cache, out, *command, variables=PROMPT_FREE)
    planned = watched.report["memory"]["planned_bytes"]
    assert watched.peak <= planned <= 2.5 * watched.peak


@pytest.mark.optimised
@pytest.mark.parametrize("num_models", [2, 3])
@pytest.mark.parametrize("name", ["ties", "dare_linear", "dare_ties", "opcm", "regmean"])
def test_what_is_made_of_a_whole_tensor_is_in_the_plan(name, num_models):
    method, size = METHODS[name], 256
    rescaled = {"rescale": True} if "rescale" in method.parameters.model_fields else {}
    kernel = method.kernel(method.parameters(**rescaled))
    values = {
        "weight": jnp.ones(num_models),
        "density": jnp.full(num_models, 0.5),
        "lambda_": jnp.float32(1),
        "alpha": jnp.float32(0.5),
        "seed": jnp.uint32(0),
    }
    if name == "regmean":
        values["gram"] = jnp.ones((num_models, size, size))
    tensor = jax.ShapeDtypeStruct((4 * size, size), jnp.bfloat16)
    base = tensor if method.needs.base else None

    def merge(models, values, base):
        return kernel(models, values, base=base, reference=-1, dtype=jnp.bfloat16)

    program = jax.jit(merge).lower([tensor] * num_models, values, base).compile()
    planned = method.needs.scratch * (num_models + method.needs.base)
    assert program.memory_analysis().temp_size_in_bytes <= planned * 4 * tensor.size


def test_only_what_a_method_needs_whole_is_planned_whole(toys, holding_nothing):
    models = [open_checkpoint(name) for name in toys.qwen2]
    specs = {
        "model.embed_tokens.weight": TensorSpec(np.dtype(np.float32), (1 << 20, 64)),
        "model.layers.0.mlp.up_proj.weight": TensorSpec(np.dtype(np.float32), (512, 64)),
        "model.norm.weight": TensorSpec(np.dtype(np.float32), (64,)),
    }
    needs = {
        "none": NO_NEEDS,
        "linear": Needs(full_tensors=linear_weights, scratch=3),
        "all": Needs(full_tensors=always, scratch=5),
    }
    planned = {
        kind: budget.fit_chunk_size(models, specs, 2, 1 << 40, needs=need)
        for kind, need in needs.items()
    }
    assert planned["linear"][0] == planned["none"][0] == CHUNK and planned["all"][0] is None
    more = budget._COMPILATION_BY_SHAPE_BYTES
    assert more < planned["linear"][1] - planned["none"][1] < more + (1 << 23)
    assert planned["all"][1] > 5 * len(models) * (1 << 26) * 4
