"""Writing weights: the safetensors package reads them, the shards are Hugging Face's."""

import errno
import json
import shutil
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Sequence
from pathlib import Path

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

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import Mark, ShardedWriter, write_checksums
from recall_jax.errors import InputError, StorageError
from recall_jax.files import checksums

names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and not {"", ".", ".."} & set(name.split("/"))
)
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
        ([("c", TWO)], "'c' written where 'a' is due"),
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


@pytest.mark.parametrize(
    ("pieces", "message"),
    [
        ([("a", TWO), ("b", TWO[:1])], "'b' is left unfinished"),
        ([("a", TWO[:1]), ("b", TWO)], "'b' written where 'a' is due"),
        ([("a", TWO[:1]), ("a", TWO)], "'a' has more elements than planned"),
        ([("a", TWO), ("a", TWO[:0])], "'a' written where 'b' is due"),
        ([("a", TWO.astype(np.float64)[:1])], "'a' is float64"),
        ([("a", TWO[None])], "'a' is not flat and contiguous"),
        ([("a", np.zeros(4, np.float32)[::2])], "'a' is not flat and contiguous"),
    ],
)
def test_pieces_that_leave_the_plan_are_stopped(pieces, message, tmp_path):
    with (
        pytest.raises(ValueError, match=message) as caught,
        ShardedWriter(tmp_path, SPECS) as writer,
    ):
        for name, piece in pieces:
            writer.write_piece(name, piece)
    assert not isinstance(caught.value, InputError)


def test_a_mark_or_a_resume_at_the_wrong_moment_is_stopped(tmp_path):
    with pytest.raises(ValueError, match="unfinished"), ShardedWriter(tmp_path, SPECS) as writer:
        with pytest.raises(ValueError, match="a mark needs a finished tensor"):
            writer.mark()
        writer.write_piece("a", TWO[:1])
        with pytest.raises(ValueError, match="a mark needs a finished tensor"):
            writer.mark()
        with pytest.raises(ValueError, match="before the first write"):
            writer.resume([])


def test_a_failing_block_keeps_its_own_error_and_writes_no_index(tmp_path):
    with pytest.raises(KeyError), ShardedWriter(tmp_path, SPECS, 8) as writer:
        writer.write("a", TWO)
        raise KeyError
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_a_folder_that_cannot_be_written_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot write .*model\.safetensors.*No such file"):
        write(tmp_path / "none", {"a": TWO})


LIMITED = """
import resource, sys, numpy as np
from pathlib import Path
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
array = np.zeros(5_000, np.float32)
try:
    with ShardedWriter(Path(sys.argv[1]), {"a": TensorSpec(array.dtype, array.shape)}) as writer:
        writer.write("a", array)
except StorageError as error:
    print(error)
"""


def test_a_limit_on_files_is_the_storages_fault(tmp_path):
    # in a process of its own, as the limit cannot be lifted
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"cannot write {tmp_path / 'model.safetensors'}: File too large\n"
    assert done.stderr == ""


@pytest.fixture
def small_disk(disk):
    """A file system of 1 MiB."""
    return disk("size=1m")


@pytest.mark.parametrize("reserves", [True, False])
def test_a_full_disk_is_told_before_the_work_where_room_can_be_claimed(
    reserves, small_disk, monkeypatch
):
    if not reserves:
        monkeypatch.setattr(checksums, "_linux", lambda *_: errno.ENOSYS)
    half = np.zeros(500_000, np.int8)
    specs = {name: TensorSpec(half.dtype, half.shape) for name in "abc"}
    writer = ShardedWriter(small_disk, specs)
    written = 0
    with (
        pytest.raises(StorageError, match=r"cannot write .*model\.safetensors: No space left"),
        writer,
    ):
        for name in specs:
            writer.write(name, half)
            written += 1
    assert written == (0 if reserves else 2)
    if reserves:
        assert shutil.disk_usage(small_disk).used == 0


# ---------------------------------------------------------------------------- to be resumed

WHOLE = {
    "a": random_array(np.dtype(np.float32), (7, 3), 1),
    "none": np.zeros((0, 4), np.float16),
    "b": random_array(np.dtype(ml_dtypes.bfloat16), (33,), 2),
    "c": random_array(np.dtype(np.int8), (), 3),
    "d": random_array(np.dtype(np.float32), (40,), 4),
    "last": np.zeros(0, np.float32),
}
WHOLE_SPECS = {name: TensorSpec(array.dtype, array.shape) for name, array in WHOLE.items()}


