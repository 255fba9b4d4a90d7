"""Verify that a folder still holds the bytes written, and that a model's files match each other."""

import os
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from recall_jax.checkpoint.companions import (
    CONFIG_NAME,
    GENERATION_NAME,
    has_tokenizer,
    is_tokenizer_file,
)
from recall_jax.checkpoint.flax_msgpack import MSGPACK_NAME, MsgpackTree
from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.folder_files import WEIGHTS
from recall_jax.checkpoint.lora import read_adapter
from recall_jax.checkpoint.lora_config import ADAPTER_CONFIG
from recall_jax.checkpoint.npz import NPZ_NAME, NpzTree
from recall_jax.checkpoint.orbax import TREE_NAME, OrbaxTree, find_orbax
from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.checkpoint.tensors import TensorSpec, shapes_of
from recall_jax.checkpoint.writer import CHECKSUMS_NAME
from recall_jax.engine.device import all_finite
from recall_jax.engine.pod.part import PART_NAME, read_part
from recall_jax.errors import InputError, shown, some
from recall_jax.files.checksums import FileChecksum, checksum_fault, file_checksum
from recall_jax.files.json_objects import read_json_object
from recall_jax.files.progress import Progress, silent
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import check_tensors
from recall_jax.models.shapes import check_sizes

Kind = Literal["model", "adapter", "orbax", "npz", "msgpack", "part"]

# Suffixes of files that transformers, peft or vLLM load if they are in the folder, in addition to
# those of a tokenizer; and suffixes of files that only people read.
_LOADED = (".safetensors", ".bin", ".index.json", ADAPTER_CONFIG, GENERATION_NAME)
_PAGES = (".md", ".html", "license", "license.txt", "notice", "notice.txt")


@dataclass(frozen=True)
class Verification:
    """Hold the results of a verification; faults and notes are one line each."""

    folder: str
    kind: Kind
    files: int  # number of files compared with their checksums
    nbytes: int  # bytes of these files, as recorded
    faults: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass
class _Findings:
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def verify(
    folder: Path, progress: Progress = silent, *, ignore_config: Collection[str] = ()
) -> Verification:
    """Compare `folder` with its checksums.json, if it has one, and check that its files match.

    For a model, checks headers, index, config, and for a known family the tensors against the
    config; for an adapter its config and header; for a tree the config. An edited page, such as
    README.md, is a note and not a fault. Attributes of a model's config in `ignore_config` may be
    unknown. Raises InputError if there is no such folder, or nothing in it to verify.
    """
    if not os.path.isdir(folder):
        why = "is a file: name the folder it is in" if os.path.exists(folder) else "does not exist"
        raise InputError(f"{folder} {why}")
    names = os.listdir(folder)
    known = (CHECKSUMS_NAME, CONFIG_NAME, PART_NAME)
    if not any(name in known or name.endswith(_LOADED) for name in names):
        raise InputError(
            f"{folder} has no {CHECKSUMS_NAME}, {CONFIG_NAME} or weights: nothing to verify"
        )
    findings = _Findings()
    checksums: dict[str, FileChecksum] = {}
    checksums_name = PART_NAME if PART_NAME in names else CHECKSUMS_NAME
    if checksums_name not in names:
        findings.notes.append(f"no {CHECKSUMS_NAME}: the bytes were not checked")
    elif checksums := _read_checksums(folder / checksums_name, findings):
        _check_bytes(folder, checksums, findings, progress)
        _check_others(folder, checksums, findings)
    kind = _kind(folder, names)
    try:
        checks = _CHECKS | {"model": partial(_check_model, ignore_config=ignore_config)}
        checks[kind](folder, findings, progress)
    except InputError as error:
        if isinstance(error.__cause__, ImportError):  # a missing package is no fault of the folder
            raise
        findings.faults.append(str(error))
    nbytes = sum(checksum["bytes"] for checksum in checksums.values())
    faults, notes = tuple(findings.faults), tuple(findings.notes)
    return Verification(str(folder), kind, len(checksums), nbytes, faults, notes)


# ------------------------------------------------------------------------------------- checksums


def _read_checksums(path: Path, findings: _Findings) -> dict[str, FileChecksum]:
    """Return the valid entries by file name, and record a fault for each of the others."""
    try:
        content = read_json_object(path)
    except InputError as error:
        findings.faults.append(str(error))
        return {}
    files = content.get("files")
    if (content.get("format"), content.get("algorithm")) != (1, "crc32"):
        findings.faults.append(
            f"{path} is not of format 1 with algorithm crc32, the only one known"
        )
        return {}
    if not isinstance(files, dict) or not files:
        findings.faults.append(f"{path} has no files")
        return {}
    wrong = {name: why for name, entry in files.items() if (why := checksum_fault(name, entry))}
    findings.faults += [f"{path}: {shown(name)} {why}" for name, why in wrong.items()]
    return {name: entry for name, entry in files.items() if name not in wrong}


def _check_bytes(
    folder: Path, checksums: Mapping[str, FileChecksum], findings: _Findings, progress: Progress
) -> None:
    """Compare every file with its checksum, in two threads: computing one releases the lock."""
    progress("checksums", 0, len(checksums))
    pool = ThreadPoolExecutor(2)
    try:
        faults = pool.map(lambda name: _file_fault(folder, name, checksums[name]), checksums)
        for done, (name, fault) in enumerate(zip(checksums, faults, strict=True), start=1):
            lines = findings.notes if name.lower().endswith(_PAGES) else findings.faults
            lines += [fault] if fault else []
            progress("checksums", done, len(checksums))
    finally:
        pool.shutdown(wait=False, cancel_futures=True)  # an interrupt does not wait


