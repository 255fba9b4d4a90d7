"""Parts of a model, each on a disk of its own, become the folder that one process writes."""

import json
import re
import shutil
import zlib

import numpy as np
import pytest
from threaded import together

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.plan import units_of
from recall_jax.engine.pod.gather import gather
from recall_jax.engine.pod.part import write_part
from recall_jax.engine.pod.writer import UnitWriter
from recall_jax.errors import InputError
from recall_jax.jobs.verify import verify
from recall_jax.parallel.processes import Processes

TENSORS = {
    "model.embed_tokens.weight": np.arange(12, dtype=np.float32).reshape(4, 3),
    **{f"model.layers.{i}.weight": np.full(9, i, np.float16) for i in range(11)},
    "lm_head.weight": np.zeros((1, 4), np.float32),
}
SPECS = {name: TensorSpec(array.dtype, array.shape) for name, array in TENSORS.items()}
UNITS = units_of(SPECS)


def write(folder, processes, *, shared):
    folder.mkdir()
    with UnitWriter(folder, UNITS, SPECS, processes, shared=shared) as writer:
        for names in UNITS.values():
            for name in names:
                if writer.takes(name):
                    writer.write_piece(name, TENSORS[name].reshape(-1))
            writer.finish_unit(lambda mark: None)
    if processes.index == 0:
        (folder / "config.json").write_text('{"model_type": "toy"}')
        (folder / "additional_chat_templates").mkdir()
        (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    return writer


def write_parts(folder, count):
    parts = [folder / f"part-{index}" for index in range(count)]

    def run(processes):
        part = parts[processes.index]
        write_part(part, processes, write(part, processes, shared=False))

    together(count, run)
    return parts


def tree(folder):
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


@pytest.fixture
def parts(tmp_path):
    return write_parts(tmp_path, 3)


def edit(part, **changes):
    path = part / "part.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_parts_in_any_order_become_what_one_process_writes(parts, tmp_path):
    write(tmp_path / "alone", Processes(), shared=True)
    steps = []
    gather(
        [parts[2], parts[0], parts[1]],
        tmp_path / "out",
        progress=lambda doing, done, total, **moved: steps.append((done, total)),
    )
    joined = tree(tmp_path / "out")
    checksums = json.loads(joined.pop("checksums.json"))["files"]
    assert joined == tree(tmp_path / "alone")
    assert checksums == {
        name: {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
        for name, data in joined.items()
    }
    assert steps == [(done, len(UNITS) + 2) for done in range(len(UNITS) + 3)]
    model = Checkpoint(str(tmp_path / "out"), tmp_path / "out")
    for name, array in TENSORS.items():
        np.testing.assert_array_equal(model.read(name), array, strict=True)
    found = verify(tmp_path / "out")
    assert (found.kind, found.faults, found.files) == ("model", (), len(joined))
    with pytest.raises(InputError, match="exists: choose another folder or pass --force"):
        gather(parts, tmp_path / "out")
    gather(parts, tmp_path / "out", force=True)
    with pytest.raises(InputError, match="holds the input"):
        gather(parts, parts[0], force=True)


def test_parts_that_do_not_belong_together_are_named(parts, tmp_path):
    (tmp_path / "other").mkdir()
    other = write_parts(tmp_path / "other", 3)[1]
    twin = shutil.copytree(parts[1], tmp_path / "twin")
    cases = [
        ([parts[0], other, parts[2]], f"{other} is part of a different run than {parts[0]}"),
        ([parts[0], parts[1], twin, parts[2]], f"{parts[1]} and {twin} are both part 1: name one"),
        ([parts[2], parts[0]], "part 1 of 3 (numbered from 0) not given"),
        ([parts[1]], "parts 0, 2 of 3"),
        ([parts[0], tmp_path / "nowhere"], f"{tmp_path / 'nowhere'} has no part.json"),
    ]
    for given, fault in cases:
        with pytest.raises(InputError) as caught:
            gather(given, tmp_path / "out")
        assert fault in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("harm", ["flipped", "short", "gone"])
def test_a_damaged_part_is_named_and_nothing_is_left(harm, parts, tmp_path):
    path = max(parts[1].glob("*.safetensors"))
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]) if harm == "flipped" else data[:-1])
    if harm == "gone":
        path.unlink()
    before = {entry.name for entry in tmp_path.iterdir()}
    with pytest.raises(InputError, match=path.name):
        gather(parts, tmp_path / "out")
    assert {entry.name for entry in tmp_path.iterdir()} == before
    found = verify(parts[1])
    assert found.faults and all(path.name in fault for fault in found.faults)


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"format": 2}, "is not of format 1"),
        ({"run": None}, "has no run"),
        ({"process": True}, "has no process"),
        ({"process": 3}, "there is no part 3 of 3"),
        ({"process": 10**90}, "there is no part .* of 3"),
        ({"total_size": -1}, "its model has -1 bytes"),
        ({"total_size": 10**90}, "its model has .* bytes"),
        ({"files": {"../../etc/passwd": {"bytes": 1, "crc32": "0"}}}, "is no file in the folder"),
        ({"files": {"a": {"bytes": 1}}}, "has no size and checksum"),
        ({"weight_map": {"t": "a"}}, "tensor 't' is in none of its files"),
    ],
)
def test_a_part_that_is_not_written_as_one_is_refused(changes, fault, parts, tmp_path):
    edit(parts[1], **changes)
    with pytest.raises(InputError, match=fault):
        gather(parts, tmp_path / "out")
    assert any(re.search(fault, each) for each in verify(parts[1]).faults)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("count", [10**12, 10**90])
