"""Trees in the formats that JAX codebases keep them in, read and written bit for bit."""

import warnings
import zipfile

import flax.serialization
import jax
import ml_dtypes
import msgpack
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType

from recall_jax.checkpoint import flax_msgpack
from recall_jax.checkpoint.flax_msgpack import MsgpackTree, write_msgpack
from recall_jax.checkpoint.npz import NpzTree, write_npz
from recall_jax.checkpoint.orbax import find_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError
from recall_jax.jobs.trees.files import is_tree, leaf_sharding, open_tree, read_leaves, write_tree


def array(dtype, *shape) -> np.ndarray:
    return np.random.default_rng(len(shape)).normal(size=shape).astype(dtype)


LEAVES = {
    "params/embed/embedding": array(ml_dtypes.bfloat16, 5, 4),
    "params/layers/kernel": array(np.float16, 2, 4, 3),
    "params/norm": array(np.float64, 4),
    "params/scale": array(np.float32),
    "step": np.asarray(7, np.int64),
}


def assert_leaves(tree, expected) -> None:
    assert list(tree.specs) == list(expected)
    for name, leaf in expected.items():
        read = tree.read(name)
        assert (read.dtype, read.shape) == (leaf.dtype, leaf.shape), name
        assert tree.specs[name] == TensorSpec(leaf.dtype, leaf.shape)
        assert read.tobytes() == leaf.tobytes(), name
        assert read.flags.c_contiguous


def assert_one_line(run, *words) -> None:
    with pytest.raises(InputError) as caught:
        run()
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert str(word) in line


# ------------------------------------------------------------------------------------------- npz


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_npz_files_of_numpy_are_read(save, tmp_path):
    leaves = {**LEAVES, "params/layers/kernel": np.asfortranarray(LEAVES["params/layers/kernel"])}
    with warnings.catch_warnings(action="ignore"):  # that bfloat16 is written as raw bytes
        save(tmp_path / "tree.npz", **leaves)
    assert_leaves(NpzTree("tree", tmp_path / "tree.npz"), LEAVES)


def test_numpy_reads_what_is_written(tmp_path):
    for name in ("first.npz", "second.npz"):
        write_npz(tmp_path / name, LEAVES.items())
    assert (tmp_path / "first.npz").read_bytes() == (tmp_path / "second.npz").read_bytes()
    assert_leaves(NpzTree("tree", tmp_path / "first.npz"), LEAVES)
    with np.load(tmp_path / "first.npz") as loaded:
        assert loaded.keys() == LEAVES.keys()
        for name, leaf in LEAVES.items():
            assert loaded[name].tobytes() == leaf.tobytes()
            assert loaded[name].dtype == (leaf.dtype if leaf.dtype.kind != "V" else "V2")


def test_npz_files_that_are_none_are_refused(tmp_path):
    path = tmp_path / "bad.npz"
    path.write_bytes(b"no zip file")
    assert_one_line(lambda: NpzTree("bad", path), path, "damaged")
    np.savez(path, pickled=np.asarray([{}], object))
    assert_one_line(lambda: NpzTree("bad", path), path, "pickled")
    np.savez(path, **LEAVES)
    path.write_bytes(path.read_bytes()[:-40])
    assert_one_line(lambda: NpzTree("bad", path), path, "damaged")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_single_bit_of_an_npz_file_is_found(save, tmp_path):
    path = tmp_path / "tree.npz"
    leaves = {"a/b": array(np.float32, 3, 5), "c": array(np.float16, 4)}
    save(path, **leaves)
    whole = path.read_bytes()
    found = 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            tree = NpzTree("tree", path)
            read = {name: tree.read(name).tobytes() for name in tree.specs}
        except InputError as error:
            found += 1
            assert str(path) in str(error) and "\n" not in str(error)
            continue
        # a date, a permission, or the name of a leaf, which the user's patterns know
        assert list(read.values()) == [leaf.tobytes() for leaf in leaves.values()]
    assert found > len(whole) / 2


def write_member(path, header: str, data: bytes, kind=zipfile.ZIP_STORED, name="a.npy") -> None:
    text = f"{header:<118}\n".encode()
    with zipfile.ZipFile(path, "w") as archive:
        content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data
        archive.writestr(name, content, kind)


