"""Journals of all kinds: whatever happens to one, no more is believed than was recorded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recall_jax.checkpoint.writer import Mark
from recall_jax.engine import journal as merging
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.evaluation import journal as evaluating
from recall_jax.evaluation.metrics import Estimate
from recall_jax.experiments.continual.journal import open_journal
from recall_jax.files.journal_lines import journal_line
from recall_jax.files.results import Results, resume_results
from recall_jax.training.checkpoints import History, TrainingCheckpoints
from recall_jax.training.step import TrainState


@dataclass(frozen=True)
class Chosen:
    rows: list[int]
    inertia: float


FILES = {"/m/model.safetensors": [12, 34, "ab"]}


def merge(path: Path) -> list[Any]:
    identity = {"inputs": FILES, "recipe": {"merge_method": "recall"}, "program": {"jax": "1"}}
    found = merging.resume_merge_journal(path, identity, ["a", "b"])
    if not path.exists():
        found.record_prepared(Chosen([1, 2], 0.1))
        found.record_unit("a", Mark(2, "model.safetensors", 100, "0000000a"))
        found.record_unit("b", Mark(4, "model.safetensors", 200, "0000000b"))
    return [found.prepared or None, *found.units.items()]


def evaluation(path: Path) -> list[Any]:
    found = evaluating.resume_evaluation_journal(path, {"models": [FILES], "tasks": ["x"]})
    if not path.exists():
        found.record(0, "x", {"accuracy": Estimate(50.25, 1.5, 400)})
        found.record(1, "x", {"accuracy": Estimate(75.0, None, 1)})
    return list(found.results.items())


def continual(path: Path) -> list[Any]:
    is_new = not path.exists()
    found = open_journal(path, {"program": {}, "evaluated": ["x"], "inputs": FILES})
    if is_new:
        found.record_made("first", 1.5, ["a warning"])
        found.record_results("first", {"x": {"accuracy": {"value": 50.25}}})
    return [*found.seconds.items(), *found.results.items()]


def ablation(path: Path) -> list[Any]:
    found = resume_results(path, {"recipe": 1, "inputs": FILES}, "ablation")
    if not path.exists():
        found = Results(path, {"recipe": 1, "inputs": FILES})
        found.keep("own", {"shares": [0.25, 1.0]})
        found.keep("other", {"shares": [0.125, 1.0]})
    return list(found.values.items())


WEIGHTS = {"kernel": np.ones(2, np.float32)}


def training(path: Path) -> list[Any]:
    checkpoints = TrainingCheckpoints(
        path, {"settings": {"steps": 9}, "program": {}, "inputs": FILES}
    )
    state = TrainState(WEIGHTS, {}, np.asarray(3, np.int32))
    if not path.exists():
        checkpoints.save(state, History([3.5, 2.25, 1.125], [(2, 2.5)], best_step=2, tokens=77))
    found = checkpoints.check()
    return [] if found is None else [(key, str(value)) for key, value in found.items()]


KINDS = [merge, evaluation, continual, ablation, training]


def read(kind: Callable[[Path], list[Any]], path: Path) -> list[Any]:
    """What is read of a journal; nothing where it is refused in a line that says what to do."""
    try:
        return kind(path)
    except UnfinishedError as error:
        assert "\n" not in str(error) and "without --resume" in str(error)
        return []


def is_true(found: list[Any], whole: list[Any]) -> bool:
    return all(entry is None or entry in whole for entry in found)


@pytest.mark.parametrize("kind", KINDS)
def test_no_flipped_bit_is_believed(kind, tmp_path):
    path = tmp_path / "journal.jsonl"
    kind(path)
    content, whole = path.read_bytes(), kind(path)
    assert whole
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        found = read(kind, path)
        assert is_true(found, whole) and len(found) < len(whole) + (kind is merge), place


@pytest.mark.parametrize("kind", KINDS)
def test_lines_that_are_gone_moved_or_of_another_kind(kind, tmp_path):
    path = tmp_path / "journal.jsonl"
    kind(path)
    lines, whole = path.read_text().splitlines(keepends=True), kind(path)
    foreign = ["[]\n", "{}\n", "null\n", '{"identity": 1}\n', "[" * 9000 + "\n", "9" * 9000 + "\n"]
    for line in [*foreign, "\n", "\x00" * 50, journal_line({"identity": {"of": 1}})]:
        for place in range(len(lines)):
            path.write_text("".join([*lines[:place], line, *lines[place:]]))
            assert is_true(read(kind, path), whole), (line, place)
            path.write_text("".join([*lines[:place], line, *lines[place + 1 :]]))
            assert is_true(read(kind, path), whole), (line, place)
    for place in range(len(lines)):
        path.write_text("".join([*lines[: place + 1], *lines[place:]]))
        twice = read(kind, path)
        assert is_true(twice, whole) or (kind is continual and twice[1:] == whole[1:])


@pytest.mark.parametrize("kind", KINDS)
def test_the_journal_of_another_command_is_left_as_it_is(kind, tmp_path):
    for other in KINDS:
        path = tmp_path / f"{kind.__name__}-{other.__name__}" / "journal.jsonl"
        path.parent.mkdir()
        other(path)
        before = path.read_bytes()
        if other is not kind:
            try:
                assert kind(path) == ([None] if kind is merge else [])
            except InputError as error:
                assert "resume" in str(error)
            assert path.read_bytes() == before
