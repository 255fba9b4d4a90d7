"""Read and write trees in Orbax's format: ours in `FOLDER/tree/`, and those of other programs.

The caller is responsible for the folder and the other files in it.
"""

import logging
import math
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding
from orbax.checkpoint import v1 as ocp

from recall_jax.checkpoint.names import check_leaves
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import InputError, StorageError

TREE_NAME = "tree"
_STATE = "state"  # Orbax's name for a single tree
_TREE_FILE = "_METADATA"  # in every folder that holds a tree
# Flax NNX wraps a leaf in a box, which Orbax stores under this key.
_BOX = "value"


def is_orbax(folder: Path) -> bool:
    """Return whether `folder` holds a tree written by `save_orbax`."""
    # ocp.is_orbax_checkpoint says yes to an empty folder
    return os.path.isfile(folder / TREE_NAME / "_CHECKPOINT_METADATA")


def save_orbax(folder: Path, tree: Any, part: str = _STATE) -> None:
    """Write a tree of numpy or jax arrays under `folder`, every dtype bit for bit.

    `part` names the tree within the checkpoint. Every process must call this. Raises InputError if
    an array has no elements, which Orbax cannot store; StorageError if the disk fails.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.size(leaf) == 0:
            raise InputError(f"{jax.tree_util.keystr(path)} is empty: Orbax cannot store it")
    try:
        with _quiet():
            ocp.save_checkpointables(folder.absolute() / TREE_NAME, {part: tree})
    except ValueError as error:  # TensorStore raises it for any OSError
        if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        reason = os.strerror(int(code.group(1)))
        raise StorageError(f"cannot write {folder}: {reason}") from error


def load_orbax(folder: Path) -> Any:
    """Load the tree under `folder` as numpy arrays, whatever devices it was saved from.

    Dicts stay dicts; lists and tuples become lists. Raises InputError if the tree is missing or
    damaged.
    """
    path = folder.absolute() / TREE_NAME
    if not is_orbax(folder):
        raise InputError(f"{folder} is no Orbax folder: it lacks a tree in {TREE_NAME}/")
    with _damage(path):
        # loading as numpy arrays ignores the saved sharding
        metadata = ocp.metadata(path).metadata
        _check_names(metadata, path)
        return ocp.load(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata))


def find_orbax(folder: Path) -> tuple[Path, str] | None:
    """Return the checkpoint at `folder` and the name of its tree, "" for a single one; else None.

    `folder` may be the checkpoint, one of its trees, or a folder that holds it as `tree`. Raises
    InputError if it holds several trees or steps, one of which must be named.
    """
    if is_orbax(folder):
        return find_orbax(folder / TREE_NAME)
    if os.path.isfile(folder / _TREE_FILE):
        # one of several trees in a checkpoint has no metadata file
        inside = not os.path.isfile(folder / "_CHECKPOINT_METADATA")
        return (folder.parent, folder.name) if inside else (folder, "")
    if not os.path.isdir(folder):
        return None
    names = sorted(os.listdir(folder))
    trees = [name for name in names if os.path.isfile(folder / name / _TREE_FILE)]
    if len(trees) > 1:
        raise InputError(f"{folder} holds the trees {', '.join(trees)}: name {folder / trees[0]}")
    if trees:
        return folder, trees[0]
    if steps := [name for name in names if os.path.isfile(folder / name / "_CHECKPOINT_METADATA")]:
        raise InputError(f"{folder} holds the steps {', '.join(steps)}: name {folder / steps[-1]}")
    return None


class OrbaxTree:
    """Read a checkpoint's leaves by path, a few at a time; NNX's boxes are not part of a path.

    `others` holds the leaves that are not arrays. Lists and tuples are lists.
    """

    def __init__(self, name: str, path: Path, part: str) -> None:
        """Read the metadata; `path` and `part` are as `find_orbax` gives them."""
        self.name, self.path, self.part = name, path.absolute(), part
        self.bytes_read = 0
        self._selection = {"checkpointable_name": part} if part else {}
        with _damage(self.path):
            metadata = ocp.metadata(self.path, **self._selection).metadata
        if metadata is None:  # Orbax's way to report metadata it cannot read
            raise InputError(f"{path} is damaged (its metadata cannot be read): save it again")
        leaves, self._structure = jax.tree.flatten(metadata)
        _check_names(metadata, path)
        self.names = _names(_unboxed(metadata))
        self._abstract = dict(zip(self.names, leaves, strict=True))
        self.specs = {
            name: TensorSpec(np.dtype(leaf.dtype), tuple(leaf.shape))
            for name, leaf in self._abstract.items()
            if hasattr(leaf, "shape")
        }
        if not self.specs:
            raise InputError(f"{path} holds no arrays: name a checkpoint of parameters")
        plain = [name for name in self.names if name not in self.specs]
        self.others = self._load({name: self._abstract[name] for name in plain}) if plain else {}

    def read(
        self, names: Collection[str], shardings: Mapping[str, Sharding]
    ) -> dict[str, np.ndarray | jax.Array]:
        """Read leaves as jax arrays if they have a sharding, else as numpy arrays.

        Each process reads only its local shards of a sharded leaf. Every process must call this.
        """
        specs = {name: self.specs[name] for name in names}
        self.bytes_read += sum(_local_bytes(spec, shardings.get(n)) for n, spec in specs.items())
        return self._load(
            {
                name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
                if name in shardings
                else np.empty(spec.shape, spec.dtype)
                for name, spec in specs.items()
            }
        )

    def nest(self, leaves: Mapping[str, Any], *, boxed: bool) -> Any:
        """Put leaves into the containers of the checkpoint, with or without NNX's boxes."""
        tree = jax.tree.unflatten(self._structure, [leaves[name] for name in self.names])
        return tree if boxed else _unboxed(tree)

    def _load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        abstract = [wanted.get(name, ocp.PLACEHOLDER) for name in self.names]
        with _damage(self.path):
            tree = jax.tree.unflatten(self._structure, abstract)
            loaded = jax.tree.leaves(ocp.load(self.path, tree, **self._selection))
        found = dict(zip(self.names, loaded, strict=True))
        return {name: found[name] for name in wanted}


def _names(tree: Any) -> list[str]:
    """Return the paths of the leaves, in order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _check_names(metadata: Any, path: Path) -> None:
    """Refuse names that lead elsewhere: Orbax turns them into file paths."""
    check_leaves(_names(metadata), path)


def _local_bytes(spec: TensorSpec, sharding: Sharding | None) -> int:
    """Return the bytes that this process reads of a leaf: each distinct local shard once."""
    if sharding is None:
        return spec.nbytes
    parts = set(map(str, sharding.addressable_devices_indices_map(spec.shape).values()))
    return len(parts) * math.prod(sharding.shard_shape(spec.shape)) * spec.dtype.itemsize


def _unboxed(tree: Any) -> Any:
    if isinstance(tree, dict):
        if tree.keys() == {_BOX} and not isinstance(tree[_BOX], dict | list):
            return tree[_BOX]
        return {key: _unboxed(below) for key, below in tree.items()}
    return [_unboxed(below) for below in tree] if isinstance(tree, list) else tree


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    try:
        with _quiet():
            yield
    except InputError:
        raise
    except Exception as error:  # Orbax and TensorStore raise any exception for damaged files
        raise InputError(f"{path} is damaged ({type(error).__name__}): save it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("absl")  # where Orbax's threads print tracebacks
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled
