"""Trees in msgpack: Flax's one map, or EasyLM's stream of leaves.

Flax packs an array as an extension of type 1 (a numpy scalar as type 3) that holds its shape, the
name of its dtype and its bytes, and one of more than 2^30 bytes in chunks (flax/serialization.py).
EasyLM packs (path, Flax's bytes of the leaf) one after the other. Nothing in a file is run.
"""

import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped]
import numpy as np

from recall_jax.checkpoint.dtypes import DTYPE_OF_LONG_NAME
from recall_jax.checkpoint.names import check_leaves
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, reading, shown, storage_faults

MSGPACK_NAME = "tree.msgpack"  # in a folder of ours
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 1 << 30  # bytes
_READ = 1 << 24  # bytes at once
_MOST_ITEMS = 1 << 20  # of a list or map: msgpack makes room for as many as are claimed


class MsgpackTree:
    """The leaves of a msgpack file: of Flax's held in memory, of EasyLM's read one at a time.

    `others` are leaves that are no arrays.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Read what leaves there are; InputError if the file is damaged, or something else."""
        self.name, self.path, self.bytes_read = name, path, 0
        self.specs: dict[str, TensorSpec] = {}
        self.others: dict[str, Any] = {}
        self._held: dict[str, np.ndarray] = {}
        self._starts: dict[str, int] = {}  # in a stream, where a leaf's entry begins
        self.names: list[str] = []
        with reading(str(path)), path.open("rb") as file:
            first = file.read(1)
            file.seek(0)
            # an array of two begins a stream
            self.is_stream, unpacker = first == b"\x92", _unpacker(file)
            end = self._index(unpacker) if self.is_stream else self._hold(unpacker)
            if end != (size := os.fstat(file.fileno()).st_size):
                raise ValueError(f"what it holds ends at byte {end} of {size}")
            check_leaves(self.names, path)
        if not self.specs:
            raise InputError(f"{path} holds no arrays: give a file that Flax or EasyLM wrote")

    def read(self, name: str) -> np.ndarray:
        """One leaf; KeyError if unknown."""
        self.bytes_read += self.specs[name].nbytes
        if not self.is_stream:
            return self._held[name]
        with reading(f"{name} of {self.path}"), self.path.open("rb") as file:
            file.seek(self._starts[name])
            _, packed = _unpacker(file).unpack()
            return np.asarray(_whole(_unpack(packed)))

    def _index(self, stream: msgpack.Unpacker) -> int:
        """Note the leaves of a stream; where the last one ends."""
        start = 0
        for entry in stream:
            path, packed = entry
            if not isinstance(path, list):
                raise ValueError("a leaf without a path")
            self._note("/".join(map(str, path)), _whole(_unpack(packed)), start)
            start = stream.tell()
        return start

    def _hold(self, stream: msgpack.Unpacker) -> int:
        """Hold the leaves of a map; where it ends."""
        tree = stream.unpack()
        if not isinstance(tree, dict):
            raise ValueError("no map of leaves")
        for path, leaf in _leaves(tree):
            self._note(path, leaf)
            if path in self.specs:
                self._held[path] = leaf
        return int(stream.tell())

    def _note(self, name: str, leaf: Any, start: int = 0) -> None:
        self.names.append(name)
        if isinstance(leaf, np.ndarray):
            self.specs[name], self._starts[name] = TensorSpec(leaf.dtype, leaf.shape), start
        else:
            self.others[name] = leaf


def write_msgpack(like: MsgpackTree, path: Path, leaves: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write leaves, in the order of `like.specs`, as `like` has them; its other leaves too."""
    packer = msgpack.Packer()
    coming = iter(leaves)

    def value(name: str) -> Any:
        if name in like.others:
            return like.others[name]
        given, array = next(coming)
        assert given == name, "leaves come in the order of specs"
        return _packable(array)

    with storage_faults(f"write {path}"), path.open("wb") as file:
        if like.is_stream:
            for name in like.names:
                packed = msgpack.packb(value(name))
                file.write(packer.pack((name.split("/"), packed)))
        else:
            for part in _packed_map(packer, _nested(like.names), value):
                file.write(part)


def _packed_map(packer: msgpack.Packer, tree: Mapping[str, Any], value: Any) -> Iterator[bytes]:
    yield packer.pack_map_header(len(tree))
    for key, below in tree.items():
        yield packer.pack(key)
        if isinstance(below, dict):
            yield from _packed_map(packer, below, value)
        else:
            yield packer.pack(value(below))


def _nested(names: Iterable[str]) -> dict[str, Any]:
    """The tree of these paths, each leaf its own path."""
    tree: dict[str, Any] = {}
    for name in names:
        *above, last = name.split("/")
        here = tree
        for key in above:
            here = here.setdefault(key, {})
        here[last] = name
    return tree


def _packable(array: np.ndarray) -> Any:
    if array.nbytes <= _CHUNK:
        return _extension(array)
    flat = array.reshape(-1)
    step = _CHUNK // array.itemsize
    chunks = [flat[start : start + step] for start in range(0, flat.size, step)]
    return {
        _CHUNKED: True,
        "shape": {str(axis): size for axis, size in enumerate(array.shape)},
        "chunks": {str(index): _extension(chunk) for index, chunk in enumerate(chunks)},
    }


def _extension(array: np.ndarray) -> msgpack.ExtType:
    return msgpack.ExtType(
        _ARRAY, msgpack.packb((list(array.shape), array.dtype.name, array.tobytes()))
    )


def _unpacker(file: Any) -> msgpack.Unpacker:
    return msgpack.Unpacker(file, read_size=_READ, max_buffer_size=0, **_STRICTLY)


def _unpack(packed: bytes) -> Any:
    return msgpack.unpackb(packed, **_STRICTLY)


def _without_duplicates(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a map with a key given twice")
    return found


def _array(code: int, data: bytes) -> np.ndarray:
    if code not in (_ARRAY, _SCALAR):
        raise ValueError(f"a value of the unknown kind {code}")
    shape, name, content = msgpack.unpackb(data, raw=True)
    dtype = DTYPE_OF_LONG_NAME.get(name.decode())
    if dtype is None:
        raise ValueError(f"dtype {shown(name.decode())}")
    if len(content) != math.prod(shape) * dtype.itemsize:
        raise ValueError("an array with more or less bytes than its shape has")
    return np.frombuffer(content, dtype).reshape(shape)


_STRICTLY = {
    "ext_hook": _array,
    "object_pairs_hook": _without_duplicates,
    "strict_map_key": False,
    "max_array_len": _MOST_ITEMS,
    "max_map_len": _MOST_ITEMS,
}


def _leaves(tree: Mapping[Any, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested maps by path, those in chunks joined."""
    for key, below in tree.items():
        path, below = f"{above}{key}", _whole(below)
        if isinstance(below, dict) and below:
            yield from _leaves(below, f"{path}/")
        else:
            yield path, below


def _whole(leaf: Any) -> Any:
    """A leaf with its chunks, if it is in chunks, joined."""
    if not (isinstance(leaf, dict) and _CHUNKED in leaf):
        return leaf
    shape = [leaf["shape"][str(axis)] for axis in range(len(leaf["shape"]))]
    chunks = [leaf["chunks"][str(index)] for index in range(len(leaf["chunks"]))]
    return np.concatenate(chunks).reshape(shape)