@pytest.mark.parametrize(
    ("shape", "descr"),
    [
        ("(1000000000000,)", "<f4"),
        ("(1000000000000, 1000000000000, 1000000000000)", "<f4"),
        ("(-5, -1)", "<f4"),
        ("(4,)", "<f4"),
        ("(6,)", "<f4"),
        ("(5,)", "|O"),
        ("(1,)", "|V20"),
    ],
)
def test_a_shape_of_an_npz_file_is_held_to_its_bytes(shape, descr, tmp_path):
    path = tmp_path / "bad.npz"
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}}}"
    write_member(path, header, b"\0" * 20)
    assert_one_line(lambda: NpzTree("bad", path), path, "a ")


def test_a_zip_bomb_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "bad.npz"
    header = "{'descr': '|u1', 'fortran_order': False, 'shape': (50000000,)}"
    write_member(path, header, bytes(50_000_000), zipfile.ZIP_BZIP2)
    assert path.stat().st_size < 1000
    assert_one_line(lambda: NpzTree("bad", path), path, "save it again")


# --------------------------------------------------------------------------------------- msgpack

FLAX = {
    "params": {
        "embed": {"embedding": LEAVES["params/embed/embedding"]},
        "layers": {"kernel": LEAVES["params/layers/kernel"]},
        "norm": LEAVES["params/norm"],
        "scale": LEAVES["params/scale"],
    },
    "step": LEAVES["step"],
    "epoch": 3,
    "nothing": None,
    "empty": {},
}


@pytest.mark.parametrize("chunk", [1 << 30, 16])
def test_msgpack_of_flax_there_and_back(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
    monkeypatch.setattr(flax_msgpack, "_CHUNK", chunk)
    path, back = tmp_path / "tree.msgpack", tmp_path / "back.msgpack"
    path.write_bytes(flax.serialization.msgpack_serialize(FLAX))
    tree = MsgpackTree("tree", path)
    assert_leaves(tree, LEAVES)
    assert tree.others == {"epoch": 3, "nothing": None, "empty": {}}
    write_msgpack(tree, back, ((name, tree.read(name)) for name in tree.specs))
    restored = flax.serialization.msgpack_restore(back.read_bytes())
    assert jax.tree.structure(restored) == jax.tree.structure(FLAX)
    for ours, theirs in zip(jax.tree.leaves(restored), jax.tree.leaves(FLAX), strict=True):
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        assert np.asarray(ours).tobytes() == np.asarray(theirs).tobytes()


def write_stream(path, leaves) -> None:
    """As EasyLM's StreamingCheckpointer writes a train state."""
    packer = msgpack.Packer()
    with path.open("wb") as file:
        for name, leaf in leaves.items():
            packed = flax.serialization.to_bytes(leaf)
            file.write(packer.pack((tuple(name.split("/")), packed)))


def read_stream(path) -> dict[str, np.ndarray]:
    """As EasyLM reads it."""
    with path.open("rb") as file:
        unpacker = msgpack.Unpacker(file, read_size=83886080, max_buffer_size=0)
        return {"/".join(key): flax.serialization.from_bytes(None, leaf) for key, leaf in unpacker}


def test_streams_of_easylm_there_and_back(tmp_path):
    path, back = tmp_path / "streaming_params", tmp_path / "streaming_params_2"
    write_stream(path, LEAVES)
    assert is_tree(str(path))
    tree = open_tree(str(path))
    assert_leaves(tree, LEAVES)
    write_msgpack(tree, back, ((name, tree.read(name)) for name in tree.specs))
    assert back.read_bytes() == path.read_bytes()
    for name, leaf in read_stream(back).items():
        assert leaf.tobytes() == LEAVES[name].tobytes()


def test_msgpack_that_is_none_is_refused(tmp_path):
    path = tmp_path / "bad.msgpack"
    content = flax.serialization.msgpack_serialize(FLAX)
    evil = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1 << 40], "float32", b"")))})
    strange = msgpack.packb({"a": msgpack.ExtType(1, msgpack.packb(([1], "object", b"12345678")))})
    for wrong in (b"", b"text", content[:-9], msgpack.packb([1, 2, 3]), evil, strange):
        path.write_bytes(wrong)
        assert_one_line(lambda: MsgpackTree("bad", path), path)


