"""Share a merge's output folder and journal among processes that merge together."""

import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from recall_jax.checkpoint.writer import Mark
from recall_jax.engine.journal import MergeJournal, resume_merge_journal
from recall_jax.errors import InputError
from recall_jax.files.journal_lines import differences
from recall_jax.files.output import UnfinishedOutput, work_folder
from recall_jax.parallel.processes import Processes

_VISIBILITY_TIMEOUT = 10.0  # seconds until a network file system shows a new folder


def check_alike(processes: Processes, key: str, values: Mapping[str, Any]) -> None:
    """Raise InputError in a process whose JSON `values` differ from those of process 0.

    Processes that differ would do different work, and wait for each other forever.
    """
    first = processes.broadcast(key, lambda: values)
    if processes.index and (names := differences(first, json.loads(json.dumps(values)))):
        raise InputError(
            f"process {processes.index} has another {names[0]} than process 0: give all the same"
        )


@contextmanager
def shared_work(
    out: Path,
    processes: Processes,
    *,
    force: bool = False,
    resume: bool = False,
    inputs: Iterable[Path] = (),
) -> Iterator[UnfinishedOutput]:
    """Open one `output.work_folder` for all processes; process 0 creates and publishes it.

    Raises InputError in a process that does not see the folder of process 0.
    """
    if processes.index == 0:
        with work_folder(out, force=force, resume=resume, inputs=inputs) as work:
            processes.publish("work", [str(work.folder), str(work.journal), work.discarded])
            yield work
        return
    folder, journal, discarded = processes.wait("work")
    deadline = time.monotonic() + _VISIBILITY_TIMEOUT
    while not Path(folder).is_dir():
        if time.monotonic() > deadline:
            raise InputError(
                f"process {processes.index} does not see {folder}, which process 0 has made: write "
                "into a folder that all share, or with --parts into one on each machine"
            )
        time.sleep(0.1)
    yield UnfinishedOutput(Path(folder), Path(journal), discarded)


class _Resumable(Protocol):
    """Describe a writer that `shared_journal` can resume."""

    def resume(self, marks: Sequence[Mark]) -> int:
        """Return how many leading marks still hold."""


def shared_journal(
    path: Path,
    identity: Mapping[str, Any],
    units: Sequence[str],
    writer: _Resumable,
    processes: Processes,
    *,
    resume: bool,
    separate_disks: bool,
) -> MergeJournal:
    """Return the journal of a merge, the same in all processes, with `writer` ready to continue.

    The journal of process 0 is on disk, and with `resume` continues that of an interrupted merge.
    The others are in memory, or on disk too with `separate_disks`, where they must be those of the
    same merge. Raises as `resume_merge_journal` does.
    """
    kept = path if separate_disks or processes.index == 0 else None
    journal = (
        resume_merge_journal(path, identity, units)
        if resume and kept
        else MergeJournal(kept, identity)
    )
    found = processes.broadcast("journal", lambda: [journal.prepared, list(journal.units.items())])
    if processes.index:
        prepared, written = found
        marks = {unit: Mark(*mark) for unit, mark in written}
        journal = MergeJournal(kept, identity, prepared, marks)
    if resume:
        journal.keep(writer.resume(list(journal.units.values())))
    return journal
