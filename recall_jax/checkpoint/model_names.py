"""Resolve a model name given by the user into the folders of a base and its adapters."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from recall_jax.checkpoint.folder_files import WEIGHTS, refuse_gguf
from recall_jax.checkpoint.hub import is_repository_id, snapshot
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG, base_of
from recall_jax.errors import InputError, shown


class ModelPart(NamedTuple):
    """Hold the folder of a base or an adapter, and its absolute path or hub id."""

    name: str
    folder: Path


def find_parts(spec: str) -> list[ModelPart]:
    """Resolve `folder` or `folder+adapter[+adapter…]`, each a path or a hub id, into its parts.

    A hub id is `org/name` or `org/name@revision`. A folder that exists under the full name is taken
    as such, even if the name contains '+'. An adapter in the place of the base is folded into the
    base that its config names. Raises InputError if a part does not exist.
    """
    base, *adapters = map(_locate, _split(spec))
    return [*_on_its_base(base, ()), *adapters]


def find_adapter(spec: str) -> Path | None:
    """Return the folder of an adapter named without a base, or None for any other model."""
    parts = _split(spec)
    folder = _locate(parts[0]).folder
    return folder if len(parts) == 1 and is_adapter(folder) else None


def is_adapter(folder: Path) -> bool:
    """Return whether a folder holds an adapter and no model weights."""
    has_weights = any((folder / name).is_file() for name in WEIGHTS)
    return (folder / ADAPTER_CONFIG).is_file() and not has_weights


def _on_its_base(part: ModelPart, above: Collection[Path]) -> list[ModelPart]:
    """Return the part; for an adapter, the parts it was trained on come first."""
    if not is_adapter(part.folder):
        return [part]
    advice = f"write BASE+{part.folder} to fold it in"
    base, revision = base_of(part.folder / ADAPTER_CONFIG)
    if base is None:
        raise InputError(f"{part.folder} is an adapter: {advice}")
    if revision is not None and is_repository_id(base):
        base = f"{base}@{revision}"
    if part.folder.resolve() in above:
        raise InputError(f"{part.folder} is an adapter of itself by {ADAPTER_CONFIG}: {advice}")
    try:
        first, *rest = map(_locate, _split(base))
    except InputError as error:
        raise InputError(
            f"{part.folder} is an adapter of {shown(base)}, which is not found: {advice}"
        ) from error
    return [*_on_its_base(first, {*above, part.folder.resolve()}), *rest, part]


def _split(spec: str) -> list[str]:
    """Split into base and adapters; the base is the longest prefix that is a folder."""
    parts = spec.split("+")
    beginnings = ((end, "+".join(parts[:end])) for end in range(len(parts), 1, -1))
    end, base = next((found for found in beginnings if os.path.isdir(found[1])), (1, parts[0]))
    return [base, *(_split("+".join(parts[end:])) if parts[end:] else [])]


def _locate(part: str) -> ModelPart:
    if not part:
        raise InputError("a model or adapter without a name: write base or base+adapter")
    if os.path.isdir(part):
        return ModelPart(str(Path(part).resolve()), Path(part))
    if os.path.exists(part):
        refuse_gguf(Path(part))
        raise InputError(f"{part} is a file: name the folder it is in")
    if is_repository_id(part):
        return ModelPart(part, snapshot(part))
    raise InputError(
        f"no model folder {shown(part)}: give a folder, folder+adapter, or hub id org/name"
    )
