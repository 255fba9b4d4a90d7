"""Rows of tensors: each is read once, by the process whose devices have it."""

import json

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.checkpoint.dtypes import DTYPE_OF_NAME, is_float
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.engine.pod import merge as pod_merge
from recall_jax.engine.pod.merge import MergedRows, iterate_pieces
from recall_jax.engine.pod.rows import put_rows_layout, read_rows_layout, row_ranges
from recall_jax.engine.resident import ResidentTensors
from recall_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.eight_devices

MESH = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
DEVICES = list(MESH.devices.flat)
# bool and scalar first, so that what follows does not lie aligned
SHAPES = {
    "flags": ("BOOL", (3,)),
    "scalar": ("F32", ()),
    "matrix": ("BF16", (37, 5)),
    "step": ("I64", (9,)),
    "wide": ("F64", (16, 3)),
    "empty": ("F32", (0, 4)),
    "thin": ("F16", (4, 0)),
}


def bits(spec):
    """Any bits: -0.0, subnormals, infinity; of the many NaN one, which no file is left with."""
    drawn = np.random.default_rng(0).integers(0, 256, spec.nbytes, np.uint8)
    if spec.dtype == np.bool_:
        drawn %= 2
    array = drawn.view(spec.dtype).reshape(spec.shape)
    if spec.dtype.itemsize == 2 and array.size > 8:
        array.reshape(-1).view(np.uint16)[:4] = 0x8000, 0x0001, 0x8001, 0x7F80
    if is_float(spec.dtype):
        with np.errstate(invalid="ignore"):
            array[np.isnan(array)] = np.nan
    return array


SPECS = {name: TensorSpec(DTYPE_OF_NAME[kind], shape) for name, (kind, shape) in SHAPES.items()}
ARRAYS = {name: bits(spec) for name, spec in SPECS.items()}
STORED = {name: array for name, array in ARRAYS.items() if array.size}  # no model has empty ones


@pytest.fixture(params=["model.safetensors", "pytorch_model.bin"])
def folder(request, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    if request.param.endswith(".bin"):
        import torch

        def tensor(array):
            if array.dtype == ml_dtypes.bfloat16:
                return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
            return torch.from_numpy(array)

        torch.save(
            {name: tensor(array) for name, array in STORED.items()}, tmp_path / request.param
        )
    else:
        with ShardedWriter(tmp_path, {name: SPECS[name] for name in STORED}) as writer:
            for name, array in STORED.items():
                writer.write(name, array)
    return tmp_path


def same_bits(one, other):
    assert one.dtype == other.dtype
    np.testing.assert_array_equal(
        np.ascontiguousarray(one).reshape(-1).view(np.uint8),
        np.ascontiguousarray(other).reshape(-1).view(np.uint8),
    )


def test_rows_are_those_of_the_tensor_and_only_they_are_read(folder):
    model = open_checkpoint(folder)
    for name, array in STORED.items():
        rows = array.reshape(array.shape or (1,))
        for start, stop in [(0, len(rows)), (1, 3), (2, 2), (len(rows) // 2, len(rows))]:
            before = model.bytes_read
            read = model.read_rows(name, start, stop)
            assert read.shape == rows[start:stop].shape
            same_bits(read, rows[start:stop])
            assert model.bytes_read - before == rows[start:stop].nbytes


@given(
    num_rows=st.integers(0, 100),
    owners=st.lists(st.integers(0, 2), min_size=8, max_size=8),
)
def test_every_row_is_one_process_s_in_few_ranges(num_rows, owners):
    read = []
    for process in range(3):
        own = [device for device, owner in zip(DEVICES, owners, strict=True) if owner == process]
        ranges = list(row_ranges(num_rows, MESH, own))
        assert [device for _, _, devices in ranges for device in devices] == own
        together = sum(
            a == process and b != process for a, b in zip(owners, [*owners[1:], None], strict=True)
        )
        assert len(ranges) == together
        read += [row for start, stop, _ in ranges for row in range(start, stop)]
    assert sorted(read) == list(range(num_rows))


def test_a_layout_reads_each_byte_once_and_holds_what_is_on_disk(folder):
    kept = ResidentTensors(open_checkpoint(folder))
    for name, array in STORED.items():
        laid = read_rows_layout(kept, name, MESH)
        rows = array.reshape(array.shape or (1,))
        assert laid.shape == (-(-len(rows) // 8) * 8, *rows.shape[1:])
        found = np.concatenate([np.asarray(shard.data) for shard in laid.addressable_shards])
        same_bits(found[: len(rows)], rows)
        assert not found[len(rows) :].any()
    total = sum(array.nbytes for array in ARRAYS.values())
    assert kept.bytes_read == total
    read_rows_layout(kept, "matrix", MESH)
    assert kept.bytes_read == total


@pytest.mark.parametrize("kind", DTYPE_OF_NAME)
def test_any_bits_come_through_the_gather(kind, monkeypatch):
    monkeypatch.setattr(pod_merge, "CHUNK", 32)
    spec = TensorSpec(DTYPE_OF_NAME[kind], (37, 3))
    array = bits(spec)
    pieces = iterate_pieces(MergedRows(put_rows_layout(array, MESH), True, np.ones(1)), spec, MESH)
    same_bits(np.concatenate([np.asarray(p.elements)[p.skip :] for p in pieces]), array.reshape(-1))


def test_a_tensor_of_an_adapter_is_folded_once_for_its_cuts(toys):
    model = open_checkpoint(f"{toys.llama[0]}+{toys.adapter}")
    (name,) = (n for n in model.specs if n.endswith("layers.0.mlp.down_proj.weight"))
    whole = open_checkpoint(f"{toys.llama[0]}+{toys.adapter}").read(name)
    first = model.read_rows(name, 3, 9)
    read = model.bytes_read
    assert read > whole.nbytes
    same_bits(np.concatenate([first, model.read_rows(name, 9, 12)]), whole[3:12])
    assert model.bytes_read == read
