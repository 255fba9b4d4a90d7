"""Reading .bin files: torch's own values bit for bit, and no code from the file."""

import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME
from recall_jax.checkpoint.pytorch_bin import PytorchFile
from recall_jax.errors import InputError

TORCH_DTYPES = {dtype.name: getattr(torch, dtype.name) for dtype in DTYPE_OF_NAME.values()}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def save(content: object, folder: Path, **options: bool) -> Path:
    path = folder / "pytorch_model.bin"
    torch.save(content, path, **options)
    return path


def assert_same(file: PytorchFile, expected: dict[str, torch.Tensor]) -> None:
    assert list(file.specs) == list(expected)
    for name, tensor in expected.items():
        array = file.read(name)
        assert (array.dtype, array.shape) == (file.specs[name].dtype, file.specs[name].shape)
        assert array.dtype.name == str(tensor.dtype).removeprefix("torch.")
        assert array.shape == tuple(tensor.shape)
        assert array.tobytes() == bits(tensor)
        assert array.flags.c_contiguous and not array.flags.writeable


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_every_dtype_reads_bit_for_bit(zipped, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 2, (3, 4 * dtype.itemsize), generator=generator, dtype=torch.uint8)
        .mul(97 if dtype != torch.bool else 1)
        .view(dtype)
        for name, dtype in TORCH_DTYPES.items()
        if zipped or name not in ("uint16", "uint32", "uint64")  # younger than the legacy format
    }
    path = save(tensors, tmp_path, _use_new_zipfile_serialization=zipped)
    assert_same(PytorchFile(path), tensors)


def test_tensors_that_are_no_plain_block_of_memory(tmp_path):
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    tensors = {
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "window": whole[1:3],
        "tied": whole,
        "broadcast": torch.ones(1, dtype=torch.bfloat16).expand(3, 4),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "scalar": torch.tensor(3.0, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3),
    }
    assert_same(PytorchFile(save(tensors, tmp_path)), tensors)


def test_the_state_of_a_module_reads(tmp_path):
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    assert_same(PytorchFile(save(state, tmp_path)), dict(state))


@pytest.mark.parametrize(
    "content",
    [
        [torch.ones(2)],
        {"model": {"w": torch.ones(2)}},
        {"w": torch.ones(2), "step": 3},
        {3: torch.ones(2)},
        torch.ones(2),
    ],
    ids=["list", "nested", "number", "integer name", "tensor"],
)
def test_only_a_plain_mapping_of_tensors_is_read(content, tmp_path):
    with pytest.raises(InputError, match=r"pytorch_model\.bin is not a plain mapping"):
        PytorchFile(save(content, tmp_path))


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.zeros(2, device="meta"),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.float8_e4m3fn),
    ],
    ids=["sparse", "meta", "complex", "float8"],
)
def test_tensors_of_other_kinds_are_refused_by_name(tensor, tmp_path):
    with pytest.raises(InputError, match=r"pytorch_model\.bin, tensor 'w': .* \(.*\)") as caught:
        PytorchFile(save({"fine": torch.ones(1), "w": tensor}, tmp_path))
    assert "\n" not in str(caught.value)


class Poison:
    """Unpickled, it would touch a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle"])
def test_a_poisoned_pickle_is_refused_and_not_run(kind, tmp_path):
    mark = tmp_path / "mark"
    content = {"w": torch.ones(2), "x": Poison(mark)}
    if kind == "pickle":
        path = tmp_path / "pytorch_model.bin"
        path.write_bytes(pickle.dumps(content))
    else:
        path = save(content, tmp_path, _use_new_zipfile_serialization=kind == "zip")
    with pytest.raises(InputError, match=r"pytorch_model\.bin .* not loaded for safety") as caught:
        PytorchFile(path)
    assert "\n" not in str(caught.value)
    assert not mark.exists()
    torch.load(path, weights_only=False) if kind != "pickle" else pickle.loads(path.read_bytes())
    assert mark.exists(), "the poison was none"


NOT_ONE_DISK = b"PK\x06\x07" + b"\0" * 12 + b"\xff" * 4 + b"PK\x05\x06" + b"\0" * 18


@pytest.mark.parametrize(
    "content", [b"", b"no pickle at all", b"PK\x03\x04 half a zip", NOT_ONE_DISK]
)
def test_a_damaged_file_is_refused_in_one_line(content, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged") as caught:
        PytorchFile(path)
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = save({"w": torch.ones(1000)}, tmp_path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(InputError, match="is damaged"):
        PytorchFile(path)


def test_without_torch_the_error_says_what_to_install(tmp_path, monkeypatch):
    path = save({"w": torch.ones(2)}, tmp_path)
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match=r"pip install 'recall-jax\[torch\]'"):
        PytorchFile(path)


def test_reading_makes_no_copy_of_a_plain_tensor(tmp_path):
    file = PytorchFile(save({"w": torch.ones(1000, dtype=torch.bfloat16)}, tmp_path))
    assert np.shares_memory(file.read("w"), file.read("w"))


def rewrite(path: Path, edit=lambda name, data: data, kind: int = zipfile.ZIP_STORED) -> None:
    """Write the zip file again, its members edited and stored in another way."""
    with zipfile.ZipFile(path) as archive:
        members = {member.filename: archive.read(member) for member in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, edit(name, data), kind)


def test_a_compressed_file_reads_as_torch_reads_it(tmp_path):
    path = save({"w": torch.arange(8.0), "v": torch.arange(100.0, 108.0)}, tmp_path)
    rewrite(path, kind=zipfile.ZIP_DEFLATED)
    assert_same(PytorchFile(path), torch.load(path, weights_only=True))


def test_a_tensor_reads_no_bytes_of_another(tmp_path):
    path = save({"w": torch.arange(8.0), "v": torch.arange(100.0, 108.0)}, tmp_path)
    rewrite(path, lambda name, data: data.replace(b"K\x08", b"K\x20"))
    assert torch.load(path, weights_only=True, mmap=True)["w"].shape == (32,)
    with pytest.raises(InputError, match="its tensors do not match the bytes stored"):
        PytorchFile(path)


def test_a_damaged_pickle_is_found_by_its_checksum(tmp_path):
    path = save({"a.weight": torch.arange(8.0)}, tmp_path)
    path.write_bytes(path.read_bytes().replace(b"a.weight", b"a.wfight"))
    with pytest.raises(InputError, match=r"pytorch_model\.bin is damaged.*CRC-32"):
        PytorchFile(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(1).expand(10**6, 10**6),
        torch.ones(2, 1).expand(2, 10**6),
        torch.ones(1000).as_strided((500, 500), (1, 1)),
    ],
    ids=["expanded", "in one dimension", "overlapping"],
)
def test_a_small_file_claims_no_large_tensor(tensor, zipped, tmp_path):
    path = save({"w": tensor}, tmp_path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"tensor 'w': its shape \[.*save it contiguous"):
        PytorchFile(path)


def test_a_negated_view_is_what_torch_makes_of_it(tmp_path):
    array = PytorchFile(save({"w": torch._neg_view(torch.arange(3.0))}, tmp_path)).read("w")
    np.testing.assert_array_equal(array, [0, -1, -2])
