"""Writing weights: the safetensors package reads them, the shards are Hugging Face's."""

import json
import subprocess
import sys
import tracemalloc
import zlib

import huggingface_hub
import hypothesis.extra.numpy as numpy_strategies
import ml_dtypes
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import DTYPE_OF_NAME, TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter, write_checksums
from recall_jax.errors import InputError

names = st.text(min_size=1, max_size=12).filter(lambda name: name != "__metadata__")
shapes = numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


def random_array(dtype: np.dtype, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    bits = np.frombuffer(
        np.random.default_rng(seed).bytes(TensorSpec(dtype, shape).nbytes), np.uint8
    )
    return (bits & 1 if dtype == np.bool_ else bits).view(dtype).reshape(shape)


arrays = st.builds(
    random_array, st.sampled_from(list(DTYPE_OF_NAME.values())), shapes, st.integers(0, 99)
)


def write(folder, tensors, shard_bytes=10**9) -> ShardedWriter:
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in tensors.items()}
    with ShardedWriter(folder, specs, shard_bytes) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return writer


def bits(array: np.ndarray) -> tuple[object, ...]:
    return array.dtype, array.shape, array.tobytes()


@given(tensors=st.dictionaries(names, arrays, min_size=1, max_size=5))
def test_the_safetensors_package_reads_what_is_written(tensors, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    write(folder, tensors)
    path = folder / "model.safetensors"
    theirs = safetensors.numpy.load_file(path)
    assert {name: bits(array) for name, array in theirs.items()} == {
        name: bits(array) for name, array in tensors.items()
    }
    ours = SafetensorsFile(path)
    assert list(ours.specs) == [*tensors]
    assert all(bits(ours.read(name)) == bits(array) for name, array in tensors.items())
    with safetensors.safe_open(path, framework="np") as file:
        assert file.metadata() == {"format": "pt"}


@pytest.mark.parametrize("dtype", DTYPE_OF_NAME.values(), ids=DTYPE_OF_NAME.keys())
def test_torch_reads_every_dtype(dtype, tmp_path):
    tensors = {"odd": random_array(np.dtype(np.int8), (3,)), "w": random_array(dtype, (4, 5))}
    write(tmp_path, tensors)
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")["w"]
    assert str(loaded.dtype).removeprefix("torch.") == dtype.name
    assert loaded.view(torch.uint8).numpy().tobytes() == tensors["w"].tobytes()


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3).T,
        np.arange(8, dtype=np.float32)[::-2],
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.broadcast_to(np.float16(3), (4, 4)),
    ],
    ids=["transposed", "strided", "fortran", "broadcast"],
)
def test_arrays_in_another_memory_order_are_written_by_their_values(array, tmp_path):
    write(tmp_path, {"w": array})
    np.testing.assert_array_equal(
        safetensors.numpy.load_file(tmp_path / "model.safetensors")["w"], array
    )


@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=12), limit=st.integers(50, 120))
def test_shards_are_planned_as_huggingface_hub_does(sizes, limit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    tensors = {f"t{i}": np.full(size, i, np.int8) for i, size in enumerate(sizes)}
    write(folder, tensors, limit)
    theirs = huggingface_hub.split_torch_state_dict_into_shards(
        {name: torch.from_numpy(array) for name, array in tensors.items()}, max_shard_size=limit
    )
    files = {path.name for path in folder.iterdir()}
    index = folder / "model.safetensors.index.json"
    if theirs.is_sharded:
        written = json.loads(index.read_text())
        assert written["weight_map"] == theirs.tensor_to_filename
        assert written["metadata"]["total_size"] == sum(sizes)
        files.remove(index.name)
    assert files == set(theirs.filename_to_tensors)
    for file, expected in theirs.filename_to_tensors.items():
        assert list(SafetensorsFile(folder / file).specs) == expected


def test_a_tensor_larger_than_a_shard_has_one_of_its_own(tmp_path):
    write(
        tmp_path, {name: np.zeros(n, np.int8) for name, n in {"a": 5, "b": 99, "c": 5}.items()}, 10
    )
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == {
        "a": "model-00001-of-00003.safetensors",
        "b": "model-00002-of-00003.safetensors",
        "c": "model-00003-of-00003.safetensors",
    }


def test_the_first_tensor_is_aligned_for_jax(tmp_path):
    write(tmp_path, {"w": np.zeros(3, ml_dtypes.bfloat16)})
    length = int.from_bytes((tmp_path / "model.safetensors").read_bytes()[:8], "little")
    assert (8 + length) % 64 == 0


def test_checksums_cover_every_file_and_agree_with_zlib(tmp_path):
    tensors = {f"w{i}": random_array(np.dtype(np.float32), (50,), i) for i in range(3)}
    writer = write(tmp_path, tensors, 200)
    assert writer.bytes_written == 600
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "a.jinja").write_bytes(b"x" * 100)
    (tmp_path / "empty").touch()
    write_checksums(tmp_path, writer.checksums)
    content = json.loads((tmp_path / "checksums.json").read_text())
    assert (content["format"], content["algorithm"]) == (1, "crc32")
    paths = [p for p in tmp_path.rglob("*") if p.is_file() and p.name != "checksums.json"]
    assert content["files"] == {
        path.relative_to(tmp_path).as_posix(): {
            "bytes": path.stat().st_size,
            "crc32": f"{zlib.crc32(path.read_bytes()):08x}",
        }
        for path in paths
    }
    assert set(writer.checksums) == {path.name for path in tmp_path.glob("model*")}


SPECS = {name: TensorSpec(np.dtype(np.float32), (2,)) for name in "ab"}
TWO = np.zeros(2, np.float32)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ([("b", TWO)], "'b' written where 'a' is due"),
        ([("a", TWO), ("b", TWO), ("a", TWO)], "'a' written where None is due"),
        ([("a", TWO)], "'b' was never written"),
        ([("a", TWO.astype(np.float64))], "'a' is float64"),
        ([("a", TWO[None])], r"'a' is float32 \(1, 2\)"),
    ],
)
def test_a_caller_that_leaves_the_plan_is_stopped(tensors, message, tmp_path):
    with (
        pytest.raises(ValueError, match=message) as caught,
        ShardedWriter(tmp_path, SPECS) as writer,
    ):
        for name, array in tensors:
            writer.write(name, array)
    assert not isinstance(caught.value, InputError)


def test_a_failing_block_keeps_its_own_error_and_writes_no_index(tmp_path):
    with pytest.raises(KeyError), ShardedWriter(tmp_path, SPECS, 8) as writer:
        writer.write("a", TWO)
        raise KeyError
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*model\.safetensors.*No such file"):
        write(tmp_path / "none", {"a": TWO})


def test_a_full_disk_is_the_users_error(tmp_path):
    # a limit on file size stands in for it; in a process of its own, as it cannot be lifted
    code = f"""
import resource, signal, numpy as np
from pathlib import Path
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
array = np.zeros(5_000, np.float32)
try:
    with ShardedWriter(Path({str(tmp_path)!r}), {{"a": TensorSpec(array.dtype, array.shape)}}) as w:
        w.write("a", array)
except InputError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == f"cannot write {tmp_path / 'model.safetensors'}: File too large\n"
    assert done.stderr == ""


def test_writing_copies_no_contiguous_array(tmp_path):
    array = np.zeros(10_000_000, np.int8)
    tracemalloc.start()
    try:
        write(tmp_path, {"w": array})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