def test_parts_that_are_not_there_are_not_counted_out(count, parts, tmp_path):
    for part in parts:
        edit(part, processes=count)
    with pytest.raises(InputError, match=r"parts 3, 4, .*, 10 and \d+ more of") as caught:
        gather(parts, tmp_path / "out")
    assert len(str(caught.value)) < 1200


def test_no_room_is_made_for_bytes_that_a_part_claims(parts, tmp_path):
    for size in (10**15, 2**70, -1):
        content = json.loads((parts[1] / "part.json").read_text())["files"]
        name = max(content)
        edit(parts[1], files={**content, name: {**content[name], "bytes": size}})
        with pytest.raises(InputError, match=f"{name} is damaged"):
            gather(parts, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_the_names_of_tensors_in_a_part_are_held_to_the_rules(parts, tmp_path):
    path = parts[1] / "part.json"
    content = json.loads(path.read_text())
    content["weight_map"]["a\x1b[2Jb"] = next(iter(content["files"]))
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"the name 'a\\x1b\[2Jb' has control characters"):
        gather(parts, tmp_path / "out")


def test_a_whole_part_is_good_and_said_to_be_one(parts):
    for index, part in enumerate(parts):
        found = verify(part)
        assert (found.kind, found.faults) == ("part", ())
        assert found.files == len(tree(part)) - 1
        assert f"part {index} of 3 of a model: recall gather joins them" in found.notes


def test_files_of_two_parts_with_one_name_are_refused(parts, tmp_path):
    config = json.loads((parts[0] / "part.json").read_text())["files"]["config.json"]
    shutil.copy(parts[0] / "config.json", parts[1])
    files = json.loads((parts[1] / "part.json").read_text())["files"]
    edit(parts[1], files={**files, "config.json": config})
    with pytest.raises(InputError, match=r"holds config\.json as another part does"):
        gather(parts, tmp_path / "out")


def test_a_tensor_of_two_parts_is_refused(parts, tmp_path):
    path = parts[1] / "part.json"
    content = json.loads(path.read_text())
    content["weight_map"]["model.embed_tokens.weight"] = next(iter(content["files"]))
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match="a tensor is in two of the parts"):
        gather(parts, tmp_path / "out")
    assert not (tmp_path / "out").exists()
