"""Reading safetensors: bit for bit what the safetensors package wrote, and nothing malformed."""

import ctypes
import errno
import json
import mmap
import os
import sys
import tempfile
from pathlib import Path

import hypothesis.extra.numpy as numpy_strategies
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.checkpoint import safetensors as reading
from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME
from recall_jax.checkpoint.safetensors import MAX_HEADER_BYTES, SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, StorageError

names = st.text(st.characters(exclude_categories=["Cc", "Cs"]), min_size=1, max_size=12).filter(
    lambda name: name != "__metadata__" and not {"", ".", ".."} & set(name.split("/"))
)
shapes = numpy_strategies.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5)


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from(list(DTYPE_OF_NAME.values())))
    shape = draw(shapes)
    seed = draw(st.integers(0, 2**32 - 1))
    data = np.random.default_rng(seed).bytes(TensorSpec(dtype, shape).nbytes)
    if dtype == np.bool_:
        data = bytes(byte & 1 for byte in data)
    return np.frombuffer(data, dtype).reshape(shape)


def raw(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def assert_same(file: SafetensorsFile, expected: dict[str, np.ndarray]) -> None:
    assert set(file.specs) == set(expected)
    for name, array in expected.items():
        read = file.read(name)
        assert file.specs[name] == TensorSpec(array.dtype, array.shape)
        assert (read.dtype, read.shape, raw(read)) == (array.dtype, array.shape, raw(array))
        assert read.flags.c_contiguous and read.flags.aligned


def entry(dtype: str, shape: object, begin: object, end: object) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def build(header: object, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + data


@given(tensors=st.dictionaries(names, arrays(), max_size=5))
def test_reads_what_the_safetensors_package_writes(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})
    assert_same(SafetensorsFile(path), tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_reads_what_torch_saves(dtype, tmp_path):
    tensor = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"w": tensor}, path)
    read = SafetensorsFile(path).read("w")
    assert read.dtype.name == str(dtype).removeprefix("torch.")
    np.testing.assert_array_equal(read.astype(np.float64), tensor.double().numpy())


@given(array=arrays(), pad=st.integers(0, 15))
def test_data_at_any_address_reads_right(array, pad, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    name = next(name for name, dtype in DTYPE_OF_NAME.items() if dtype == array.dtype)
    header = {"w": entry(name, list(array.shape), 0, array.nbytes)}
    path.write_bytes(build(header, raw(array), pad))
    assert_same(SafetensorsFile(path), {"w": array})


def test_specs_stand_in_the_order_of_the_bytes(tmp_path):
    path = tmp_path / "x.safetensors"
    header = {
        "last": entry("U8", [2], 1, 3),
        "empty": entry("F32", [0, 9], 1, 1),
        "first": entry("I8", [], 0, 1),
    }
    path.write_bytes(build(header, b"abc"))
    assert list(SafetensorsFile(path).specs) == ["first", "empty", "last"]


@pytest.fixture(params=[True, False], ids=["ctypes", "mmap"])
def either_map(request, monkeypatch) -> None:
    """Both ways to map a file, each where it can be used."""
    if request.param and not reading._MAPS_BY_CTYPES:
        pytest.skip("no sys/mman.h that we know")
    monkeypatch.setattr(reading, "_MAPS_BY_CTYPES", request.param)


def test_a_tensor_is_mapped_only_while_an_array_on_it_lives(either_map, tmp_path):
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.arange(100_000, dtype=np.float32)}, path)
    file = SafetensorsFile(path)
    array = file.read("w")
    assert str(path) in maps.read_text()
    rows = array.reshape(100, 1000)[50:]
    del file, array
    path.unlink()
    np.testing.assert_array_equal(rows[:, 0], np.arange(50, 100) * 1000.0)
    del rows
    assert str(path) not in maps.read_text()


def test_a_tensor_cannot_be_written_to(either_map, tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, path)
    array = SafetensorsFile(path).read("w")
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        array.flags.writeable = True


@pytest.mark.skipif(not reading._MAPS_BY_CTYPES, reason="maps keep their file open here")
def test_arrays_keep_no_file_open(tmp_path):
    resource = pytest.importorskip("resource")
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({str(k): np.full(2000, k, np.float32) for k in range(500)}, path)
    file = SafetensorsFile(path)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with path.open("rb") as probe:
        lowest_free = probe.fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free + 4, hard))
    try:
        held = [file.read(name) for name in file.specs]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [str(int(array[-1])) for array in held] == list(file.specs)


@pytest.mark.skipif(not reading._MAPS_BY_CTYPES, reason="Python's own map")
def test_what_cannot_be_mapped_is_the_systems_error():
    ends = os.pipe()
    try:
        with pytest.raises(OSError, match=r"No such device|not supported"):
            reading._map(ends[0], 0, mmap.PAGESIZE)
    finally:
        for end in ends:
            os.close(end)