def go_on(
    folder: Path, shard_bytes: int, marks: Sequence[Mark] = (), piece: int = 10, stop: int = 10**9
) -> tuple[int, int, list[Mark]]:
    """Write what is missing, in pieces, and stop as if killed once `stop` of its bytes are there.

    Gives (marks that stood, bytes written, marks of all that is finished).
    """
    writer = ShardedWriter(folder, WHOLE_SPECS, shard_bytes)
    standing = writer.resume(marks)
    taken = list(marks[:standing])
    try:
        with writer:
            for name, array in list(WHOLE.items())[taken[-1].tensors if taken else 0 :]:
                flat = array.reshape(-1)
                for start in range(0, max(flat.size, 1), piece):
                    left = (stop - writer.bytes_written) // flat.itemsize
                    writer.write_piece(name, flat[start : start + piece][:left])
                    if left < min(piece, flat.size - start):
                        raise InterruptedError
                taken.append(writer.mark())
    except InterruptedError:
        pass
    else:
        write_checksums(folder, writer.checksums)
    return standing, writer.bytes_written, taken


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


TOTAL = sum(spec.nbytes for spec in WHOLE_SPECS.values())
shard_sizes = st.integers(1, TOTAL + 1)


@given(
    shard_bytes=shard_sizes,
    piece=st.integers(1, 50),
    stops=st.lists(st.integers(0, TOTAL), max_size=3),
)
def test_a_killed_writing_goes_on_to_identical_bytes(shard_bytes, piece, stops, tmp_path_factory):
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    _, written, expected = go_on(whole, shard_bytes)
    assert written == TOTAL
    assert [mark.tensors for mark in expected] == [1, 2, 3, 4, 5, 6]
    marks: list[Mark] = []
    for stop in stops:
        before = len(marks)
        standing, _, marks = go_on(cut, shard_bytes, marks, piece, stop)
        assert standing == before
    standing, written, marks_now = go_on(cut, shard_bytes, marks, piece)
    assert standing == len(marks)
    assert marks_now == expected
    assert written == TOTAL - sum(s.nbytes for s in list(WHOLE_SPECS.values())[: len(marks)])
    assert contents(cut) == contents(whole)


@given(shard_bytes=shard_sizes, data=st.data())
def test_no_mark_stands_after_a_byte_that_changed(shard_bytes, data, tmp_path_factory):
    whole, bad = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("bad")
    _, _, marks = go_on(whole, shard_bytes)
    go_on(bad, shard_bytes)
    file = bad / data.draw(st.sampled_from(sorted({mark.file for mark in marks})))
    content = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[position] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del content[position:]
    file.write_bytes(content)
    standing, _, _ = go_on(bad, shard_bytes, marks)
    assert standing == sum((mark.file, mark.size) <= (file.name, position) for mark in marks)
    assert contents(bad) == contents(whole)


@pytest.mark.parametrize("gone", [0, 1])
def test_no_mark_stands_after_a_shard_that_is_gone(gone, tmp_path):
    _, _, marks = go_on(tmp_path, 100)
    before = contents(tmp_path)
    file = sorted({mark.file for mark in marks})[gone]
    (tmp_path / file).unlink()
    standing, _, _ = go_on(tmp_path, 100, marks)
    assert standing == sum(mark.file < file for mark in marks)
    assert contents(tmp_path) == before


def test_marks_of_another_plan_do_not_stand(tmp_path):
    _, _, marks = go_on(tmp_path, 100)
    for changed in (
        [mark._replace(tensors=mark.tensors + 2) for mark in marks],
        [mark._replace(size=mark.size - 1) for mark in marks],
        [mark._replace(file="model.safetensors") for mark in marks],
        [mark._replace(crc32="00000000") for mark in marks],
        [mark._replace(tensors=-1) for mark in marks],
        [mark._replace(tensors=99) for mark in marks],
    ):
        before = contents(tmp_path)
        assert go_on(tmp_path, 100, changed)[0] == 0
        assert contents(tmp_path) == before
    assert go_on(tmp_path, 100, [marks[1], marks[1], marks[3]])[0] == 1
    assert go_on(tmp_path, 100, [marks[1], marks[0]])[0] == 1
    renamed = {f"{name}'": spec for name, spec in WHOLE_SPECS.items()}
    assert ShardedWriter(tmp_path, renamed, 100).resume(marks) == 0
    assert {*contents(tmp_path)} == {"checksums.json"}


def test_the_mark_in_the_first_shard_is_its_checksum(tmp_path):
    _, _, marks = go_on(tmp_path, 10**9)
    content = (tmp_path / "model.safetensors").read_bytes()
    assert [mark.crc32 for mark in marks] == [
        f"{zlib.crc32(content[: mark.size]):08x}" for mark in marks
    ]
    assert marks[-1].size == len(content)


def test_writing_copies_no_contiguous_array(tmp_path):
    array = np.zeros(10_000_000, np.int8)
    tracemalloc.start()
    try:
        write(tmp_path, {"w": array})
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
