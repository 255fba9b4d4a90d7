"""The weights of one model, written by many processes: every unit whole, by one of them.

No file holds tensors of two units, and unit u, in the order of the forward pass, is written by
process u modulo their number, into a folder that all share or one of its own. An owner's disk works
behind the walk, so that many write at a time. What an owner has written it tells the others, and
whoever keeps a journal notes it, behind too, in the order of the units.
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
    """Context manager that streams tensors into safetensors files, as `ShardedWriter` does.

    Each process gives it the tensors of its own units, and all finish every unit, in order. It
    holds at most one unit in memory, until it is written. Errors are those of `ShardedWriter`, and
    whatever `processes.check` raises; those of its threads come with a later call.
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
        """Plan: `units` name the tensors of each, in the order of `specs`.

        `folder` is one and the same for all processes, or each has its own if it is not `shared`.
        """
        self._folder, self._specs, self._shared = folder, specs, shared
        self._processes = replace(processes, check=self._check)
        self._check_others, self._left = processes.check, False
        self._units = plan_unit_files(specs, units, processes.count, shard_bytes)
        self._order = [each for unit in self._units for each in unit.order]
        self._own = {name for unit in self._units if self._owns(unit) for name, _ in unit.order}
        self._at = 0  # the unit that is due
        self._finished = 0  # tensors
        self._filled = 0  # bytes of the tensor that is due
        self._noting = BackgroundQueue(len(self._units))
        self._checksums: dict[str, FileChecksum] = {}
        own = (unit.nbytes for unit in self._units if self._owns(unit))
        self._disk = BackgroundQueue(max(own, default=0))
        self._file: ChecksummedFile | None = None
        self._written: dict[str, FileChecksum] = {}  # of the unit that is written
        self._bytes_written = 0

    @property
    def checksums(self) -> Mapping[str, FileChecksum]:
        """Of the files of every unit noted so far, whoever wrote it; of the index after all.

        In a shared folder only process 0 has them.
        """
        return self._checksums

    @property
    def bytes_written(self) -> int:
        """Bytes of the tensors written so far by this process, headers not counted."""
        return self._bytes_written

    @property
    def total_size(self) -> int:
        """Bytes of all tensors of the model."""
        return sum(spec.nbytes for spec in self._specs.values())

    @property
    def weight_map(self) -> Mapping[str, str]:
        """The file of each tensor that is this process's to write."""
        return {name: file for name, file in self._order if name in self._own}

    def takes(self, name: str) -> bool:
        """Whether a tensor is this process's to write."""
        return name in self._own

    def write_piece(self, name: str, piece: np.ndarray) -> None:
        """Take the next elements, (n,) and contiguous, of the tensor that is due, to be written.

        It is finished when all its elements are there; one without elements, by an empty piece.
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
        # A copy: the piece may lie in an array that is larger, and there for each device.
        self._disk.submit(self._write, unit, file, piece.copy(), size=piece.nbytes)
        self._filled += piece.nbytes
        if self._filled == spec.nbytes:
            self._finished += 1
            self._filled = 0

    def finish_unit(self, note: Callable[[Mark], None]) -> None:
        """After the last piece of a unit, whoever writes it; what is to come belongs to the next.

        Where a journal is kept, by process 0 and by each with a folder of its own, its mark is
        given to `note`, in a thread, once its bytes are with the operating system of the owner.
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
        """Go on in the folder that other writers have left, before the first write.

        `marks` are the same in all processes. Each reads back the units that are now its own;
        returns how many leading marks stand for all. What lies beyond is removed.
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
        self._processes.barrier("cleared")  # else a new file could be taken for an old one
        return standing

    def __enter__(self) -> Self:
        """Nothing is created before the first tensor."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for all that is to be written and noted; write the index into a shared folder.

        If the block failed, leave what waits.
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
        """Of a unit that is written; all may know."""
        self._finish_file()
        self._processes.publish(f"units/{at}", self._written)
        self._written = {}

    def _note(self, at: int, note: Callable[[Mark], None]) -> None:
        """That a unit is written, once it is."""
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
        """For whoever waits: raise where another process has ended, or this one writes no more."""
        if self._left:
            raise InputError("the writing has ended")
        self._check_others()

    def _go_past(self, unit: UnitFiles) -> None:
        self._finished = unit.before + len(unit.order)
        self._at += 1
