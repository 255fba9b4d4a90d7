"""Write weights as Hugging Face does: safetensors shards of limited size, and their index.

The plan is fixed by the specs before the first byte; the tensors then stream through in that
order, each written once. The folder is the caller's: `recall_jax.output` makes it appear whole.
"""

import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict

import numpy as np

from recall_jax.checkpoint.tensors import NAME_OF_DTYPE, TensorSpec
from recall_jax.errors import InputError

CHECKSUMS_NAME = "checksums.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
_ALIGNMENT = 64  # of the first tensor, so that jax can take a mapped array without a copy
_BLOCK = 1 << 24
_WRITEBACK = 1 << 26  # sent to the disk as it gathers, so that not all is left to the end


class FileChecksum(TypedDict):
    """Size and CRC-32 (8 hex digits) of one file."""

    bytes: int
    crc32: str


class ShardedWriter:
    """Context manager that streams tensors into safetensors shards in `folder`.

    InputError if a file cannot be written (disk full, no permission); a tensor out of order, left
    out, or unlike its spec is the caller's fault: ValueError.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Plan: tensors in the order of `specs`, a new shard where `shard_bytes` would be passed.

        A tensor larger than `shard_bytes` has a shard of its own.
        """
        self._folder = folder
        self._specs = specs
        self._shards = _plan(specs, shard_bytes)
        self._due = iter([(name, file) for file, names in self._shards.items() for name in names])
        self._file: _ChecksummedFile | None = None
        self._checksums: dict[str, FileChecksum] = {}
        self._bytes_written = 0

    @property
    def checksums(self) -> Mapping[str, FileChecksum]:
        """Of every file finished so far, by file name; of all after the block."""
        return self._checksums

    @property
    def bytes_written(self) -> int:
        """Bytes of the tensors written so far, headers not counted."""
        return self._bytes_written

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the tensor that is due; without a copy if `array` is C-contiguous."""
        due, file_name = next(self._due, (None, ""))
        if name != due:
            raise ValueError(f"tensor {name!r} written where {due!r} is due")
        spec = self._specs[name]
        if (array.dtype, array.shape) != (spec.dtype, spec.shape):
            raise ValueError(f"tensor {name!r} is {array.dtype} {array.shape}, planned as {spec}")
        if self._file is None or self._file.path.name != file_name:
            self._finish_file()
            self._file = _ChecksummedFile(self._folder / file_name)
            self._file.write(_header({key: self._specs[key] for key in self._shards[file_name]}))
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._bytes_written += spec.nbytes

    def __enter__(self) -> Self:
        """Nothing is created before the first tensor."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Finish the last shard and write the index, unless the block failed."""
        if kind is not None:
            if self._file is not None:
                self._file.close()
            return
        self._finish_file()
        missing, _ = next(self._due, (None, ""))
        if missing is not None:
            raise ValueError(f"tensor {missing!r} was never written")
        if len(self._shards) > 1:
            index = {
                "metadata": {"total_size": sum(spec.nbytes for spec in self._specs.values())},
                "weight_map": {
                    name: file for file, names in self._shards.items() for name in names
                },
            }
            self._file = _ChecksummedFile(self._folder / "model.safetensors.index.json")
            self._file.write((json.dumps(index, indent=2) + "\n").encode())
            self._finish_file()

    def _finish_file(self) -> None:
        if self._file is not None:
            self._checksums[self._file.path.name] = self._file.close()
            self._file = None


def write_checksums(folder: Path, known: Mapping[str, FileChecksum] | None = None) -> None:
    """Write `checksums.json` over every file under `folder`, by its path relative to it.

    `known` spares the reading of files whose checksum was taken while they were written.
    """
    known = known or {}
    files: dict[str, FileChecksum] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name != CHECKSUMS_NAME:
            files[name] = known.get(name) or file_checksum(path)
    content = {"format": 1, "algorithm": "crc32", "files": files}
    file = _ChecksummedFile(folder / CHECKSUMS_NAME)
    file.write((json.dumps(content, indent=2) + "\n").encode())
    file.close()


def file_checksum(path: Path) -> FileChecksum:
    """Checksum of one file; InputError if it cannot be read."""
    size = crc = 0
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                size, crc = size + len(block), zlib.crc32(block, crc)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    return {"bytes": size, "crc32": f"{crc:08x}"}


class _ChecksummedFile:
    """A new file, its size and checksum kept as the bytes pass."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._size = self._crc = self._unsynced = 0
        with _faults_of(path):
            self._file = path.open("wb", buffering=0)

    def write(self, data: bytes | memoryview) -> None:
        self._size += len(data)
        self._crc = zlib.crc32(data, self._crc)
        rest = memoryview(data)
        with _faults_of(self.path):
            while rest:  # the system takes at most 2 GiB at once
                rest = rest[self._file.write(rest) :]
            self._unsynced += len(data)
            if self._unsynced >= _WRITEBACK:
                os.fdatasync(self._file.fileno())
                self._unsynced = 0

    def close(self) -> FileChecksum:
        with _faults_of(self.path):
            self._file.close()
        return {"bytes": self._size, "crc32": f"{self._crc:08x}"}


@contextmanager
def _faults_of(path: Path) -> Iterator[None]:
    """The operating system's refusals as errors of the user's, about `path`."""
    try:
        yield
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from error


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, list[str]]:
    """Tensor names by shard file name, in order."""
    if not specs:
        raise ValueError("a checkpoint without tensors")
    shards: list[list[str]] = []
    filled = 0
    for name, spec in specs.items():
        if not shards or filled + spec.nbytes > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += spec.nbytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": names
        for number, names in enumerate(shards, start=1)
    }


def _header(specs: Mapping[str, TensorSpec]) -> bytes:
    """Length and JSON header of one file, padded with spaces to the alignment."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, spec in specs.items():
        end = position + spec.nbytes
        entries[name] = {
            "dtype": NAME_OF_DTYPE[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text
