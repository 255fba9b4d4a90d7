"""Units written by several owners: the safetensors package reads them, every byte is as alone."""

import json
import threading
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from threaded import together

from recall_jax.checkpoint.folder_files import weight_files
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import Mark
from recall_jax.engine.journal import MergeJournal, resume_merge_journal
from recall_jax.engine.plan import units_of
from recall_jax.engine.pod import unit_files
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.errors import InputError, StorageError
from recall_jax.files.checksums import ChecksummedFile
from recall_jax.parallel.processes import Processes

pytestmark = pytest.mark.eight_devices

BF16 = np.dtype(ml_dtypes.bfloat16)
TENSORS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    "model.layers.0.a.weight": np.arange(300).astype(BF16).reshape(20, 15),
    "model.layers.0.b.weight": np.arange(7).astype(np.int32),
    "model.layers.0.empty": np.zeros((0, 4), np.float32),
    "model.layers.1.a.weight": -np.arange(300).astype(BF16).reshape(20, 15),
    "model.layers.1.scalar": np.float32(-0.0),
    "model.norm.weight": np.ones(5, np.float16),
    "lm_head.weight": np.arange(12, dtype=np.float32).reshape(4, 3) / 7,
}
SPECS = {name: TensorSpec(array.dtype, array.shape) for name, array in TENSORS.items()}
UNITS = units_of(SPECS)
FILES = 5
IDENTITY = {"inputs": {}, "recipe": {}, "program": {}}
SHARD = 610  # bytes: layer 0 has no room in one file, all other units have


class Killed(BaseException):
    """As if the process were gone."""


def write(folder, processes, *, resume=False, stop_at="", before_journal=False, shared=True):
    """Write all, a journal kept by process 0, and by each with a folder of its own.

    The owner of unit `stop_at` dies in its middle, or process 0 `before_journal`.
    """
    own = folder if shared else folder / str(processes.index)
    own.mkdir(parents=True, exist_ok=True)
    path = own.parent / f"{own.name}.jsonl"
    with UnitWriter(own, UNITS, SPECS, processes, SHARD, shared=shared) as writer:
        journal = MergeJournal(path, IDENTITY)
        resumed, keeps_journal = 0, processes.index == 0 or not shared
        if resume:
            if processes.index == 0:
                journal = resume_merge_journal(path, journal.identity, list(UNITS))
            told = processes.broadcast("journal", lambda: list(journal.units.items()))
            journal.units = {unit: Mark(*mark) for unit, mark in told}
            resumed = writer.resume(list(journal.units.values()))
            if keeps_journal:
                journal.keep(resumed)
        for number, (unit, names) in enumerate(UNITS.items()):
            if number < resumed:
                continue
            dies = processes.index == (0 if before_journal else number % processes.count)
            for at, name in enumerate(names):
                if unit == stop_at and dies and not before_journal and at == len(names) // 2:
                    raise Killed
                flat = TENSORS[name].reshape(-1)
                for start in range(0, max(len(flat), 1) if writer.takes(name) else 0, 100):
                    writer.write_piece(name, flat[start : start + 100])

            def note(unit, mark):
                if unit == stop_at and before_journal:
                    raise Killed
                assert keeps_journal
                journal.record_unit(unit, mark)

            writer.finish_unit(partial(note, unit))
    return writer, resumed


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def alone(tmp_path):
    folder = tmp_path / "alone"
    write(folder, Processes())
    return contents(folder)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_units_are_whole_in_files_that_others_read(count, tmp_path, alone):
    folder = tmp_path / "out"
    writers = [writer for writer, _ in together(count, lambda each: write(folder, each))]
    assert contents(folder) == alone
    assert len(alone) == FILES + 1

    file_of, _ = weight_files(folder)
    for name, array in TENSORS.items():
        read = file_of[name].read(name)
        assert (read.dtype, read.shape) == (array.dtype, array.shape)
        assert read.tobytes() == array.tobytes()
    weight_map = json.loads(alone["model.safetensors.index.json"])["weight_map"]
    for file in set(weight_map.values()):
        inside = safetensors.numpy.load_file(folder / file)
        assert {weight_map[name] for name in inside} == {file}
        units = {unit for unit, names in UNITS.items() for name in names if name in inside}
        assert len(units) == 1

    checksums = writers[0].checksums
    assert set(checksums) == set(alone)
    assert all(checksums[name]["bytes"] == len(alone[name]) for name in alone)
    assert sum(writer.bytes_written for writer in writers) == sum(
        array.nbytes for array in TENSORS.values()
    )
    owned = [set(writer.weight_map) for writer in writers]
    assert set.union(*owned) == set(TENSORS)
    assert sum(map(len, owned)) == len(TENSORS)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("before_journal", [False, True])
