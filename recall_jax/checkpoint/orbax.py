"""Trees on disk in Orbax's format: ours in `FOLDER/tree/`, and those of anyone else.

The caller owns the folder and what else stands in it.
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
_STATE = "state"  # Orbax's name for the only tree of a checkpoint
_TREE_FILE = "_METADATA"  # in every folder that holds a tree
# Where Flax's NNX boxes a leaf, Orbax keeps it under this key.
_BOX = "value"


def is_orbax(folder: Path) -> bool:
    """Whether `folder` holds a tree as `save_orbax` writes it."""
    # ocp.is_orbax_checkpoint says yes to an empty folder
    return os.path.isfile(folder / TREE_NAME / "_CHECKPOINT_METADATA")


def save_orbax(folder: Path, tree: Any, part: str = _STATE) -> None:
    """Write a tree of numpy or jax arrays under `folder`, every dtype bit for bit.

    `part` names the tree inside of the checkpoint. All processes must call this. InputError if an
    array has no elements: Orbax cannot store it. StorageError if the disk fails.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if np.size(leaf) == 0:
            raise InputError(f"{jax.tree_util.keystr(path)} is empty: Orbax cannot store it")
    try:
        with _quiet():
            ocp.save_checkpointables(folder.absolute() / TREE_NAME, {part: tree})
    except ValueError as error:  # TensorStore's, whatever the system said
        if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        reason = os.strerror(int(code.group(1)))
        raise StorageError(f"cannot write {folder}: {reason}") from error


def load_orbax(folder: Path) -> Any:
    """The tree under `folder`, whatever devices it was saved from, as numpy arrays.

    Dicts stay dicts; lists and tuples become lists. InputError if there is no tree, or a damaged
    one.
    """
    path = folder.absolute() / TREE_NAME
    if not is_orbax(folder):
        raise InputError(f"{folder} is no Orbax folder: it lacks a tree in {TREE_NAME}/")
    with _damage(path):
        # asked for as numpy arrays, it comes without the sharding it was saved with
        metadata = ocp.metadata(path).metadata
        _check_names(metadata, path)
        return ocp.load(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata))


def find_orbax(folder: Path) -> tuple[Path, str] | None:
    """The checkpoint at `folder` and the name of its tree ("" where it is all there is), if any.

    `folder` is the checkpoint, one of the trees in it, or holds it as `tree`. InputError where it
    holds several, trees or steps, of which one is to be named.
    """
    if is_orbax(folder):
        return find_orbax(folder / TREE_NAME)
    if os.path.isfile(folder / _TREE_FILE):
        # a tree of a checkpoint of several has no metadata of its own
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
    """A checkpoint's leaves by path, read a few at a time; a box of NNX's is no part of a path.

    `others` are leaves that are no arrays, as they are. Lists and tuples are lists.
    """

    def __init__(self, name: str, path: Path, part: str) -> None:
        """Read what leaves there are; `path` and `part` as `find_orbax` gives them."""
        self.name, self.path, self.part = name, path.absolute(), part
        self.bytes_read = 0
        self._asked = {"checkpointable_name": part} if part else {}
        with _damage(self.path):
            metadata = ocp.metadata(self.path, **self._asked).metadata
        if metadata is None:  # which is how Orbax says that it cannot read what is there
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
        """These leaves, as jax arrays where they have a sharding, else as numpy arrays.

        Of a sharded leaf each process reads what its devices hold. All processes must call this.
        """
        specs = {name: self.specs[name] for name in names}
        self.bytes_read += sum(_own_bytes(spec, shardings.get(n)) for n, spec in specs.items())
        return self._load(
            {
                name: jax.ShapeDtypeStruct(spec.shape, spec.dtype, sharding=shardings[name])
                if name in shardings
                else np.empty(spec.shape, spec.dtype)
                for name, spec in specs.items()
            }
        )

    def nest(self, leaves: Mapping[str, Any], *, boxed: bool) -> Any:
        """The containers of the checkpoint, with these leaves; without NNX's boxes if asked."""
        tree = jax.tree.unflatten(self._structure, [leaves[name] for name in self.names])
        return tree if boxed else _unboxed(tree)

    def _load(self, wanted: Mapping[str, Any]) -> dict[str, Any]:
        abstract = [wanted.get(name, ocp.PLACEHOLDER) for name in self.names]
        with _damage(self.path):
            tree = jax.tree.unflatten(self._structure, abstract)
            loaded = jax.tree.leaves(ocp.load(self.path, tree, **self._asked))
        found = dict(zip(self.names, loaded, strict=True))
        return {name: found[name] for name in wanted}


def _names(tree: Any) -> list[str]:
    """The paths of the leaves, in their order."""
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]


def _check_names(metadata: Any, path: Path) -> None:
    """Refuse names that lead elsewhere: Orbax makes paths of files of them."""
    check_leaves(_names(metadata), path)


def _own_bytes(spec: TensorSpec, sharding: Sharding | None) -> int:
    """What this process reads of a leaf: the parts that its devices hold, each once."""
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
    except Exception as error:  # Orbax and TensorStore raise what they like on damaged files
        raise InputError(f"{path} is damaged ({type(error).__name__}): save it again") from error


@contextmanager
def _quiet() -> Iterator[None]:
    log = logging.getLogger("absl")  # where Orbax's threads print the tracebacks of what is raised
    was_disabled, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = was_disabled
