"""Plan the files of each unit of a model that many processes write, and check them on disk."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import Mark, Shard, chained_crc, numbered, read_back, split
from recall_jax.errors import InputError
from recall_jax.files.checksums import FileChecksum
from recall_jax.parallel.processes import Processes

_VISIBILITY_TIMEOUT = 30.0  # seconds until a network file system shows another machine's files


@dataclass(frozen=True)
class UnitFiles:
    """Hold the process that writes a unit, the order of its tensors, and its planned files."""

    owner: int
    before: int  # number of tensors in the units before
    order: Sequence[tuple[str, str]]  # its tensors with their files
    shards: Mapping[str, Shard]

    @property
    def nbytes(self) -> int:
        """Return the size of its files in bytes."""
        return sum(shard.size for shard in self.shards.values())


def plan_unit_files(
    specs: Mapping[str, TensorSpec],
    units: Mapping[str, Sequence[str]],
    owners: int,
    shard_bytes: int,
) -> list[UnitFiles]:
    """Return the files of each unit, numbered consecutively; process u mod n writes unit u.

    `owners` is the number n of processes; a file has at most `shard_bytes`, or one larger tensor.
    """
    split_units = [
        split({name: specs[name] for name in each}, shard_bytes) for each in units.values()
    ]
    files = iter(numbered([shard for shards in split_units for shard in shards]).items())
    planned: list[UnitFiles] = []
    before = 0
    for number, shards in enumerate(split_units):
        named = dict(next(files) for _ in shards)
        order = [(name, file) for file, shard in named.items() for name in shard.ends]
        planned.append(UnitFiles(number % owners, before, order, named))
        before += len(order)
    return planned


def unit_mark(unit: UnitFiles, files: Mapping[str, FileChecksum]) -> Mark:
    """Return the mark of a finished unit, whose `crc32` covers the files of this unit only."""
    *earlier, last = unit.shards
    crc = chained_crc(int(files[last]["crc32"], 16), {name: files[name] for name in earlier})
    return Mark(unit.before + len(unit.order), last, files[last]["bytes"], crc)


def read_back_unit(folder: Path, unit: UnitFiles, mark: Mark) -> Mapping[str, FileChecksum] | None:
    """Return the checksums of a unit's files, or None if they do not match the mark."""
    last, size = unit.order[-1][1], unit.shards[unit.order[-1][1]].size
    inside = mark._replace(tensors=mark.tensors - unit.before)
    if inside[:3] != (len(unit.order), last, size):
        return None
    paths = {folder / name: shard.size for name, shard in unit.shards.items()}
    if not all(path.is_file() and path.stat().st_size == paths[path] for path in paths):
        return None
    return next(iter(read_back(folder, unit.shards, unit.order, [inside])), None)


def wait_until_visible(
    folder: Path, unit: UnitFiles, files: Mapping[str, FileChecksum], processes: Processes
) -> None:
    """Wait until this process sees the files of a unit that another process has written.

    Raises InputError if it does not see them within the time that a network file system may take.
    """
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT
    for name, checksum in files.items():
        path = folder / name
        while not path.is_file() or path.stat().st_size != checksum["bytes"]:
            processes.check()
            if time.monotonic() > deadline:
                raise InputError(
                    f"process 0 does not see {path}, which process {unit.owner} has written: "
                    "write into a folder that all share, or with --parts into one on each "
                    "machine"
                )
            time.sleep(0.05)