@pytest.mark.parametrize("unit", ["embed", "layers.0", "layers.1", "head"])
def test_a_kill_at_any_unit_is_resumed_to_the_same_bytes(
    unit, before_journal, shared, tmp_path, alone
):
    folder = tmp_path / "out"

    def interrupted(processes):
        write(folder, processes, stop_at=unit, before_journal=before_journal, shared=shared)

    with pytest.raises((Killed, InputError)):
        together(2, interrupted)
    resumed = together(2, lambda each: write(folder, each, resume=True, shared=shared))
    # what the other process had still to write, or to note, may be left
    (stood,) = {count for _, count in resumed}
    assert stood == list(UNITS).index(unit) if before_journal else stood <= list(UNITS).index(unit)
    if shared:
        assert contents(folder) == alone
    else:
        parts = [contents(folder / str(index)) for index in (0, 1)]
        assert not set(parts[0]) & set(parts[1])
        del alone["model.safetensors.index.json"]
        assert parts[0] | parts[1] == alone


def test_owners_write_at_the_same_time(tmp_path, alone, monkeypatch):
    """Each begins a unit while the other is in the middle of one."""
    both = threading.Barrier(2, timeout=30)
    append = ChecksummedFile.write
    begun = set()

    def slow(file, data):
        if file.path not in begun and len(begun) < 4:
            begun.add(file.path)
            both.wait()
        append(file, data)

    monkeypatch.setattr(ChecksummedFile, "write", slow)
    together(2, lambda each: write(tmp_path / "out", each))
    assert contents(tmp_path / "out") == alone


def test_a_fault_of_one_disk_ends_all(tmp_path, monkeypatch):
    append = ChecksummedFile.write

    def full(file, data):
        if file.path.name == f"model-00002-of-{FILES:05d}.safetensors":
            raise StorageError("the disk is full")
        append(file, data)

    monkeypatch.setattr(ChecksummedFile, "write", full)
    told = []

    def run(processes):
        try:
            write(tmp_path / "out", processes)
        except InputError as error:
            told.append((processes.index, str(error)))
            raise

    with pytest.raises(InputError):
        together(2, run)
    assert sorted(told) == [(0, "another process has ended"), (1, "the disk is full")]
    noted = resume_merge_journal(tmp_path / "out.jsonl", IDENTITY, list(UNITS)).units
    assert set(noted) <= {"embed"}  # it is noted behind, or no more
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_other_numbers_of_processes_may_go_on(tmp_path, alone):
    folder = tmp_path / "out"
    with pytest.raises((Killed, InputError)):
        together(2, lambda each: write(folder, each, stop_at="head"))
    resumed = together(3, lambda each: write(folder, each, resume=True))
    (stood,) = {count for _, count in resumed}
    assert stood <= 3
    assert contents(folder) == alone


@pytest.mark.parametrize("file", [1, 2, 3])
@pytest.mark.parametrize("harm", ["flipped", "short", "long", "gone"])
def test_a_file_that_does_not_stand_ends_what_is_kept_for_all(file, harm, tmp_path, alone):
    folder = tmp_path / "out"
    together(2, lambda each: write(folder, each))
    path = folder / f"model-{file:05d}-of-{FILES:05d}.safetensors"
    data = path.read_bytes()
    if harm == "gone":
        path.unlink()
    else:
        changed = bytes([data[-1] ^ 1])
        path.write_bytes(
            {"flipped": data[:-1] + changed, "short": data[:-1], "long": data + b" "}[harm]
        )
    resumed = together(2, lambda each: write(folder, each, resume=True))
    assert {count for _, count in resumed} == {0 if file == 1 else 1}
    assert contents(folder) == alone


def test_a_folder_that_is_not_shared_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(unit_files, "_VISIBILITY_TIMEOUT", 0.2)

    def unshared(processes):
        write(tmp_path / str(processes.index), processes)

    with pytest.raises(InputError, match=r"process 0 does not see .*with --parts"):
        together(2, unshared)


def test_misuse_is_refused(tmp_path):
    first, second = list(TENSORS)[:2]
    writer = UnitWriter(tmp_path, UNITS, SPECS, Processes())
    with pytest.raises(ValueError, match="never written, or its unit not finished"), writer:
        with pytest.raises(ValueError, match="written where"):
            writer.write_piece(second, TENSORS[second].reshape(-1))
        with pytest.raises(ValueError, match="more elements"):
            writer.write_piece(first, np.zeros(13, np.float32))
        with pytest.raises(ValueError, match="has all its tensors"):
            writer.finish_unit(lambda mark: None)
        writer.write_piece(first, TENSORS[first].reshape(-1))
        with pytest.raises(ValueError, match="before the first write"):
            writer.resume([])
        with pytest.raises(ValueError, match="before the unit before it was finished"):
            writer.write_piece(second, TENSORS[second].reshape(-1))
