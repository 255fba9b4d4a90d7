"""The journal tells what is finished, whatever a kill did to its last line."""

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.writer import Mark
from recall_jax.engine.journal import MergeJournal, changed_input, input_files, resume_merge_journal
from recall_jax.errors import InputError

IDENTITY = {
    "inputs": {"/m/model.safetensors": [12, 34, "ab"], "/d.jsonl": [5, 6]},
    "recipe": {"merge_method": "recall", "samples": {"count": 20}},
    "program": {"jax": "1"},
}
MARKS = [Mark(2 * n, "model.safetensors", 100 * n, f"{n:08x}") for n in range(1, 4)]
UNITS = ["a", "b", "c", "d"]


@dataclass(frozen=True)
class Rows:
    rows: list[int]


@dataclass(frozen=True)
class Chosen:
    rows: Rows
    inertia: float


PREPARED = Chosen(Rows([1, 2]), 0.1)


@pytest.fixture
def path(tmp_path):
    journal = MergeJournal(tmp_path / "journal.jsonl", IDENTITY)
    journal.record_prepared(PREPARED)
    for name, mark in zip("abc", MARKS, strict=True):
        journal.record_unit(name, mark)
    return journal.path


def test_what_was_recorded_is_read_back(path):
    journal = resume_merge_journal(path, IDENTITY, UNITS)
    assert journal.find_prepared(Chosen) == PREPARED and journal.find_prepared(Rows) is None
    assert journal.units == dict(zip("abc", MARKS, strict=True))


def test_without_a_journal_there_is_nothing(tmp_path):
    journal = resume_merge_journal(tmp_path / "none", IDENTITY, UNITS)
    assert not journal.prepared and not journal.units
    (tmp_path / "empty").touch()
    assert not resume_merge_journal(tmp_path / "empty", IDENTITY, UNITS).units


def test_nothing_is_written_before_something_is_done(tmp_path):
    MergeJournal(tmp_path / "journal.jsonl", IDENTITY).keep(0)
    assert not (tmp_path / "journal.jsonl").exists()


def test_any_cut_leaves_the_lines_before_it(path):
    whole = path.read_bytes()
    ends = [place + 1 for place, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        lines = sum(end <= cut for end in ends)
        journal = resume_merge_journal(path, IDENTITY, UNITS)
        assert list(journal.units) == list("abc")[: max(lines - 2, 0)]
        assert bool(journal.prepared) == (lines >= 2)


def test_after_a_cut_it_can_be_continued(path):
    path.write_bytes(path.read_bytes()[:-7])
    journal = resume_merge_journal(path, IDENTITY, UNITS)
    journal.keep(1)
    journal.record_unit("b", MARKS[2])
    again = resume_merge_journal(path, IDENTITY, UNITS)
    assert again.units == {"a": MARKS[0], "b": MARKS[2]} and again.find_prepared(Chosen) == PREPARED
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"inputs": IDENTITY["inputs"] | {"/d.jsonl": [5, 7]}}, "/d.jsonl is not what it was"),
        ({"inputs": IDENTITY["inputs"] | {"/new": [5, 7]}}, "/new is not what it was"),
        ({"recipe": {"merge_method": "recall", "samples": {"count": 3}}}, "another samples.count"),
        ({"recipe": {"merge_method": "recall", "samples": None}}, "another samples"),
        ({"program": {"jax": "2"}}, "another jax"),
        ({"settings": {}}, "what was interrupted here is another command"),
    ],
)
def test_another_merge_or_changed_inputs_are_refused(change, words, path):
    before = path.read_bytes()
    with pytest.raises(InputError, match="run without --resume to start afresh") as caught:
        resume_merge_journal(path, IDENTITY | change, UNITS)
    assert words in str(caught.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "instead", "left"),
    [
        (2, '{"unit": "b", "tensors": 4, "file": "f", "size": 1, "crc32": "0"}', ""),
        (3, '{"unit": "b", "tensors": 4}', "a"),
        (3, '{"unti": "b", "tensors": 4, "file": "f", "size": 1, "crc32": "0"}', "a"),
        (4, "[]", "ab"),
        (0, '{"format": 1}', ""),
    ],
)
def test_what_is_no_record_is_not_believed_nor_what_follows(line, instead, left, path):
    lines = path.read_text().splitlines()
    lines[line] = instead
    path.write_text("\n".join(lines) + "\n")
    assert list(resume_merge_journal(path, IDENTITY, UNITS).units) == list(left)


def test_what_only_got_another_time_is_what_it_was(toys, tmp_path):
    """For the journals of all commands: they keep what this function gives."""
    folder = Path(shutil.copytree(toys.llama[0], tmp_path / "model"))
    data = Path(shutil.copy(toys.data, tmp_path))
    before = input_files([open_checkpoint(folder)], [data, tmp_path / "none"])
    kinds = {Path(path).suffix for path in before}
    assert kinds == {".safetensors", ".json", ".jsonl"}
    for path in map(Path, before):
        path.touch()
    assert input_files([open_checkpoint(folder)], [data]) == before
    path = next(path for path in map(Path, before) if path.suffix == ".safetensors")
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    after = input_files([open_checkpoint(folder)], [data])
    assert changed_input(before, after) == str(path)
