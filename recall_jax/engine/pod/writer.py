"""Write the weights of one model from many processes, each unit by one of them.

No file holds tensors of two units. Process u modulo their number writes unit u, in the order of the
forward pass, into a folder that all share, or a separate one. Writing to disk runs behind the walk,
so that many processes write at the same time. A process publishes each unit that it has written to
the others, and those that keep a journal record it, also behind the walk, in the order of the
units.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import (
    DEFAULT_SHARD_BYTES,
    INDEX_NAME,
    Mark,
    check_piece,
    write_index,
)
from recall_jax.engine.background import BackgroundQueue
from recall_jax.engine.pod.unit_files import (
    UnitFiles,
    plan_unit_files,
    read_back_unit,
    unit_mark,
    wait_until_visible,
)
from recall_jax.errors import InputError, storage_faults
from recall_jax.files.checksums import ChecksummedFile, FileChecksum
from recall_jax.parallel.processes import Processes


class UnitWriter:
    """Stream tensors into safetensors files, as `ShardedWriter` does; a context manager.

    Each process is given the tensors of the units that it writes, and all processes finish every
    unit, in order. Memory holds at most one unit that waits to be written. Raises the errors of
    `ShardedWriter`, and those of `processes.check`; an error in a thread is raised by a later call.
    """

    def __init__(
        self,
        folder: Path,
        units: Mapping[str, Sequence[str]],
        specs: Mapping[str, TensorSpec],
        processes: Processes,
        shard_bytes: int = DEFAULT_SHARD_BYTES,
        *,
        shared: bool = True,
    ) -> None:
        """Plan the files; `units` names the tensors of each unit, in the order of `specs`.

        `folder` is the same for all processes if `shared`, else each process has a separate one.
        """
        self._folder, self._specs, self._shared = folder, specs, shared
        self._processes = replace(processes, check=self._check)
        self._check_others, self._left = processes.check, False
        self._units = plan_unit_files(specs, units, processes.count, shard_bytes)
        self._order = [each for unit in self._units for each in unit.order]
        self._owned = {name for unit in self._units if self._owns(unit) for name, _ in unit.order}
        self._at = 0  # index of the current unit
        self._finished = 0  # number of tensors
        self._filled = 0  # bytes received of the next tensor
        self._noting = BackgroundQueue(len(self._units))
        self._checksums: dict[str, FileChecksum] = {}
        sizes = (unit.nbytes for unit in self._units if self._owns(unit))
        self._disk = BackgroundQueue(max(sizes, default=0))
        self._file: ChecksummedFile | None = None
        self._written: dict[str, FileChecksum] = {}  # files of the current unit
        self._bytes_written = 0

    @property
    def checksums(self) -> Mapping[str, FileChecksum]:
        """Return the checksums of all recorded units' files, and of the index once it is written.

        In a shared folder only process 0 has them.
        """
        return self._checksums

    @property
    def bytes_written(self) -> int:
        """Return the tensor bytes written so far by this process, without headers."""
        return self._bytes_written

    @property
    def total_size(self) -> int:
        """Return the bytes of all tensors of the model."""
        return sum(spec.nbytes for spec in self._specs.values())

    @property
    def weight_map(self) -> Mapping[str, str]:
        """Return the file of each tensor that this process writes."""
        return {name: file for name, file in self._order if name in self._owned}

    def takes(self, name: str) -> bool:
        """Return whether this process writes the tensor."""
        return name in self._owned

    def write_piece(self, name: str, piece: np.ndarray) -> None:
        """Queue the next elements, (n,) and contiguous, of the next tensor for writing.

        The tensor is finished with its last element; one without elements, with an empty piece.
        Raises ValueError for a tensor out of order, or unlike its spec.
        """
        due = self._order[self._finished][0] if self._finished < len(self._order) else None
        if name != due or not self.takes(name):
            raise ValueError(f"tensor {name!r} written where {due!r} is due")
        unit = self._units[self._at]
        if self._finished == unit.before + len(unit.order):
            raise ValueError(f"tensor {name!r} written before the unit before it was finished")
        spec = self._specs[name]
        check_piece(name, spec, piece, self._filled)
        file = self._order[self._finished][1]
        # A copy, since the piece may be part of a larger array, with one for each device.
        self._disk.submit(self._write, unit, file, piece.copy(), size=piece.nbytes)
        self._filled += piece.nbytes
        if self._filled == spec.nbytes:
            self._finished += 1
            self._filled = 0

    def finish_unit(self, note: Callable[[Mark], None]) -> None:
        """Finish a unit after its last piece, in every process; the next piece is the next unit's.

        In processes that keep a journal (process 0, and all with a separate folder), a thread calls
        `note` with the unit's mark once the operating system of its writer has the bytes.
        """
        unit, at = self._units[self._at], self._at
        if self._owns(unit):
            if self._finished != unit.before + len(unit.order):
                raise ValueError("only a unit that has all its tensors is finished")
            self._disk.submit(self._finish_files, at, size=0)
        if self._processes.index == 0 or not self._shared:
            self._noting.submit(self._note, at, note)
        for queue in (self._disk, self._noting):
            queue.raise_errors()
        self._go_past(unit)

    def resume(self, marks: Sequence[Mark]) -> int:
        """Continue in the folder that other writers have left; to be called before the first write.

        `marks` are the same in all processes. Each process reads back the units that it now writes.
        Returns how many leading marks hold in all processes; files after them are removed.
        """
        if self._finished or self._filled:
            raise ValueError("resume comes before the first write")
        standing = 0
        found: dict[int, Mapping[str, FileChecksum]] = {}
        for at, (unit, mark) in enumerate(zip(self._units, marks, strict=False)):
            if self._owns(unit):
                if (files := read_back_unit(self._folder, unit, mark)) is None:
                    break
                found[at] = files
            standing += 1
        verdicts = self._processes.exchange("standing", [standing, list(found.items())])
        standing = min(verdict for verdict, _ in verdicts)
        files_of = {at: files for _, found in verdicts for at, files in found}
        for at in range(standing):
            self._checksums |= files_of[at]
            self._go_past(self._units[at])
        if self._processes.index == 0 or not self._shared:
            kept = {
                file
                for unit in self._units[:standing]
                if self._shared or self._owns(unit)
                for file in unit.shards
            }
            with storage_faults(f"write {self._folder}"):
                for path in self._folder.glob("model*.safetensors*"):
                    if path.name not in kept:
                        path.unlink()
        self._processes.barrier("cleared")  # so that no process takes a new file for an old one
        return standing

    def __enter__(self) -> Self:
        """Return the writer; nothing is created before the first tensor."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait until all is written and recorded, and write the index into a shared folder.

        If the block failed, discard the waiting work.
        """
        try:
            if kind is None:
                self._wait_for_all()
        finally:
            self._left = True
            self._disk.close()
            self._noting.close()
            self._finish_file()
        if kind is None and self._shared and self._processes.index == 0:
            index = write_index(self._folder, self.total_size, dict(self._order))
            self._checksums[INDEX_NAME] = index

    def _owns(self, unit: UnitFiles) -> bool:
        return unit.owner == self._processes.index

    def _write(self, unit: UnitFiles, name: str, piece: np.ndarray) -> None:
        if self._file is None or self._file.path.name != name:
            self._finish_file()
            shard = unit.shards[name]
            self._file = ChecksummedFile(self._folder / name, shard.size)
            self._file.write(shard.header)
        self._file.write(piece.view(np.uint8).data)
        self._bytes_written += piece.nbytes

    def _finish_file(self) -> None:
        if self._file is not None:
            self._written[self._file.path.name] = self._file.close()
            self._file = None

    def _finish_files(self, at: int) -> None:
        """Finish the files of a unit, and publish their checksums to the other processes."""
        self._finish_file()
        self._processes.publish(f"units/{at}", self._written)
        self._written = {}

    def _note(self, at: int, note: Callable[[Mark], None]) -> None:
        """Wait until a unit is written, and record it."""
        unit, files = self._units[at], self._processes.wait(f"units/{at}")
        if self._shared and not self._owns(unit):
            wait_until_visible(self._folder, unit, files, self._processes)
        self._checksums |= files
        note(unit_mark(unit, files))

    def _wait_for_all(self) -> None:
        if self._at < len(self._units):
            due = self._order[min(self._finished, len(self._order) - 1)][0]
            raise ValueError(f"tensor {due!r} was never written, or its unit not finished")
        self._disk.wait()
        self._noting.wait()

    def _check(self) -> None:
        """Raise an error if another process has ended, or if this one has stopped writing."""
        if self._left:
            raise InputError("the writing has ended")
        self._check_others()

    def _go_past(self, unit: UnitFiles) -> None:
        self._finished = unit.before + len(unit.order)
        self._at += 1
