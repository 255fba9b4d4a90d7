"""What an interrupted merge has done is kept until it ends well, or is found to be of no use."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from toys import TIMED, Finished, copy_model, environment, tree

from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.files.identity import FileIdentity
from recall_jax.jobs import merge as job
from recall_jax.jobs.verify import verify
from recall_jax.recipes.recipe import read_recipe

RECALL = str(Path(sys.executable).with_name("recall"))
HOME = ".out.recall-work"
SHARDS = ["--shard-size", "20KB"]


@dataclass(frozen=True)
class Kept:
    """A RECALL merge that was stopped: its inputs, what it left, and what it would have come to."""

    folder: Path
    whole: dict[str, bytes | None]

    @property
    def recipe(self) -> Path:
        return self.folder / "recipe.yml"

    @property
    def finished(self) -> int:
        """Units that were written when it was stopped, which one thread does behind another."""
        journal = self.folder / HOME / "journal.jsonl"
        return sum('"crc32"' in line for line in journal.read_text().splitlines())

    def left_in(self, folder: Path) -> Path:
        """The work as it was left, for an OUT in `folder`."""
        return Path(shutil.copytree(self.folder / HOME, folder / HOME))


def stop(recipe: Path, out: Path, before: str) -> None:
    """Interrupt a merge when all but the last pieces before a unit are written."""

    def interrupt(unit: str, done: int, total: int, **moved: int) -> None:
        if unit == before:
            raise KeyboardInterrupt

    options = job.MergeOptions(shard_bytes=20_000, resume=True)
    with pytest.raises(KeyboardInterrupt):
        job.merge(read_recipe(recipe), out, options=options, progress=interrupt)


@pytest.fixture(scope="module")
def kept(toys, tmp_path_factory) -> Kept:
    folder = tmp_path_factory.mktemp("kept")
    for k, source in enumerate(toys.qwen2):
        shutil.copytree(source, folder / str(k))
    (folder / "2" / "additional_chat_templates").mkdir()
    (folder / "2" / "additional_chat_templates" / "short.jinja").write_text("{{ messages }}")
    shutil.copy(toys.data, folder / "data.jsonl")
    values = {
        "merge_method": "recall",
        "models": [{"model": str(folder / str(k))} for k in range(3)],
        "samples": {"data": str(folder / "data.jsonl"), "count": 5},
    }
    (folder / "recipe.yml").write_text(json.dumps(values))
    recipe = read_recipe(folder / "recipe.yml")
    job.merge(recipe, folder / "whole" / "out", options=job.MergeOptions(shard_bytes=20_000))
    stop(folder / "recipe.yml", folder / "out", before="head")
    assert len(list((folder / HOME / "out").glob("*.safetensors"))) > 2
    return Kept(folder, untimed(folder / "whole" / "out"))


def untimed(out: Path) -> dict[str, bytes | None]:
    return {name: content for name, content in tree(out).items() if name not in TIMED}


def resumed_units(out: Path) -> int:
    return json.loads((out / "recall_report.json").read_text())["resumed_units"]


def assert_refused(done, *words: str) -> None:
    assert (done.status, done.out) == (2, ""), done
    assert done.err.startswith("recall: ") and done.err.count("\n") == 1
    for word in words:
        assert word in done.err


# ---------------------------------------------------------------------------- not the same merge


@contextmanager
def replaced(path: Path, content: bytes, *, same_time: bool = False) -> Iterator[None]:
    """`path` with other content, and then as it was, its time included."""
    before, status = path.read_bytes(), path.stat()
    times = status.st_atime_ns, status.st_mtime_ns
    path.write_bytes(content)
    if same_time:
        os.utime(path, ns=times)
    try:
        yield
    finally:
        path.write_bytes(before)
        os.utime(path, ns=times)


def with_longer_header(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    return (size + 8).to_bytes(8, "little") + content[8 : 8 + size] + b" " * 8 + content[8 + size :]


WEIGHTS = "1/model.safetensors"


@pytest.mark.parametrize(
    ("name", "change", "same_time"),
    [
        (WEIGHTS, lambda content: content[:-1] + bytes([content[-1] ^ 1]), True),
        (WEIGHTS, with_longer_header, True),
        (WEIGHTS, lambda content: content.replace(b'"format":"pt"', b'"format":"np"'), True),
        ("2/config.json", lambda content: content.replace(b"{", b'{"_note": 1,', 1), False),
        ("2/tokenizer.json", lambda content: content + b"\n", False),
        ("data.jsonl", lambda content: content.replace(b"a", b"b", 1), False),
        ("data.jsonl", lambda content: content + b'{"text": "one more"}\n', True),
    ],
)
def test_a_changed_input_is_refused_and_the_work_stays(
    name, change: Callable[[bytes], bytes], same_time, kept, recall, tmp_path
):
    home = kept.left_in(tmp_path)
    before, path = tree(home), kept.folder / name
    content = change(path.read_bytes())
    assert not same_time or content != path.read_bytes()
    with replaced(path, content, same_time=same_time):
        done = recall("merge", kept.recipe, tmp_path / "out", "--resume", *SHARDS)
    assert_refused(done, f"{path} is not what it was", "without --resume to start afresh")
    assert os.listdir(tmp_path) == [HOME] and tree(home) == before
    assert_resumed(kept, recall, tmp_path)


def touch(path: Path) -> None:
    path.touch()


def come_back(path: Path) -> None:
    """As after a restored backup: another file with the same content, times included."""
    shutil.copy2(path, path.with_name("copy"))
    path.with_name("copy").replace(path)


def be_linked(path: Path) -> None:
    """Which changes the ctime alone."""
    path.with_name("link").hardlink_to(path)
    path.with_name("link").unlink()


@pytest.mark.parametrize("change", [touch, come_back, be_linked])
@pytest.mark.parametrize("name", [WEIGHTS, "2/config.json", "2/tokenizer.json", "data.jsonl"])
def test_an_input_with_its_old_content_is_the_same(name, change, kept, recall, tmp_path):
    kept.left_in(tmp_path)
    identity = FileIdentity.of(kept.folder / name)
    change(kept.folder / name)
    assert FileIdentity.of(kept.folder / name) != identity
    assert assert_resumed(kept, recall, tmp_path) == kept.finished > 0


@pytest.mark.parametrize("change", [touch, come_back, be_linked])
def test_an_input_may_be_touched_while_it_is_merged(change, kept, tmp_path):
    def touched(unit: str, done: int, total: int, **moved: int) -> None:
        if done == 2:
            change(kept.folder / WEIGHTS)

    options = job.MergeOptions(shard_bytes=20_000)
    job.merge(read_recipe(kept.recipe), tmp_path / "out", options=options, progress=touched)
    assert untimed(tmp_path / "out") == kept.whole


def test_an_input_may_not_be_changed_while_it_is_merged(kept, tmp_path):
    """Whatever its time says."""
    path = kept.folder / WEIGHTS
    before, status = path.read_bytes(), path.stat()

    def changed(unit: str, done: int, total: int, **moved: int) -> None:
        if done == 2:
            with path.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(bytes([before[-1] ^ 1]))
            os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    with pytest.raises(InputError, match=f"{path} was changed while it was being"):
        job.merge(read_recipe(kept.recipe), tmp_path / "out", progress=changed)
    path.write_bytes(before)
    assert os.listdir(tmp_path) == []


def values_with(change: str, values: dict) -> dict:
    models, samples = values["models"], values["samples"]
    return {
        "samples.count": values | {"samples": samples | {"count": 6}},
        "samples.seed": values | {"samples": samples | {"seed": 1}},
        "parameters.sigma": values | {"parameters": {"sigma": 2.5}},
        "models": values | {"models": models[::-1]},
        "out_dtype": values | {"out_dtype": "float32"},
    }[change]


@pytest.mark.parametrize(
    "change", ["samples.count", "samples.seed", "parameters.sigma", "models", "out_dtype"]
)
def test_another_recipe_is_refused_and_the_work_stays(change, kept, recall, tmp_path):
    home = kept.left_in(tmp_path)
    before = tree(home)
    recipe = json.dumps(values_with(change, json.loads(kept.recipe.read_text()))).encode()
    with replaced(kept.recipe, recipe):
        done = recall("merge", kept.recipe, tmp_path / "out", "--resume", *SHARDS)
    assert_refused(done, f"another {change}", "without --resume to start afresh")
    assert os.listdir(tmp_path) == [HOME] and tree(home) == before
    assert_resumed(kept, recall, tmp_path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--shard-size", "30KB"], "another shard_size"),
        ([*SHARDS, "--compute-dtype", "bfloat16"], "another compute_dtype"),
        ([*SHARDS, "--memory", "1MiB"], "allow more (--memory)"),
    ],
)
def test_other_options_are_refused_and_the_work_stays(options, words, kept, recall, tmp_path):
    home = kept.left_in(tmp_path)
    before = tree(home / "out")
    done = recall("merge", kept.recipe, tmp_path / "out", "--resume", *options)
    assert_refused(done, words)
    assert os.listdir(tmp_path) == [HOME] and tree(home / "out") == before
    assert_resumed(kept, recall, tmp_path)


def assert_resumed(kept: Kept, recall, folder: Path) -> int:
    """Resume, and compare with what nobody has interrupted; how many units were taken over."""
    done = recall("merge", kept.recipe, folder / "out", "--resume", *SHARDS)
    assert (done.status, "Traceback" in done.err) == (0, False), done
    assert untimed(folder / "out") == kept.whole
    assert verify(folder / "out").faults == ()
    assert os.listdir(folder) == ["out"]
    return resumed_units(folder / "out")


# ----------------------------------------------------------------------------------- damaged work


@pytest.mark.parametrize("unit", [0, 1, -1])
@pytest.mark.parametrize("place", ["header", "end"])
def test_a_flipped_bit_is_noticed_and_redone_from_there(unit, place, kept, recall, tmp_path):
    home = kept.left_in(tmp_path)
    marks = [json.loads(line) for line in (home / "journal.jsonl").read_text().splitlines()[2:]]
    path = home / "out" / marks[unit]["file"]
    content = bytearray(path.read_bytes())
    content[50 if place == "header" else marks[unit]["size"] - 1] ^= 4
    path.write_bytes(content)
    expected = unit % len(marks)  # a unit may begin in the shard before
    if place == "header":
        expected = min(n for n, mark in enumerate(marks) if mark["file"] == path.name)
    assert assert_resumed(kept, recall, tmp_path) == expected


@pytest.mark.parametrize("line", [0, 1, 2, -1])
def test_a_journal_cut_in_a_line_is_as_if_it_had_ended_before(line, kept, recall, tmp_path):
    journal = kept.left_in(tmp_path) / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    place = line % len(lines)
    journal.write_bytes(b"".join(lines[:place]) + lines[place][: len(lines[place]) // 2])
    assert assert_resumed(kept, recall, tmp_path) == max(place - 2, 0)


def test_after_a_cut_in_its_first_line_a_journal_is_kept_again(kept, recall, tmp_path):
    journal = kept.left_in(tmp_path) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:100])
    stop(kept.recipe, tmp_path / "out", before="head")
    assert assert_resumed(kept, recall, tmp_path) >= 2


def test_a_journal_that_cannot_be_read_takes_its_shards_with_it(kept, recall, tmp_path):
    """Else shards of another size would be published beside the new ones."""
    journal = kept.left_in(tmp_path) / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:100])
    done = recall("merge", kept.recipe, tmp_path / "out", "--resume")
    assert done.status == 0, done.err
    assert [path.name for path in (tmp_path / "out").glob("*.safetensors")] == ["model.safetensors"]


def test_without_resume_it_is_said_that_work_is_discarded(kept, recall, tmp_path):
    kept.left_in(tmp_path)
    done = recall("merge", kept.recipe, tmp_path / "out", *SHARDS)
    assert done.status == 0 and "--resume would have gone on with it" in done.out
    assert untimed(tmp_path / "out") == kept.whole


def test_an_out_that_has_appeared_costs_nothing(kept, recall, tmp_path):
    out = tmp_path / "out"

    def appear(unit: str, done: int, total: int, **moved: int) -> None:
        if unit == "head":
            out.mkdir()

    options = job.MergeOptions(shard_bytes=20_000)
    with pytest.raises(UnfinishedError, match="has appeared meanwhile"):
        job.merge(read_recipe(kept.recipe), out, options=options, progress=appear)
    out.rmdir()
    done = recall("merge", kept.recipe, out, "--resume", *SHARDS)
    assert done.status == 0, done.err
    assert resumed_units(out) == 5
    assert untimed(out) == kept.whole


def test_another_tokenizer_of_the_reference_is_refused(toys, recall, tmp_path):
    models = [copy_model(source, tmp_path / str(k)) for k, source in enumerate(toys.llama)]
    values = {
        "merge_method": "recall",
        "models": [{"model": str(model)} for model in models],
        "parameters": {"reference": 0},
        "samples": {"data": toys.data, "count": 5},
    }
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(values))
    stop(recipe, tmp_path / "out", before="head")
    path = models[0] / "tokenizer.json"
    text = path.read_text()
    first, second = ('"a":', '"b":')
    swapped = text.replace(first, '"\0":').replace(second, first).replace('"\0":', second)
    assert swapped != text
    path.write_text(swapped)
    done = recall("merge", recipe, tmp_path / "out", "--resume", *SHARDS)
    assert_refused(done, "the tokenizer of", "without --resume to start afresh")
    assert (tmp_path / HOME / "journal.jsonl").exists()


def test_a_missing_shard_is_redone(kept, recall, tmp_path):
    home = kept.left_in(tmp_path)
    sorted((home / "out").glob("*.safetensors"))[1].unlink()
    assert assert_resumed(kept, recall, tmp_path) == 1


# ---------------------------------------------------------------------------------- user's errors


def test_a_nan_in_the_last_tensor_removes_the_kept_work(toys, recall, tmp_path):
    models = [copy_model(source, tmp_path / str(k)) for k, source in enumerate(toys.qwen2)]
    file = SafetensorsFile(models[1] / "model.safetensors")
    last = list(file.specs)[-1]
    with file.path.open("r+b") as raw:
        raw.seek(-2, os.SEEK_END)
        raw.write(b"\xc0\x7f")
    recipe = tmp_path / "recipe.yml"
    values = {"merge_method": "average", "models": [{"model": str(model)} for model in models]}
    recipe.write_text(json.dumps(values))
    stop(recipe, tmp_path / "out", before="layers.2")
    assert (tmp_path / HOME / "journal.jsonl").exists()
    done = recall("merge", recipe, tmp_path / "out", "--resume", *SHARDS)
    assert_refused(done, last, str(models[1]))
    assert sorted(os.listdir(tmp_path)) == ["0", "1", "2", "recipe.yml"]


# ------------------------------------------------------------------------------ disks that refuse


def test_a_disk_that_fills_up_anywhere_is_one_line_and_loses_nothing(kept, disk, recall, tmp_path):
    """From a disk that has room for nothing to one that has room for all, block by block."""
    block, taken_over = 2 * os.sysconf("SC_PAGE_SIZE"), []
    for blocks in range(1, 1000):
        folder = disk(f"size={blocks * block}")
        done = recall("merge", kept.recipe, folder / "out", *SHARDS)
        if done.status == 0:
            break
        assert_refused(done, "No space left on device")
        assert ("--resume" in done.err) == (folder / HOME).exists()
        assert os.listdir(folder) in ([], [HOME])
        disk("size=10m")
        taken_over.append(assert_resumed(kept, recall, folder))
        shutil.rmtree(folder / "out")
    assert taken_over == sorted(taken_over)  # what is done stays done, to the last file
    assert taken_over[0] == 0 and taken_over[-1] == 5


def test_a_read_only_disk_is_one_line(kept, disk, recall):
    folder = disk("ro,size=10m")
    for options in ([], ["--resume"], ["--force"]):
        done = recall("merge", kept.recipe, folder / "out", *SHARDS, *options)
        assert_refused(done, f"cannot write {folder / 'out'}: Read-only file system")
    assert os.listdir(folder) == []


def test_a_disk_that_has_become_read_only_keeps_the_work(kept, disk, recall):
    folder = disk("size=10m")
    before = tree(kept.left_in(folder))
    disk("ro")
    for options in ([], ["--resume"]):
        done = recall("merge", kept.recipe, folder / "out", *SHARDS, *options)
        assert_refused(done, f"cannot write {folder / 'out'}: Read-only file system")
    assert tree(folder / HOME) == before
    disk("rw")
    assert assert_resumed(kept, recall, folder) >= 2


# ----------------------------------------------------------------------------------- two at once

# The command line, told to wait for a word when some of the units are merged.
WAITING = """
import sys
from recall_jax.jobs import merge as job
from recall_jax.cli.main import main