DAMAGES = {
    "deep": b"\x81\xa1a" * 1000 + b"\x80",
    "very deep": b"\x81\xa1a" * 100_000 + b"\x80",
    "a list of 2^31": b"\x81\xa1a\xdd\x7f\xff\xff\xff",
    "a map of 2^31": b"\xdf\x7f\xff\xff\xff",
    "lists in lists": b"\x81\xa1a" + b"\xdd\x00\x0f\xff\xff" * 1000,
    "bytes of 2^32": b"\x81\xa1a\xc9\xff\xff\xff\xff\x01",
    "a key given twice": b"\x82\xa1a\x01\xa1a\x02",
    "a key that is a list": b"\x81\x91\x01\x02",
    "a leaf without a path": b"\x92\x01\xc4\x01\xc0",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_msgpack_that_is_made_to_hurt_is_refused(damage, tmp_path):
    path = tmp_path / "bad.msgpack"
    path.write_bytes(DAMAGES[damage])
    assert_one_line(lambda: MsgpackTree("bad", path), path)


def test_msgpack_is_read_to_its_last_byte(tmp_path):
    path = tmp_path / "tree.msgpack"
    write_stream(path, LEAVES)
    stream, tree = path.read_bytes(), flax.serialization.msgpack_serialize(FLAX)
    for whole in (stream, tree):
        for wrong in (whole[:-5], whole + b"\xc0", whole + b"\xdc", whole[:-1]):
            path.write_bytes(wrong)
            assert_one_line(lambda: MsgpackTree("bad", path), path)


# ----------------------------------------------------------------------------------------- orbax


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoints as Orbax's older interface leaves them."""
    folder = tmp_path_factory.mktemp("orbax")
    tree = {"params": {"kernel": array(np.float32, 8, 4)}, "layers": [array(np.float32, 16)]}
    with warnings.catch_warnings(action="ignore"):
        with orbax_v0.StandardCheckpointer() as checkpointer:
            checkpointer.save(folder / "flat", tree)
        save = orbax_v0.args.StandardSave
        with orbax_v0.CheckpointManager(folder / "run") as manager:
            manager.save(100, args=orbax_v0.args.Composite(items=save(tree)))
        with orbax_v0.CheckpointManager(folder / "parts") as manager:
            both = orbax_v0.args.Composite(params=save(tree), optimizer=save({"mu": tree}))
            manager.save(3, args=both)
    return folder, tree


@pytest.mark.parametrize("name", ["flat", "run/100", "run/100/items", "parts/3/params"])
def test_orbax_checkpoints_of_any_kind_are_found(name, saved, tmp_path):
    folder, expected = saved
    tree = open_tree(str(folder / name))
    assert list(tree.specs) == ["layers/0", "params/kernel"]
    leaves = read_leaves(tree, list(tree.specs), {})
    assert leaves["layers/0"].tobytes() == expected["layers"][0].tobytes()
    write_tree(tmp_path, tree, leaves.items())
    again = open_tree(str(tmp_path))
    assert again.specs == tree.specs
    assert again.part == (tree.part or "state")


def test_of_several_trees_or_steps_one_is_to_be_named(saved):
    folder, _ = saved
    assert_one_line(lambda: find_orbax(folder / "run"), "the steps 100", folder / "run" / "100")
    words = ("optimizer, params", folder / "parts" / "3" / "optimizer")
    assert_one_line(lambda: find_orbax(folder / "parts" / "3"), *words)
    assert is_tree(str(folder / "run"))
    assert not is_tree(str(folder / "none"))
    assert_one_line(lambda: open_tree(str(folder / "none")), "does not exist")


def test_one_leaf_is_read_alone_and_spread(saved):
    folder, expected = saved
    tree = open_tree(str(folder / "flat"))
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    sharding = leaf_sharding(tree.specs["params/kernel"], mesh, None)
    leaves = read_leaves(tree, ["params/kernel"], {"params/kernel": sharding})
    assert leaves.keys() == {"params/kernel"}
    assert tree.bytes_read == expected["params"]["kernel"].nbytes
    (leaf,) = leaves.values()
    assert [shard.data.shape for shard in leaf.addressable_shards] == [(1, 4)] * 8
    np.testing.assert_array_equal(leaf, expected["params"]["kernel"])


@given(st.lists(st.integers(0, 32), max_size=4), st.integers(0, 3))
def test_a_leaf_is_cut_in_equal_parts_along_its_longest_axis(shape, stacked):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    stacked = stacked if stacked < len(shape) else None
    spec = TensorSpec(np.dtype(np.float32), tuple(shape))
    sharding = leaf_sharding(spec, mesh, stacked)
    part = sharding.shard_shape(spec.shape)
    cut = [axis for axis in range(len(shape)) if part[axis] != shape[axis]]
    fitting = [n for axis, n in enumerate(shape) if axis != stacked and n and n % 8 == 0]
    assert [shape[axis] for axis in cut] == ([max(fitting)] if fitting else [])
    assert stacked not in cut