def test_a_file_changed_after_it_was_opened_is_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, path)
    file = SafetensorsFile(path)
    safetensors.numpy.save_file({"w": np.ones(400, np.float32)}, tmp_path / "y")
    (tmp_path / "y").replace(path)
    with pytest.raises(InputError, match=r"x\.safetensors was changed"):
        file.read("w")


# --------------------------------------------------------- bytes in memory, and disks that fail


def in_memory(path: Path) -> np.ndarray:
    """Whether each page of a file is in the system's cache."""
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pages = np.frombuffer(mapped, np.uint8)
    found = np.zeros(-(-pages.size // mmap.PAGESIZE), np.uint8)
    address, size = ctypes.c_void_p(pages.ctypes.data), ctypes.c_size_t(pages.size)
    call = ctypes.CDLL(None).mincore
    assert call(address, size, ctypes.c_void_p(found.ctypes.data)) == 0
    return (found & 1).astype(bool)


@pytest.fixture
def evicted(tmp_path) -> Path:
    """A file of three tensors of a megabyte, none of it in the system's cache."""
    path = tmp_path / "x.safetensors"
    tensors = {name: np.full(2**18, k, np.float32) for k, name in enumerate("abc")}
    safetensors.numpy.save_file(tensors, path)
    if not hasattr(os, "posix_fadvise"):
        pytest.skip("no posix_fadvise here")
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if in_memory(path).any():
        pytest.skip("this file system keeps its files in memory")
    return path


def kernel() -> tuple[int, ...]:
    """Linux's version, (0, 0) elsewhere."""
    if sys.platform != "linux":
        return 0, 0
    return tuple(map(int, os.uname().release.split(".")[:2]))


populates = pytest.mark.skipif(kernel() < (5, 14), reason="this kernel cannot populate a map")


@populates
def test_a_tensor_that_was_read_is_in_memory_and_mapped(evicted):
    array = SafetensorsFile(evicted).read("b")
    assert in_memory(evicted)[257:511].all()
    _, _, entry = Path("/proc/self/smaps").read_text().partition(str(evicted))
    _, _, size = entry.partition("Rss:")
    assert int(size.split()[0]) * 1024 >= array.nbytes


def test_a_dropped_tensor_leaves_the_cache_and_the_others_stay(evicted):
    file = SafetensorsFile(evicted)
    for name in "abc":
        assert file.read(name)[0] == "abc".index(name)
    assert in_memory(evicted).all()
    file.drop("b")
    left = in_memory(evicted)
    assert not left[257:511].any()
    assert left[:256].all() and left[513:].all()
    assert file.read("b")[-1] == 1
    with pytest.raises(KeyError):
        file.drop("d")


def test_dropping_is_a_hint_and_never_fails(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"empty": np.zeros(0, np.float32), "w": np.ones(5000, np.float32)}
    safetensors.numpy.save_file(tensors, path)
    file = SafetensorsFile(path)
    file.drop("empty")
    path.unlink()
    file.drop("w")


def test_a_file_cut_short_while_it_is_mapped_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(100_000, np.float32)}, path)
    populate = reading._populate

    def cut_first(mapped: np.ndarray) -> int:
        os.truncate(path, 5000)
        return populate(mapped)

    file = SafetensorsFile(path)
    monkeypatch.setattr(reading, "_populate", cut_first)
    with pytest.raises(InputError, match=r"x\.safetensors was changed while") as caught:
        file.read("w")
    assert not isinstance(caught.value, StorageError)


@populates
def test_pages_that_cannot_be_read_are_an_error_number_and_no_signal(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(100_000))
    with path.open("rb") as file:
        mapped = reading._map(file.fileno(), 0, 100_000)
    assert reading._populate(mapped) == 0
    os.truncate(path, 10)
    assert reading._populate(mapped) == errno.EIO


