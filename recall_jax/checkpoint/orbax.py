"""Flax trees on disk, in Orbax's format: `FOLDER/tree/`, config and tokenizer beside it.

The caller owns the folder and what else stands in it.
"""

import logging
import os
import re
from pathlib import Path
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from recall_jax.errors import InputError, StorageError

TREE_NAME = "tree"


def is_orbax(folder: Path) -> bool:
    """Whether `folder` holds a tree as `save_orbax` writes it."""
    # ocp.is_orbax_checkpoint says yes to an empty folder
    return os.path.isfile(folder / TREE_NAME / "_CHECKPOINT_METADATA")


def save_orbax(folder: Path, tree: Any) -> None:
    """Write a tree of numpy or jax arrays under `folder`, every dtype bit for bit.

    InputError if an array has no elements: Orbax cannot store it. StorageError if the disk fails.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if leaf.size == 0:
            raise InputError(f"{jax.tree_util.keystr(path)} is empty: Orbax cannot store it")
    log = logging.getLogger("absl")  # where Orbax's threads print the tracebacks of what is raised
    was_disabled, log.disabled = log.disabled, True
    try:
        ocp.save(folder.absolute() / TREE_NAME, tree)
    except ValueError as error:  # TensorStore's, whatever the system said
        if (code := re.search(r"os_error_code='(\d+)'", str(error))) is None:
            raise
        reason = os.strerror(int(code.group(1)))
        raise StorageError(f"cannot write {folder}: {reason}") from error
    finally:
        log.disabled = was_disabled


def load_orbax(folder: Path) -> Any:
    """The tree under `folder`, whatever devices it was saved from, as numpy arrays.

    Dicts stay dicts; lists and tuples become lists. InputError if there is no tree, or a damaged
    one.
    """
    path = folder.absolute() / TREE_NAME
    if not is_orbax(folder):
        raise InputError(f"{folder} is no Orbax folder: it lacks a tree in {TREE_NAME}/")
    try:
        # asked for as numpy arrays, it comes without the sharding it was saved with
        metadata = ocp.metadata(path).metadata
        return ocp.load(path, jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), metadata))
    except Exception as error:  # Orbax and TensorStore raise what they like on damaged files
        raise InputError(f"{path} is damaged ({type(error).__name__}): save it again") from error
