"""What processes that merge together share: the folder they write into, and the journal."""

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

_APPEARS = 10.0  # seconds that a network file system may take to show a new folder


def check_alike(processes: Processes, key: str, own: Mapping[str, Any]) -> None:
    """Raise InputError in a process whose JSON values `own` are not, name by name, process 0's.

    What processes are to do together is then not the same, and they would wait for ever.
    """
    its = processes.broadcast(key, lambda: own)
    if processes.index and (names := differences(its, json.loads(json.dumps(own)))):
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
    """As `output.work_folder`, one for all processes: process 0 opens it, and makes it `out`.

    Raises InputError in a process that does not see the folder of process 0.
    """
    if processes.index == 0:
        with work_folder(out, force=force, resume=resume, inputs=inputs) as work:
            processes.publish("work", [str(work.folder), str(work.journal), work.discarded])
            yield work
        return
    folder, journal, discarded = processes.wait("work")
    deadline = time.monotonic() + _APPEARS
    while not Path(folder).is_dir():
        if time.monotonic() > deadline:
            raise InputError(
                f"process {processes.index} does not see {folder}, which process 0 has made: write "
                "into a folder that all share, or with --parts into one on each machine"
            )
        time.sleep(0.1)
    yield UnfinishedOutput(Path(folder), Path(journal), discarded)


class _Resumable(Protocol):
    """What a writer has for `shared_journal`."""

    def resume(self, marks: Sequence[Mark]) -> int:
        """How many leading marks stand."""


def shared_journal(
    path: Path,
    identity: Mapping[str, Any],
    units: Sequence[str],
    writer: _Resumable,
    processes: Processes,
    *,
    resume: bool,
    own: bool,
) -> MergeJournal:
    """The journal of a merge, the same in all processes, and `writer` made ready to go on.

    Process 0's is on disk, and with `resume` takes up what an interrupted merge has left; the
    others have it in memory, or on a disk of their `own`, where it must be of the same merge too.
    Raises as `resume_merge_journal`.
    """
    kept = path if own or processes.index == 0 else None
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
