"""Numbers that float32, in which all is computed, does not hold: merged right or refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import flax.serialization
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from jax.tree_util import DictKey

from recall_jax.checkpoint.npz import write_npz
from recall_jax.checkpoint.orbax import save_orbax
from recall_jax.engine.forward import _why_not_finite
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.jobs.convert import convert
from recall_jax.jobs.trees.merge_trees import merge_trees, unit_of_path
from recall_jax.jobs.verify import verify
from recall_jax.recipes.recipe import make_recipe

WEIGHTS = "model.safetensors"
HUGE = 1e300
BEYOND = "holds NaN, infinite values or numbers beyond float32, in which all is computed"
MESHES = [None, pytest.param("fsdp=8", marks=pytest.mark.eight_devices)]


def model(folder: Path, **tensors: np.ndarray) -> str:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "of_nobody"}')
    named = {name.replace("_", "."): array for name, array in tensors.items()}
    safetensors.numpy.save_file(named, folder / WEIGHTS)
    return str(folder)


def merged(tmp_path: Path, models: list[str], mesh: str | None = None, **keys: Any) -> Any:
    values = {"merge_method": "average", "models": [{"model": name} for name in models]}
    options = job.MergeOptions(mesh=mesh)
    job.merge(make_recipe(values | keys), tmp_path / "out", options=options)
    return safetensors.numpy.load_file(tmp_path / "out" / WEIGHTS)


def refused(tmp_path: Path, models: list[str], *words: str, **keys: Any) -> None:
    with pytest.raises(InputError) as caught:
        merged(tmp_path, models, **keys)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.parametrize("mesh", MESHES)
def test_float64_merges_with_all_other_kinds(mesh, tmp_path):
    arrays = [np.random.default_rng(k).normal(size=(5, 7)) for k in range(3)]
    kinds = [np.float64, ml_dtypes.bfloat16, np.float64]
    stored = [array.astype(kind) for array, kind in zip(arrays, kinds, strict=True)]
    names = [model(tmp_path / str(k), h_0_w=array) for k, array in enumerate(stored)]
    found = merged(tmp_path, names, mesh)["h.0.w"]
    assert found.dtype == np.float64
    expected = np.mean([array.astype(np.float64) for array in stored], axis=0)
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("mesh", MESHES)
def test_float64_beyond_float32_passes_where_equal_and_is_named_where_not(mesh, tmp_path):
    array = np.asarray([1.0, HUGE, -HUGE])
    same = [model(tmp_path / str(k), h_0_w=array) for k in range(2)]
    np.testing.assert_array_equal(merged(tmp_path, same, mesh)["h.0.w"], array)
    shutil.rmtree(tmp_path / "out")
    other = model(tmp_path / "other", h_0_w=np.ones(3))
    refused(tmp_path, [other, same[0]], f"{same[0]}: tensor h.0.w {BEYOND}", mesh=mesh)


@pytest.mark.parametrize("mesh", MESHES)
def test_an_overflow_is_told_by_what_is_to_be_done(mesh, tmp_path):
    large = [model(tmp_path / str(k), h_0_w=np.full(3, 3e4, np.float32)) for k in range(2)]
    weights = {"merge_method": "linear", "parameters": {"weight": 2, "normalize": False}}
    narrow = {"out_dtype": "float16", "mesh": mesh, **weights}
    refused(tmp_path, large, "tensor h.0.w overflows float16", "choose a wider", **narrow)
    huge = [model(tmp_path / f"h{k}", h_0_w=np.full(3, 3e38, np.float32)) for k in range(2)]
    words = ("tensor h.0.w overflows float32, in which all is computed", "are too large")
    refused(tmp_path, huge, *words, mesh=mesh, **weights)


def test_weights_are_called_finite_only_where_they_are():
    def told(value: float, dtype: Any) -> str:
        return _why_not_finite("m", "layers.0", {"t": np.asarray([1, value], dtype)})

    assert told(HUGE, np.float64) == f"m: tensor t {BEYOND}; repair this model"
    assert "tensor t holds NaN or infinite values" in told(np.nan, ml_dtypes.bfloat16)
    overflow = "hidden states overflow in unit layers.0, though the weights of this unit are finite"
    assert overflow in told(3e38, np.float32)


def test_a_conversion_makes_no_infinity_beside_one_that_is_there(tmp_path):
    for k, bad in enumerate((np.nan, np.inf)):
        name = model(tmp_path / str(k), h_0_w=np.asarray([1, bad, 1e6], np.float32))
        with pytest.raises(InputError, match=r"tensor h\.0\.w overflows float16"):
            convert(name, tmp_path / "out", "huggingface", dtype="float16")
        convert(name, tmp_path / f"same{k}", "huggingface")
        same = safetensors.numpy.load_file(tmp_path / f"same{k}" / WEIGHTS)["h.0.w"]
        np.testing.assert_array_equal(same, np.asarray([1, bad, 1e6], np.float32))


# ----------------------------------------------------------------------------------------- trees


def trees(folder: Path, *leaves: np.ndarray) -> list[str]:
    for k, leaf in enumerate(leaves):
        rest = dict.fromkeys(("embed/x", "layers/0/w", "norm"), np.full(2, k, np.float32))
        write_npz(folder / f"{k}.npz", (rest | {"layers/0/x": leaf}).items())
    return [str(folder / f"{k}.npz") for k in range(len(leaves))]


def merge_on_disk(tmp_path: Path, names: list[str]) -> np.ndarray:
    values = {"merge_method": "average", "models": [{"model": name} for name in names]}
    job.merge(make_recipe(values), tmp_path / "out")
    array: np.ndarray = np.load(tmp_path / "out" / "tree.npz")["layers/0/x"]
    return array


@pytest.mark.parametrize("dtype", [np.complex64, np.complex128])
def test_complex_leaves_pass_where_equal_and_are_refused_where_not(dtype, tmp_path):
    leaf = np.asarray([1 + 2j, 3 - 1j], dtype)
    np.testing.assert_array_equal(merge_on_disk(tmp_path, trees(tmp_path, leaf, leaf)), leaf)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(InputError, match=f"layers/0/x, {np.dtype(dtype)}, is not the same in"):
        merge_on_disk(tmp_path, trees(tmp_path, leaf, leaf + 1))
    with pytest.raises(InputError, match=r"layers/0/x is float32 in .* and complex"):
        merge_on_disk(tmp_path, trees(tmp_path, np.ones(2, np.float32), leaf))


def test_complex_leaves_in_memory_too():
    weights = np.full((2, 3), 0.5, np.float32)

    def average(*leaves: np.ndarray) -> Any:
        given = [{"layers_0": {"x": leaf}} for leaf in leaves]
        return merge_trees(given, weights, unit_of=unit_of_path)["layers_0"]["x"]

    leaf = np.asarray([1 + 2j], np.complex64)
    np.testing.assert_array_equal(average(leaf, leaf), leaf)
    with pytest.raises(InputError, match=r"\['x'\] is complex64, and not the same in tree 0"):
        average(leaf, leaf + 1)
    with pytest.raises(InputError, match=r"\['x'\] is complex64 in tree 0 and float32 in tree 1"):
        average(leaf, np.ones(1, np.float32))
    assert unit_of_path((DictKey("layers_0"), DictKey("x"))) == "layers.0"


def test_float64_leaves_beyond_float32_are_named(tmp_path):
    leaf = np.asarray([1.0, HUGE])
    np.testing.assert_array_equal(merge_on_disk(tmp_path, trees(tmp_path, leaf, leaf)), leaf)
    shutil.rmtree(tmp_path / "out")
    names = trees(tmp_path, leaf, np.ones(2))
    with pytest.raises(InputError, match=f"{names[0]}: tensor layers/0/x {BEYOND}"):
        merge_on_disk(tmp_path, names)


# ---------------------------------------------------------------------------------------- verify


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_verify_finds_what_is_not_finite(dtype, value, tmp_path):
    array = np.asarray([1, value], dtype)
    folder = Path(model(tmp_path / "model", a=np.ones(2, dtype), b=array, c=array))
    assert verify(folder).faults == ("NaN or infinite values in b, c",)


def test_verify_takes_what_is_no_fault(tmp_path):
    """Bounds without a bound, large numbers, and buffers whatever they hold."""
    finite = {"a": np.asarray([HUGE, np.finfo(np.float64).max]), "b": np.arange(3)}
    finite |= {"max": np.asarray(np.inf, np.float32)}
    folder = Path(model(tmp_path / "model", **finite, position_ids=np.arange(3)))
    assert verify(folder).faults == ()
    nan = Path(model(tmp_path / "nan", **finite, min=np.asarray(np.nan, np.float32)))
    assert verify(nan).faults == ("NaN or infinite values in min",)


@pytest.mark.parametrize("kind", ["npz", "msgpack", "orbax", "adapter"])
def test_verify_looks_into_all_that_it_knows(kind, toys, tmp_path):
    folder, bad = tmp_path / kind, np.asarray([1, np.nan], np.float32)
    folder.mkdir()
    leaves = {"embed": {"x": np.ones(2, np.float32)}, "head": {"y": bad}}
    name = "head/y"
    if kind == "adapter":
        shutil.copytree(toys.adapter, folder, dirs_exist_ok=True)
        path = folder / "adapter_model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        name = sorted(tensors)[1]
        tensors[name][0] = np.nan
        safetensors.numpy.save_file(tensors, path)
    elif kind == "npz":
        write_npz(folder / "tree.npz", {"embed/x": leaves["embed"]["x"], name: bad}.items())
    elif kind == "msgpack":
        (folder / "tree.msgpack").write_bytes(flax.serialization.msgpack_serialize(leaves))
    else:
        save_orbax(folder, leaves)
    if kind != "adapter":
        (folder / "config.json").write_text(json.dumps({"model_type": "of_nobody"}))
    assert verify(folder).faults == (f"NaN or infinite values in {name}",)