def _file_fault(folder: Path, name: str, expected: FileChecksum) -> str | None:
    path = folder / name
    if not os.path.isfile(path):
        return f"{shown(name)} is missing"
    if (size := os.path.getsize(path)) != expected["bytes"]:
        return f"{shown(name)} has {size} bytes, not the {expected['bytes']} that were written"
    try:
        crc = file_checksum(path)["crc32"]
    except InputError as error:
        return str(error)
    if crc != expected["crc32"]:
        return f"{shown(name)} does not hold the bytes that were written: its crc32 is {crc}"
    return None


def _check_others(folder: Path, checksums: Collection[str], findings: _Findings) -> None:
    """Record files without a checksum: a fault if they would be loaded, otherwise a note."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    names = sorted({path.as_posix() for path in paths} - {*checksums, CHECKSUMS_NAME, PART_NAME})
    loaded = [
        name
        for name in names
        if name.startswith(f"{TREE_NAME}/")
        or name in (NPZ_NAME, MSGPACK_NAME)
        or ("/" not in name and name.endswith(_LOADED))
        or is_tokenizer_file(name)
    ]
    findings.faults += [
        f"{shown(name)} has no checksum, and changes what is loaded" for name in loaded
    ]
    if others := [name for name in names if name not in loaded]:
        more = f", … ({len(others)} in all)" if len(others) > 3 else ""
        findings.notes.append(f"no checksum: {', '.join(map(repr, others[:3]))}{more}")


# ------------------------------------------------------------------------------------- structure


def _kind(folder: Path, names: Collection[str]) -> Kind:
    """Return the kind of folder; without a model's weights, it depends on the other files."""
    if PART_NAME in names:
        return "part"
    if any(name in names for name in WEIGHTS):
        return "model"
    if ADAPTER_CONFIG in names:
        return "adapter"
    if (folder / TREE_NAME).is_dir():
        return "orbax"
    return "npz" if NPZ_NAME in names else "msgpack" if MSGPACK_NAME in names else "model"


def _check_model(
    folder: Path, findings: _Findings, progress: Progress, ignore_config: Collection[str]
) -> None:
    model = Checkpoint(str(folder), folder, headers_only=True)
    findings.notes += model.notes
    _note_tokenizer(folder, findings)
    findings.faults += model.faults
    if model.quantised is not None:
        findings.notes.append(
            f"quantised ({model.quantised}): not to be merged or run here, and its tensors were "
            "not held against the config"
        )
        return
    _check_finite(model.specs, model.read, findings, progress)
    shapes = shapes_of(model.specs)
    check_sizes(model.config, shapes, CONFIG_NAME)
    try:
        arch = read_architecture(model.config, ignore=ignore_config, where=CONFIG_NAME)
    except InputError as error:
        findings.notes.append(f"the tensors were not held against the config: {error}")
        return
    check_tensors(arch, shapes, str(folder))


def _check_adapter(folder: Path, findings: _Findings, progress: Progress) -> None:
    file = read_adapter(folder).file
    _check_finite(file.specs, file.read, findings, progress)
    findings.notes.append("an adapter: its tensors were not held against a base")


def _check_orbax(folder: Path, findings: _Findings, progress: Progress) -> None:
    _check_config(folder, findings)
    if not findings.faults and (found := find_orbax(folder)) is not None:
        tree = OrbaxTree(str(folder), *found)
        _check_finite(tree.specs, lambda name: tree.read([name], {})[name], findings, progress)
    findings.notes.append("an Orbax tree: its structure was not checked")


def _check_npz(folder: Path, findings: _Findings, progress: Progress) -> None:
    _check_config(folder, findings)
    tree = NpzTree(str(folder), folder / NPZ_NAME)
    _check_finite(tree.specs, tree.read, findings, progress)


def _check_msgpack(folder: Path, findings: _Findings, progress: Progress) -> None:
    _check_config(folder, findings)
    tree = MsgpackTree(str(folder), folder / MSGPACK_NAME)
    _check_finite(tree.specs, tree.read, findings, progress)


def _check_config(folder: Path, findings: _Findings) -> None:
    """Check the config of a tree; one that was converted from a model has a config."""
    if (folder / CONFIG_NAME).is_file():
        read_json_object(folder / CONFIG_NAME)
        _note_tokenizer(folder, findings)
    else:
        findings.notes.append(f"a tree without {CONFIG_NAME}: for the code that it comes from")


def _check_part(folder: Path, findings: _Findings, progress: Progress) -> None:
    part = read_part(folder)
    for path in sorted(folder.glob("*.safetensors")):
        file = SafetensorsFile(path)
        _check_finite(file.specs, file.read, findings, progress)
    findings.notes.append(f"part {part.index} of {part.count} of a model: recall gather joins them")


def _check_finite(
    specs: Mapping[str, TensorSpec],
    read: Callable[[str], Any],
    findings: _Findings,
    progress: Progress,
) -> None:
    """Record a fault if tensors hold NaN or infinity; a single number may be infinite."""
    found = []
    for done, (name, spec) in enumerate(specs.items()):
        progress("tensors", done, len(specs))
        if not jnp.issubdtype(spec.dtype, jnp.inexact):
            continue
        array = np.asarray(read(name))
        if not (all_finite(array) if array.size > 1 else not np.isnan(array).any()):
            found.append(name)
    if found:
        findings.faults.append(f"NaN or infinite values in {some(found, 3)}")


def _note_tokenizer(folder: Path, findings: _Findings) -> None:
    if not has_tokenizer(folder):
        findings.notes.append("no tokenizer")


_CHECKS = {
    "adapter": _check_adapter,
    "orbax": _check_orbax,
    "npz": _check_npz,
    "msgpack": _check_msgpack,
    "part": _check_part,
}