merge = job.merge

def wait(unit, done, total, **moved):
    if done == 3:
        print("half", flush=True)
        sys.stdin.readline()

job.merge = lambda *arguments, **options: merge(*arguments, **options | {"progress": wait})
main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def average(toys, tmp_path_factory) -> Kept:
    """A merge without samples, quick to start."""
    folder = tmp_path_factory.mktemp("average")
    models = [{"model": model} for model in toys.qwen2]
    recipe = folder / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "average", "models": models}))
    options = job.MergeOptions(shard_bytes=20_000)
    job.merge(read_recipe(recipe), folder / "whole" / "out", options=options)
    return Kept(folder, untimed(folder / "whole" / "out"))


def start(command: list[object], cache: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*map(str, command), *SHARDS],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
    )


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_while_a_merge_works_no_other_touches_its_out(
    force, average, toys, recall, cache, tmp_path
):
    out, old = tmp_path / "out", {}
    if force:
        shutil.copytree(toys.llama[0], out)
        old = tree(out)
    first = start([sys.executable, "-c", WAITING, "merge", average.recipe, out, *force], cache)
    try:
        assert first.stdout.readline() == "half\n", first.communicate()
        for options in ([], ["--resume"]):
            done = recall("merge", average.recipe, out, *SHARDS, *force, *options)
            assert_refused(done, f"another run is writing {out} (process {first.pid})")
            assert tree(out) == old
        _, err = first.communicate("on\n", timeout=120)
    finally:
        first.kill()
    assert (first.returncode, err) == (0, "")
    assert untimed(out) == average.whole
    assert verify(out).faults == ()
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("options", [[], ["--force"], ["--resume"]])
def test_of_two_that_start_together_one_finishes(options, average, cache, tmp_path):
    out = tmp_path / "out"
    command = [RECALL, "merge", average.recipe, out, *options]
    processes = [start(command, cache) for _ in range(2)]
    ends = [process.communicate(timeout=120) for process in processes]
    statuses = sorted(process.returncode for process in processes)
    assert statuses == [0, 2] or (options == ["--force"] and statuses == [0, 0]), ends
    for process, (said, err) in zip(processes, ends, strict=True):
        if process.returncode:
            assert_refused(Finished(process.returncode, said, err), str(out))
        else:
            assert err == ""
    assert untimed(out) == average.whole
    assert verify(out).faults == ()
    assert os.listdir(tmp_path) == ["out"]
