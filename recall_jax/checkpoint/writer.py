"""Write weights as Hugging Face does: safetensors shards of limited size, and their index.

The specs fix the plan before the first byte; the tensors are then written in that order, each once,
at once or in pieces. Marks recorded on the way let another process continue after a kill. The
caller provides the folder; `recall_jax.files.output` makes it appear complete.
"""

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np

from recall_jax.checkpoint.dtypes import NAME_OF_DTYPE
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.errors import storage_faults
from recall_jax.files.checksums import (
    ChecksummedFile,
    FileChecksum,
    checksum_of,
    crc_between,
    file_checksum,
)
from recall_jax.files.json_objects import json_text

CHECKSUMS_NAME = "checksums.json"
DEFAULT_SHARD_BYTES = 5_000_000_000
INDEX_NAME = "model.safetensors.index.json"
_ALIGNMENT = 64  # of the first tensor in bytes, so that jax can use a mapped array without a copy


class Mark(NamedTuple):
    """Record how far the writing has come after a tensor, with a checksum of all bytes before.

    `crc32` (8 hex digits) runs over the current shard so far and then over the checksums, in hex
    digits, of the shards before it; in the first shard it is simply that of the file.
    """

    tensors: int  # finished so far
    file: str  # the current shard
    size: int  # its bytes so far
    crc32: str


@dataclass(frozen=True)
class Shard:
    """Hold the header and layout of one planned file."""

    header: bytes
    ends: Mapping[str, int]  # position in the file after each tensor, in order

    @property
    def size(self) -> int:
        """Return the size of the file in bytes."""
        return max(self.ends.values())


