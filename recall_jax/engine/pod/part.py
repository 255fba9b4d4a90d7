"""Read and write a part of a model: what one of many processes has written to a separate disk.

The folder of a part holds complete files of the model, that of process 0 also the files besides the
weights, and `part.json`, which lists them and names the run.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from recall_jax.checkpoint.names import check_name
from recall_jax.checkpoint.writer import checksums_of
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.errors import InputError, shown, storage_faults
from recall_jax.files.checksums import FileChecksum, checksum_fault
from recall_jax.files.json_objects import read_json_object, write_json_object
from recall_jax.files.publish import sync_tree
from recall_jax.parallel.processes import Processes

PART_NAME = "part.json"
_MOST_BYTES = 1 << 63


@dataclass(frozen=True)
class ProcessPart:
    """Hold part `index` of `count` of one run; `total_size` is in bytes of the model's tensors."""

    folder: Path
    run: str
    index: int
    count: int
    total_size: int
    weight_map: Mapping[str, str]
    files: Mapping[str, FileChecksum]


def write_part(folder: Path, processes: Processes, writer: UnitWriter) -> None:
    """Write `part.json` for all files under `folder`, with the checksums that `writer` knows.

    All processes must call it, after everything else is written; it is on disk when this returns.
    """
    run = processes.broadcast("run", lambda: secrets.token_hex(8))
    with storage_faults(f"write {folder / PART_NAME}"):  # from an interrupted run
        (folder / PART_NAME).unlink(missing_ok=True)
    content = {
        "format": 1,
        "algorithm": "crc32",
        "run": run,
        "process": processes.index,
        "processes": processes.count,
        "total_size": writer.total_size,
        "weight_map": writer.weight_map,
        "files": checksums_of(folder, writer.checksums),
    }
    with storage_faults(f"write {folder / PART_NAME}"):
        write_json_object(folder / PART_NAME, content, indent=2)
        sync_tree(folder)


def read_part(folder: Path) -> ProcessPart:
    """Return the content of a part's `part.json`; raises InputError if it is missing or invalid."""
    path = folder / PART_NAME
    if not path.is_file():
        raise InputError(f"{folder} has no {PART_NAME}: it is not a part of a model")
    content = read_json_object(path)
    if (content.get("format"), content.get("algorithm")) != (1, "crc32"):
        raise InputError(f"{path} is not of format 1 with algorithm crc32, the only one known")
    kinds = {
        "run": str,
        "process": int,
        "processes": int,
        "total_size": int,
        "weight_map": dict,
        "files": dict,
    }
    for key, kind in kinds.items():
        if type(content.get(key)) is not kind:
            raise InputError(f"{path} has no {key}, or none that can be used")
    files, weight_map = content["files"], content["weight_map"]
    for name, entry in files.items():
        if why := checksum_fault(name, entry):
            raise InputError(f"{path}: {shown(name)} {why}")
    for tensor, name in weight_map.items():
        check_name(tensor, path)
        if not isinstance(name, str) or name not in files:
            raise InputError(f"{path}: tensor {shown(tensor)} is in none of its files")
    if not 0 <= content["process"] < content["processes"]:
        raise InputError(
            f"{path}: there is no part {shown(content['process'])} of {shown(content['processes'])}"
        )
    if not 0 <= content["total_size"] <= _MOST_BYTES:
        raise InputError(f"{path}: its model has {shown(content['total_size'])} bytes")
    keys = ("run", "process", "processes", "total_size", "weight_map", "files")
    return ProcessPart(folder, *(content[key] for key in keys))