def test_a_disk_that_fails_is_told_from_a_wrong_input(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"w": np.zeros(4, np.float32)}, path)
    file = SafetensorsFile(path)
    monkeypatch.setattr(reading, "_populate", lambda mapped: errno.EIO)
    with pytest.raises(StorageError, match=r"cannot read .*x\.safetensors: Input/output error"):
        file.read("w")

    def fail(*arguments: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(Path, "open", fail)
    for attempt in (lambda: file.read("w"), lambda: SafetensorsFile(path)):
        with pytest.raises(StorageError, match=r"cannot read .*x\.safetensors: Input/output"):
            attempt()


F32 = entry("F32", [2], 0, 8)
EIGHT = bytes(8)
MALFORMED = {
    "empty": (b"", "truncated: 0 bytes"),
    "short": (b"\x10\x00\x00", "truncated: 3 bytes"),
    "header beyond file": ((50).to_bytes(8, "little") + b"{}", "header claims 50 bytes, 2 follow"),
    "header too large": ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "over 100000000"),
    "huge header": (b"\xff" * 8 + b"{}", "over 100000000"),
    "no JSON": (build(b"{oops}"), "not valid JSON"),
    "no UTF-8": (build(b'{"\xff": 1}'), "not valid JSON"),
    "UTF-16": (build("{}".encode("utf-16")), "not valid JSON"),
    "deep JSON": (build(b'{"a":' + b"[" * 100_000), "not valid JSON"),
    "long integer": (build(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "no object": (build([1]), "not a JSON object"),
    "metadata": (build({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata null": (build({"__metadata__": [1]}), "__metadata__"),
    "entry": (build({"w": 3}), "'w': its header entry is not an object"),
    "no dtype": (build({"w": {"shape": [2], "data_offsets": [0, 8]}}, EIGHT), "'w': dtype None"),
    "unknown dtype": (build({"w": entry("F33", [2], 0, 8)}, EIGHT), "'w': dtype 'F33'"),
    "dtype of no text": (build({"w": entry(7, [2], 0, 8)}, EIGHT), "'w': dtype 7"),
    "no shape": (build({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, EIGHT), "'w': shape None"),
    "shape text": (build({"w": entry("F32", "2", 0, 8)}, EIGHT), "'w': shape '2'"),
    "shape negative": (build({"w": entry("F32", [-2, -1], 0, 8)}, EIGHT), r"'w': shape \[-2, -1\]"),
    "shape fraction": (build({"w": entry("F32", [2.0], 0, 8)}, EIGHT), r"'w': shape \[2.0\]"),
    "shape bool": (build({"w": entry("F32", [2, True], 0, 8)}, EIGHT), r"'w': shape \[2, True\]"),
    "shape overflow": (build({"w": entry("F32", [2**62, 4], 0, 0)}), "too large"),
    "shape empty overflow": (build({"w": entry("F32", [0, 2**40, 2**40], 0, 0)}), "too large"),
    "shape of 65": (build({"w": entry("F32", [1] * 65, 0, 4)}, bytes(4)), "not a list of sizes"),
    "no offsets": (build({"w": {"dtype": "F32", "shape": [2]}}, EIGHT), "'w': data_offsets None"),
    "one offset": (
        build({"w": {"dtype": "F32", "shape": [2], "data_offsets": [8]}}, EIGHT),
        r"'w': data_offsets \[8\]",
    ),
    "negative offset": (build({"w": entry("F32", [2], -8, 0)}, EIGHT), "'w': data_offsets"),
    "offsets backwards": (build({"w": entry("F32", [2], 8, 0)}, EIGHT), "'w': F32 of shape"),
    "offsets and shape": (build({"w": entry("F32", [3], 0, 8)}, EIGHT), "'w': F32 .* takes 12"),
    "overlap": (build({"a": F32, "b": entry("F32", [2], 4, 12)}, bytes(12)), "'b': .* overlaps"),
    "same bytes": (build({"a": F32, "b": F32}, EIGHT), "'b': .* overlaps"),
    "hole": (build({"a": F32, "b": entry("F32", [1], 12, 16)}, bytes(16)), "'b': .* hole"),
    "hole at start": (build({"a": entry("F32", [1], 4, 8)}, EIGHT), "'a': .* hole"),
    "beyond the file": (build({"a": F32, "b": entry("F32", [2], 8, 16)}, bytes(12)), "truncated"),
    "bytes of no tensor": (build({"w": F32}, bytes(9)), "followed by bytes of no tensor"),
    "key twice": (build(b'{"w":1,"w":1}'), "'w' is given twice"),
}


@pytest.mark.parametrize(("content", "message"), MALFORMED.values(), ids=MALFORMED.keys())
def test_malformed_files_are_refused_in_one_line(content, message, tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        SafetensorsFile(path)
    assert "bad.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4"])
def test_quantised_formats_are_refused_by_name(dtype, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(build({"w": entry(dtype, [8], 0, 8)}, EIGHT))
    with pytest.raises(InputError, match=f"'w': dtype '{dtype}' is not supported; dequantise"):
        SafetensorsFile(path)


def test_an_unreadable_file_is_the_users_error(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*No such file"):
        SafetensorsFile(tmp_path / "none.safetensors")
    with pytest.raises(InputError, match=r"cannot read .*directory"):
        SafetensorsFile(tmp_path)


VALID = build(
    {
        "__metadata__": {"format": "pt"},
        "a": entry("BF16", [3], 0, 6),
        "b": entry("F32", [2, 1], 6, 14),
        "c": entry("I8", [0], 14, 14),
    },
    bytes(range(14)),
)


@given(st.lists(st.tuples(st.integers(0, len(VALID) - 1), st.integers(0, 255)), max_size=3))
def test_a_damaged_file_never_reads_where_the_safetensors_package_refuses(edits):
    content = bytearray(VALID)
    for position, byte in edits:
        content[position] = byte
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        path.write_bytes(content)
        try:
            file = SafetensorsFile(path)
        except InputError:
            return
        theirs = dict(safetensors.deserialize(bytes(content)))
        assert {name: raw(file.read(name)) for name in file.specs} == {
            name: bytes(value["data"]) for name, value in theirs.items()
        }
