"""Trees on disk, whichever format holds them: leaves by path, read a few at a time."""

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
    """The tree that a user names: an Orbax folder, a file, or a folder that holds `tree.npz`.

    Raises InputError where there is none.
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
    """Whether a name is that of a tree on disk."""
    try:
        return _file(Path(name)) is not None or find_orbax(Path(name)) is not None
    except InputError:  # several trees
        return True


def describe_tree(tree: TreeFile) -> dict[str, object]:
    """What a tree is: format, sizes in bytes, and its leaves in order; plain values."""
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
    """Leaves as jax arrays where they have a sharding, else as numpy arrays.

    Of an Orbax tree each process reads its own parts; of a file, which is read whole, each keeps
    them. All processes must call this.
    """
    if isinstance(tree, OrbaxTree):
        return tree.read(names, shardings)
    leaves: dict[str, Leaf] = {}
    for name in names:
        array = leaves[name] = tree.read(name)
        if name in shardings:
            cut = array.__getitem__
            leaves[name] = jax.make_array_from_callback(array.shape, shardings[name], cut)
    return leaves


def nested(tree: TreeFile, leaves: Mapping[str, Any], root: str | None) -> Any:
    """The part of the tree under `root`, all of whose arrays are in `leaves`."""
    if isinstance(tree, OrbaxTree):
        filled = {name: leaves.get(name, tree.others.get(name)) for name in tree.names}
        whole = tree.nest(filled, boxed=False)
    else:
        whole = {}
        for name, leaf in leaves.items():
            *above, last = name.split("/")
            here = whole
            for key in above:
                here = here.setdefault(key, {})
            here[last] = leaf
    for key in root.split("/") if root else ():
        whole = whole[int(key)] if isinstance(whole, list) else whole[key]
    return whole


def write_tree(folder: Path, like: TreeFile, leaves: Iterable[tuple[str, Leaf]]) -> None:
    """Write a tree as `like` is, from its leaves in order, into `folder`; as Orbax, in `tree/`.

    A file is written as its leaves come; an Orbax tree at the end, by all processes.
    """
    if isinstance(like, OrbaxTree):
        whole = like.nest({**like.others, **dict(leaves)}, boxed=True)
        save_orbax(folder, whole, *([like.part] if like.part else []))
    elif isinstance(like, NpzTree):
        write_npz(folder / NPZ_NAME, _on_host(leaves))
    else:
        write_msgpack(like, folder / MSGPACK_NAME, _on_host(leaves))


def leaf_sharding(spec: TensorSpec, mesh: Mesh | None, stacked: int | None) -> Sharding | None:
    """Over all devices of the mesh, by the longest dimension that divides, layers aside.

    A leaf without one is on every device. None, for arrays that stay on the host, without a mesh
    and for 64-bit types, which JAX has only where asked.
    """
    if mesh is None or spec.dtype.itemsize > 4:
        return None
    return spread_over_all(spec.shape, mesh, stacked=stacked)


def _on_host(leaves: Iterable[tuple[str, Leaf]]) -> Iterator[tuple[str, np.ndarray]]:
    return ((name, np.asarray(leaf)) for name, leaf in leaves)
