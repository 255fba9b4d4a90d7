"""Read and write trees in msgpack: Flax's single map, or EasyLM's stream of leaves.

Flax packs an array as an extension of type 1 (a numpy scalar as type 3) that holds its shape, the
name of its dtype and its bytes; an array of more than 2^30 bytes is packed in chunks
(flax/serialization.py). EasyLM packs pairs (path, the leaf in Flax's bytes) one after the other. No
code in a file is run.
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

MSGPACK_NAME = "tree.msgpack"  # within a folder that we write
_ARRAY, _SCALAR = 1, 3
_CHUNKED = "__msgpack_chunked_array__"
_CHUNK = 1 << 30  # bytes
_READ = 1 << 24  # bytes at once
_MOST_ITEMS = 1 << 20  # in a list or map: msgpack allocates as many as the file claims


class MsgpackTree:
    """Read the leaves of a msgpack file: Flax's stay in memory, EasyLM's are read one at a time.

    `others` holds the leaves that are not arrays.
    """

    def __init__(self, name: str, path: Path) -> None:
        """Index the leaves; InputError if the file is damaged or is something else."""
        self.name, self.path, self.bytes_read = name, path, 0
        self.specs: dict[str, TensorSpec] = {}
        self.others: dict[str, Any] = {}
        self._held: dict[str, np.ndarray] = {}
        self._starts: dict[str, int] = {}  # in a stream, the position of each leaf
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
        """Read one leaf; KeyError if unknown."""
        self.bytes_read += self.specs[name].nbytes
        if not self.is_stream:
            return self._held[name]
        with reading(f"{name} of {self.path}"), self.path.open("rb") as file:
            file.seek(self._starts[name])
            _, packed = _unpacker(file).unpack()
            return np.asarray(_joined(_unpack(packed)))

    def _index(self, stream: msgpack.Unpacker) -> int:
        """Index the leaves of a stream; return the position of its end."""
        start = 0
        for entry in stream:
            path, packed = entry
            if not isinstance(path, list):
                raise ValueError("a leaf without a path")
            self._note("/".join(map(str, path)), _joined(_unpack(packed)), start)
            start = stream.tell()
        return start

    def _hold(self, stream: msgpack.Unpacker) -> int:
        """Keep the leaves of a map in memory; return the position of its end."""
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
    """Write leaves, given in the order of `like.specs`, in the format of `like`.

    The leaves of `like` that are not arrays are written unchanged.
    """
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
    """Build the tree of these paths, with each leaf set to its path."""
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
    """Yield the path and value of each leaf of nested maps, with chunks joined."""
    for key, below in tree.items():
        path, below = f"{above}{key}", _joined(below)
        if isinstance(below, dict) and below:
            yield from _leaves(below, f"{path}/")
        else:
            yield path, below


def _joined(leaf: Any) -> Any:
    """Join the chunks of a leaf, if it has any."""
    if not (isinstance(leaf, dict) and _CHUNKED in leaf):
        return leaf
    shape = [leaf["shape"][str(axis)] for axis in range(len(leaf["shape"]))]
    chunks = [leaf["chunks"][str(index)] for index in range(len(leaf["chunks"]))]
    return np.concatenate(chunks).reshape(shape)