class ShardedWriter:
    """Stream tensors into safetensors shards in `folder`, as a context manager.

    Raises StorageError if the disk is full or fails, InputError if a file cannot be written for
    another reason (no permission). A tensor out of order, left out, or unlike its spec is the
    caller's mistake: ValueError.
    """

    def __init__(
        self,
        folder: Path,
        specs: Mapping[str, TensorSpec],
        shard_bytes: int = DEFAULT_SHARD_BYTES,
    ) -> None:
        """Plan the shards: tensors in the order of `specs`, at most `shard_bytes` in a shard.

        A tensor larger than `shard_bytes` gets a separate shard.
        """
        self._folder = folder
        self._specs = specs
        self._shards = _plan(specs, shard_bytes)
        self._order = [(name, file) for file, shard in self._shards.items() for name in shard.ends]
        self._finished = 0  # tensors
        self._filled = 0  # bytes written of the next tensor
        self._file: ChecksummedFile | None = None
        self._checksums: dict[str, FileChecksum] = {}
        self._bytes_written = 0

    @property
    def checksums(self) -> Mapping[str, FileChecksum]:
        """Return the checksum of every finished file by file name; of all files after the block."""
        return self._checksums

    @property
    def bytes_written(self) -> int:
        """Return the tensor bytes written so far by this writer, without headers."""
        return self._bytes_written

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the next tensor in full, without a copy if `array` is C-contiguous."""
        spec = self._specs.get(name)
        if spec is not None and array.shape != spec.shape:
            raise ValueError(f"tensor {name!r} is {array.dtype} {array.shape}, planned as {spec}")
        self.write_piece(name, np.ascontiguousarray(array).reshape(-1))

    def write_piece(self, name: str, piece: np.ndarray) -> None:
        """Write the next elements, (n,) and contiguous, of the next tensor.

        The tensor is finished with its last element; one without elements, with an empty piece.
        """
        due, file_name = self._due()
        if name != due:
            raise ValueError(f"tensor {name!r} written where {due!r} is due")
        spec = self._specs[name]
        check_piece(name, spec, piece, self._filled)
        if self._file is None or self._file.path.name != file_name:
            self._finish_file()
            shard = self._shards[file_name]
            self._file = ChecksummedFile(self._folder / file_name, shard.size)
            self._file.write(shard.header)
        self._file.write(piece.view(np.uint8).data)
        self._bytes_written += piece.nbytes
        self._filled += piece.nbytes
        if self._filled == spec.nbytes:
            self._finished += 1
            self._filled = 0

    def takes(self, name: str) -> bool:
        """Return True: this writer writes every tensor."""
        return True

    def finish_unit(self, note: Callable[[Mark], None]) -> None:
        """Pass the current mark to `note` after the last tensor of a unit."""
        note(self.mark())

    def mark(self) -> Mark:
        """Return the current mark; ValueError inside of a tensor, or before the first.

        The bytes before it are with the operating system: they survive the death of this process.
        """
        if self._file is None or self._filled:
            raise ValueError("a mark needs a finished tensor before it")
        size, crc = self._file.size, self._file.crc
        return Mark(self._finished, self._file.path.name, size, chained_crc(crc, self._checksums))

    def resume(self, marks: Sequence[Mark]) -> int:
        """Continue in a folder that another writer has left; call it before the first write.

        Reads back what that writer wrote and returns how many leading marks are valid; writing
        continues after the last of them, and everything beyond is removed. With no valid mark, or
        marks of another plan, that is everything. The result is the same in every byte as without
        the interruption. Raises ValueError after the first write.
        """
        if self._file is not None:
            raise ValueError("resume comes before the first write")
        valid = list(read_back(self._folder, self._shards, self._order, marks))
        checksums = valid[-1] if valid else {}
        with storage_faults(f"write {self._folder}"):
            for path in self._folder.glob("model*.safetensors*"):
                if path.name not in checksums:
                    path.unlink()
        if valid:
            self._finished = marks[len(valid) - 1].tensors
            name, part = checksums.popitem()
            self._checksums = checksums
            self._file = ChecksummedFile(self._folder / name, self._shards[name].size, part)
        return len(valid)

    def __enter__(self) -> Self:
        """Return the writer; it creates no file before the first tensor."""
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
        missing, _ = self._due()
        if missing is not None:
            fault = "is left unfinished" if self._filled else "was never written"
            raise ValueError(f"tensor {missing!r} {fault}")
        if len(self._shards) > 1:
            size = sum(spec.nbytes for spec in self._specs.values())
            self._checksums[INDEX_NAME] = write_index(self._folder, size, dict(self._order))

    def _due(self) -> tuple[str | None, str]:
        """Return the name and file of the next tensor; None after the last."""
        return self._order[self._finished] if self._finished < len(self._order) else (None, "")

    def _finish_file(self) -> None:
        if self._file is not None:
            self._checksums[self._file.path.name] = self._file.close()
            self._file = None


def check_piece(name: str, spec: TensorSpec, piece: np.ndarray, filled: int) -> None:
    """Raise ValueError unless `piece` can follow the first `filled` bytes of a tensor."""
    if piece.dtype != spec.dtype:
        raise ValueError(f"tensor {name!r} is {piece.dtype}, planned as {spec}")
    if piece.ndim != 1 or not piece.flags.c_contiguous:
        raise ValueError(f"a piece of tensor {name!r} is not flat and contiguous")
    if filled + piece.nbytes > spec.nbytes:
        raise ValueError(f"tensor {name!r} has more elements than planned as {spec}")


def read_back(
    folder: Path,
    shards: Mapping[str, Shard],
    order: Sequence[tuple[str, str]],
    marks: Sequence[Mark],
) -> Iterator[dict[str, FileChecksum]]:
    """Yield, for each leading mark that is valid, the checksums of the shards up to it.

    The last shard is partial. Every byte is read once.
    """
    coming = iter(shards.items())
    complete: dict[str, FileChecksum] = {}
    current, size, crc, tensors = "", 0, 0, 0
    with suppress(OSError):  # a mark whose bytes cannot be read back is not valid
        for mark in marks:
            if not tensors < mark.tensors <= len(order):
                return
            tensors = mark.tensors
            name, file = order[tensors - 1]
            while current != file:
                if current:
                    crc = crc_between(folder / current, size, shards[current].size, crc)
                    complete[current] = checksum_of(shards[current].size, crc)
                current, shard = next(coming)
                size = len(shard.header)
                crc = crc_between(folder / current, 0, size, 0)
                if crc != zlib.crc32(shard.header):
                    return
            end = shards[file].ends[name]
            crc = crc_between(folder / file, size, end, crc)
            if mark != Mark(tensors, file, end, chained_crc(crc, complete)):
                return
            size = end
            yield {**complete, file: checksum_of(size, crc)}


def chained_crc(crc: int, before: Mapping[str, FileChecksum]) -> str:
    """Combine the checksum of the current shard with those of the shards before it."""
    digits = "".join(checksum["crc32"] for checksum in before.values())
    return f"{zlib.crc32(digits.encode(), crc):08x}"


def write_safetensors(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write one file of arrays that are all in memory, in their order."""
    shard = shard_of({name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()})
    file = ChecksummedFile(path, shard.size)
    file.write(shard.header)
    for array in arrays.values():
        file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    file.close()


