"""Names of tensors and leaves from outside: one check for every format."""

import json
import struct
import warnings
from pathlib import Path

import flax.serialization
import msgpack
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
import torch

from recall_jax.checkpoint.flax_msgpack import MsgpackTree
from recall_jax.checkpoint.npz import NpzTree
from recall_jax.checkpoint.orbax import load_orbax
from recall_jax.checkpoint.pytorch_bin import PytorchFile
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.errors import InputError
from recall_jax.jobs.trees.files import open_tree

NAMES = (
    "/etc/passwd",
    "a/../../b",
    "..",
    "a//b",
    "./a",
    "",
    "a\x1b[2Jb",
    "a\nb",
    "a\x9fb",
    "a" * 1001,
)


def one_line(read, *words) -> None:
    with pytest.raises(InputError) as caught:
        read()
    line = str(caught.value)
    assert line.isprintable() and len(line) < 600
    for word in words:
        assert str(word) in line


def safetensors(path: Path, name: str) -> None:
    header = json.dumps({name: {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")


def pytorch(path: Path, name: str) -> None:
    torch.save({name: torch.ones(1)}, path)


def npz(path: Path, name: str) -> None:
    np.savez(path, **{name: np.ones(1)})


def flax_map(path: Path, name: str) -> None:
    path.write_bytes(flax.serialization.msgpack_serialize({name: np.ones(1)}))


def easylm_stream(path: Path, name: str) -> None:
    path.write_bytes(msgpack.packb((name.split("/"), flax.serialization.to_bytes(np.ones(1)))))


FORMATS = {
    safetensors: ("x.safetensors", SafetensorsFile),
    pytorch: ("x.bin", PytorchFile),
    npz: ("x.npz", lambda path: NpzTree("x", path)),
    flax_map: ("x.msgpack", lambda path: MsgpackTree("x", path)),
    easylm_stream: ("x.streaming", lambda path: MsgpackTree("x", path)),
}


@pytest.mark.parametrize("write", FORMATS, ids=lambda write: write.__name__)
def test_no_format_reads_a_name_that_is_none(write, tmp_path):
    file, read = FORMATS[write]
    for name in NAMES:
        if (write, name) == (npz, ""):
            continue  # numpy cannot write it
        write(tmp_path / file, name)
        one_line(lambda: read(tmp_path / file), file, "the name")
    write(tmp_path / file, "model.layers.0 (a/b) ä")
    assert list(read(tmp_path / file).specs) == ["model.layers.0 (a/b) ä"]


def test_a_lone_surrogate_is_in_no_name(tmp_path):
    safetensors(tmp_path / "x.safetensors", "a\ud800b")
    one_line(lambda: SafetensorsFile(tmp_path / "x.safetensors"), r"a\ud800b")


def test_a_leaf_is_no_folder_of_another_and_stands_once(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, **{"a": np.ones(1), "a/b/c": np.ones(1)})
    one_line(lambda: NpzTree("x", path), "a is a leaf and holds others")
    path = tmp_path / "x.msgpack"
    path.write_bytes(msgpack.packb({1: 2, "1": 3}))
    one_line(lambda: MsgpackTree("x", path), "two leaves are called 1")
    path = tmp_path / "x.streaming"
    leaf = flax.serialization.to_bytes(np.ones(1))
    path.write_bytes(msgpack.packb((["a"], leaf)) * 2)
    one_line(lambda: MsgpackTree("x", path), "two leaves are called a")


def rename(folder: Path, keys: list[str]) -> None:
    """Give the leaf `a` of a tree of Orbax's another path."""
    path = folder / "_METADATA"
    content = json.loads(path.read_text())
    entry = content["tree_metadata"].pop("('a',)")
    entry["key_metadata"] = [{"key": key, "key_type": 2} for key in keys]
    content["tree_metadata"][str(tuple(keys))] = entry
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    "keys", [["{victim}/a"], ["../victim/a"], [".", "/victim/a"], ["b/.", "/.", "/victim/a"]]
)
def test_a_leaf_of_orbax_s_is_read_from_no_other_folder(keys, tmp_path):
    for name, value in (("victim", 7), ("evil/tree", 1)):
        with warnings.catch_warnings(action="ignore"):
            leaves = {"a": np.full(2, value, np.float32), "b": np.zeros(1, np.float32)}
            orbax_v0.PyTreeCheckpointer(use_ocdbt=False).save(tmp_path / name, leaves)
    evil = tmp_path / "evil"
    rename(evil / "tree", [key.format(victim=tmp_path / "victim") for key in keys])
    one_line(lambda: open_tree(str(evil)), evil)
    one_line(lambda: load_orbax(evil), evil)
