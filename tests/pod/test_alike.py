"""Processes that were not given the same, and what is kept where the fault is of one alone."""

import re
from dataclasses import dataclass

import pytest
from test_processes import start
from threaded import together

from recall_jax.checkpoint.writer import Mark
from recall_jax.engine.journal import MergeJournal
from recall_jax.engine.pod.shared import check_alike, shared_journal
from recall_jax.errors import InputError, UnfinishedError

__all__ = ["start"]


@dataclass(frozen=True)
class By:
    process: int


def test_what_differs_between_processes_is_named_by_the_one_that_differs():
    def work(processes, own):
        try:
            check_alike(processes, "asked", own[processes.index])
        except InputError as error:
            return str(error)

    alike = [{"recipe": {"models": (1, 2)}, "--resume": True}] * 2
    assert together(2, lambda processes: work(processes, alike)) == [None, None]
    other = [alike[0], {"recipe": {"models": (1, 3)}, "--resume": True}]
    line = "process 1 has another recipe.models than process 0: give all the same"
    assert together(2, lambda processes: work(processes, other)) == [None, line]


@dataclass
class Standing:
    """A writer for which all marks stand."""

    def resume(self, marks):
        return len(marks)


def test_a_part_is_gone_on_with_only_where_its_own_inputs_are_what_they_were(tmp_path):
    units = ["embed", "layers.0"]

    def path(index):
        folder = tmp_path / str(index)
        folder.mkdir(exist_ok=True)
        return folder / "journal.jsonl"

    def identity(size):
        return {"recipe": {}, "program": {}, "inputs": {"/data/model": [size, 0]}}

    for index in range(2):
        journal = MergeJournal(path(index), identity(8))
        journal.record_prepared(By(0))
        for unit in units[: 2 - index]:  # the journal of process 1 is behind
            journal.record_unit(unit, Mark(1, "file", 2, "crc"))

    def resumed(processes, sizes):
        own = identity(sizes[processes.index])
        journal = shared_journal(
            path(processes.index),
            own,
            units,
            Standing(),
            processes,
            resume=True,
            separate_disks=True,
        )
        return journal.prepared, list(journal.units)

    assert together(2, lambda p: resumed(p, [8, 8])) == [({"By": {"process": 0}}, units)] * 2
    with pytest.raises(UnfinishedError, match=re.escape("/data/model is not what it was")):
        together(2, lambda p: resumed(p, [8, 9]))


def test_what_is_done_is_kept_where_the_input_of_another_process_alone_is_wrong(start, tmp_path):
    pod = start(
        """
        def work(processes):
            from pathlib import Path
            from recall_jax.engine.pod.shared import shared_work
            with shared_work(Path(os.environ["OUT"]), processes) as work:
                if processes.index == 0:
                    work.journal.write_text("{}")
                processes.barrier("here")
                if processes.index == 1:
                    raise InputError("data.jsonl is not there")
                processes.wait("what nobody publishes")
        """,
        OUT=str(tmp_path / "out"),
    )
    assert pod.end(1) == (2, "", "recall: data.jsonl is not there\n")
    status, _, line = pod.end(0)
    assert status == 2
    assert line == (
        "recall: process 1 of 2 ended: data.jsonl is not there; what is done is kept: fix the "
        "cause, then run the same command with --resume\n"
    )
    assert (tmp_path / ".out.recall-work" / "journal.jsonl").read_text() == "{}"