def write_index(folder: Path, total_size: int, weight_map: Mapping[str, str]) -> FileChecksum:
    """Write the index of shards: the file of each tensor, and the bytes of all tensors."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    file = ChecksummedFile(folder / INDEX_NAME)
    file.write(json_text(index, indent=2).encode())
    return file.close()


def write_checksums(folder: Path, known: Mapping[str, FileChecksum] | None = None) -> None:
    """Write `checksums.json` for every file under `folder`, keyed by relative path.

    Files in `known`, whose checksum was taken while they were written, are not read again.
    """
    content = {"format": 1, "algorithm": "crc32", "files": checksums_of(folder, known or {})}
    file = ChecksummedFile(folder / CHECKSUMS_NAME)
    file.write(json_text(content, indent=2).encode())
    file.close()


def checksums_of(folder: Path, known: Mapping[str, FileChecksum]) -> dict[str, FileChecksum]:
    """Return the checksum of every file under `folder` but `checksums.json`, by relative path."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    names = {path.relative_to(folder).as_posix(): path for path in paths}
    return {
        name: known.get(name) or file_checksum(path)
        for name, path in names.items()
        if name != CHECKSUMS_NAME
    }


def _plan(specs: Mapping[str, TensorSpec], shard_bytes: int) -> dict[str, Shard]:
    """Return the shards by file name, in order."""
    if not specs:
        raise ValueError("a checkpoint without tensors")
    shards = split(specs, shard_bytes)
    if len(shards) == 1:
        return {"model.safetensors": shard_of(shards[0])}
    return numbered(shards)


def split(specs: Mapping[str, TensorSpec], shard_bytes: int) -> list[dict[str, TensorSpec]]:
    """Divide the tensors into shards; one larger than `shard_bytes` gets a separate shard."""
    shards: list[dict[str, TensorSpec]] = []
    filled = 0
    for name, spec in specs.items():
        if not shards or filled + spec.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = spec
        filled += spec.nbytes
    return shards


def numbered(shards: Sequence[Mapping[str, TensorSpec]]) -> dict[str, Shard]:
    """Return the shards by the file names that an index refers to."""
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard_of(shard)
        for number, shard in enumerate(shards, start=1)
    }


def shard_of(specs: Mapping[str, TensorSpec]) -> Shard:
    """Build the length, JSON header (padded to the alignment) and tensor positions of one file."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    ends: dict[str, int] = {}
    position = 0
    for name, spec in specs.items():
        ends[name] = position + spec.nbytes
        entries[name] = {
            "dtype": NAME_OF_DTYPE[spec.dtype],
            "shape": spec.shape,
            "data_offsets": (position, ends[name]),
        }
        position = ends[name]
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    header = len(text).to_bytes(8, "little") + text
    return Shard(header, {name: len(header) + end for name, end in ends.items()})
