"""Read and write trees on disk in any format: leaves by path, a few at a time."""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, Sharding

from recall_jax.checkpoint.flax_msgpack import MSGPACK_NAME, MsgpackTree, write_msgpack
from recall_jax.checkpoint.npz import NPZ_NAME, NpzTree, write_npz
from recall_jax.checkpoint.orbax import OrbaxTree, find_orbax, save_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError
from recall_jax.parallel.mesh import spread_over_all

TreeFile = OrbaxTree | NpzTree | MsgpackTree
Leaf = np.ndarray | jax.Array

FORMATS = {OrbaxTree: "orbax", NpzTree: "npz", MsgpackTree: "msgpack"}
_MSGPACK = (".msgpack", ".streaming")
_STREAMS = ("streaming_params", "streaming_train_state")  # EasyLM's names, without a suffix


def open_tree(name: str) -> TreeFile:
    """Open a tree: an Orbax folder, a file, or a folder that holds `tree.npz` or `tree.msgpack`.

    Raises InputError if there is none.
    """
    if (path := _file(Path(name))) is not None:
        return NpzTree(name, path) if path.suffix == ".npz" else MsgpackTree(name, path)
    if (found := find_orbax(Path(name))) is not None:
        return OrbaxTree(name, *found)
    why = "holds no tree" if Path(name).exists() else "does not exist"
    raise InputError(
        f"{name} {why}: give an Orbax checkpoint, a .npz file, or a .msgpack file of Flax or EasyLM"
    )


def is_tree(name: str) -> bool:
    """Return whether there is a tree on disk by this name."""
    try:
        return _file(Path(name)) is not None or find_orbax(Path(name)) is not None
    except InputError:  # several trees
        return True


def describe_tree(tree: TreeFile) -> dict[str, object]:
    """Describe a tree by JSON values: format, sizes in bytes, and its leaves in order."""
    return {
        "tree": tree.name,
        "format": FORMATS[type(tree)],
        "parameters": sum(math.prod(spec.shape) for spec in tree.specs.values()),
        "bytes": sum(spec.nbytes for spec in tree.specs.values()),
        "leaves": {
            name: {"shape": list(spec.shape), "dtype": spec.dtype.name, "bytes": spec.nbytes}
            for name, spec in tree.specs.items()
        },
    }


def _file(path: Path) -> Path | None:
    if path.is_file():
        known = path.suffix in (".npz", *_MSGPACK) or path.name.startswith(_STREAMS)
        return path if known else None
    inside = [path / name for name in (NPZ_NAME, MSGPACK_NAME) if (path / name).is_file()]
    return inside[0] if inside else None


def read_leaves(
    tree: TreeFile, names: Collection[str], shardings: Mapping[str, Sharding]
) -> dict[str, Leaf]:
    """Read leaves, as jax arrays if they have a sharding, otherwise as numpy arrays.

    Each process reads only its local shards of an Orbax tree. A file is read completely by every
    process, which keeps its shards. All processes must call this.
    """
    if isinstance(tree, OrbaxTree):
        return tree.read(names, shardings)
    leaves: dict[str, Leaf] = {}
    for name in names:
        array = leaves[name] = tree.read(name)
        if name in shardings:
            shard = array.__getitem__
            leaves[name] = jax.make_array_from_callback(array.shape, shardings[name], shard)
    return leaves


def nested(tree: TreeFile, leaves: Mapping[str, Any], root: str | None) -> Any:
    """Return the subtree at `root`; `leaves` has all of its arrays."""
    if isinstance(tree, OrbaxTree):
        filled = {name: leaves.get(name, tree.others.get(name)) for name in tree.names}
        subtree = tree.nest(filled, boxed=False)
    else:
        subtree = {}
        for name, leaf in leaves.items():
            *above, last = name.split("/")
            here = subtree
            for key in above:
                here = here.setdefault(key, {})
            here[last] = leaf
    for key in root.split("/") if root else ():
        subtree = subtree[int(key)] if isinstance(subtree, list) else subtree[key]
    return subtree


def write_tree(folder: Path, like: TreeFile, leaves: Iterable[tuple[str, Leaf]]) -> None:
    """Write leaves, in order, into `folder` in the format and structure of the tree `like`.

    A file is written leaf by leaf; an Orbax tree is written to `tree/` at the end, by all
    processes.
    """
    if isinstance(like, OrbaxTree):
        tree = like.nest({**like.others, **dict(leaves)}, boxed=True)
        save_orbax(folder, tree, *([like.part] if like.part else []))
    elif isinstance(like, NpzTree):
        write_npz(folder / NPZ_NAME, _on_host(leaves))
    else:
        write_msgpack(like, folder / MSGPACK_NAME, _on_host(leaves))


def leaf_sharding(spec: TensorSpec, mesh: Mesh | None, stacked: int | None) -> Sharding | None:
    """Return a sharding over all devices of the mesh, by the longest dimension that they divide.

    The dimension that stacks layers is excepted. A leaf without such a dimension is replicated.
    Returns None, for arrays that stay on the host, if there is no mesh and for 64-bit types, which
    JAX has only under x64.
    """
    if mesh is None or spec.dtype.itemsize > 4:
        return None
    return spread_over_all(spec.shape, mesh, stacked=stacked)


def _on_host(leaves: Iterable[tuple[str, Leaf]]) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, np.asarray(leaf)) for name, leaf in leaves)
