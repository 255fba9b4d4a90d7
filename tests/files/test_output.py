"""Outputs appear whole or not at all, whatever happens while they are written."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from recall_jax.errors import InputError, StorageError, UnfinishedError
from recall_jax.files import publish
from recall_jax.files.output import output_file, output_folder, work_folder


@pytest.fixture(params=["renameat2", "plain renames"])
def renames(request, monkeypatch):
    """Both ways to publish: Linux's atomic calls, and what other systems have."""
    if request.param == "plain renames":
        monkeypatch.setattr(publish, "_renameat2", lambda *_: False)
    return request.param


def tree(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# --------------------------------------------------------------------------------- folders


def test_the_folder_appears_when_the_block_ends(tmp_path, renames):
    out = tmp_path / "out"
    with output_folder(out) as hidden:
        assert hidden == tmp_path / ".out.recall-work" / "new"
        (hidden / "sub").mkdir()
        (hidden / "sub" / "a").write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"out": "", "out/sub": "", "out/sub/a": "1"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, InputError])
def test_nothing_is_left_of_a_block_that_fails(error, tmp_path):
    with pytest.raises(error), output_folder(tmp_path / "new" / "er" / "out") as hidden:
        (hidden / "a").write_text("1")
        raise error
    assert tree(tmp_path) == {}


def test_parents_are_created_and_stay(tmp_path):
    with output_folder(tmp_path / "new" / "er" / "out"):
        pass
    assert (tmp_path / "new" / "er" / "out").is_dir()


def test_parents_that_others_use_meanwhile_stay(tmp_path):
    with pytest.raises(ValueError), output_folder(tmp_path / "new" / "er" / "out"):
        (tmp_path / "new" / "theirs").write_text("1")
        raise ValueError
    assert tree(tmp_path) == {"new": "", "new/theirs": "1"}


def test_an_existing_folder_is_refused_before_anything_is_done(tmp_path):
    (tmp_path / "out").mkdir()
    with (
        pytest.raises(InputError, match=r"out exists: choose another folder or pass --force"),
        output_folder(tmp_path / "out"),
    ):
        pytest.fail("the block ran")
    assert tree(tmp_path) == {"out": ""}


def test_force_replaces_the_folder_and_what_was_in_it(tmp_path, renames):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with output_folder(out, force=True) as hidden:
        (hidden / "new").write_text("2")
        assert tree(out) == {"old": "1"}
    assert tree(tmp_path) == {"out": "", "out/new": "2"}


def test_force_keeps_the_old_folder_when_the_block_fails(tmp_path, renames):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with pytest.raises(KeyboardInterrupt), output_folder(out, force=True) as hidden:
        (hidden / "new").write_text("2")
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out": "", "out/old": "1"}


def test_force_on_a_new_folder_just_creates_it(tmp_path, renames):
    with output_folder(tmp_path / "out", force=True):
        pass
    assert tree(tmp_path) == {"out": ""}


@pytest.mark.parametrize("content", [{}, {"theirs": "1"}])
def test_a_folder_that_appears_meanwhile_is_not_overwritten(content, tmp_path, renames):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="has appeared meanwhile"), output_folder(out):
        out.mkdir()
        for name, text in content.items():
            (out / name).write_text(text)
    assert tree(out) == content
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("force", [False, True])
def test_a_file_in_the_way_is_refused(force, tmp_path):
    (tmp_path / "out").write_text("1")
    with (
        pytest.raises(InputError, match="out is not a folder"),
        output_folder(tmp_path / "out", force=force),
    ):
        pytest.fail("the block ran")
    assert tree(tmp_path) == {"out": "1"}


@pytest.mark.parametrize("place", [".", "model", "deep/er/model"])
def test_an_output_that_would_destroy_an_input_is_refused(place, tmp_path):
    out = tmp_path / "out"
    source = out / place
    source.mkdir(parents=True)
    (tmp_path / "link").symlink_to(source)
    for given in (source, tmp_path / "link", tmp_path / "out" / ".." / "out" / place):
        with (
            pytest.raises(InputError, match="holds the input"),
            output_folder(out, force=True, inputs=[tmp_path, given]),
        ):
            pytest.fail("the block ran")
    assert source.is_dir()


def test_an_output_inside_an_input_is_harmless(tmp_path):
    with output_folder(tmp_path / "model" / "out", inputs=[tmp_path / "model"]):
        pass
    assert (tmp_path / "model" / "out").is_dir()


def test_the_current_folder_is_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "out" / "sub").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "out" / "sub")
    for out in (Path("."), Path(".."), tmp_path / "out"):
        with (
            pytest.raises(InputError, match="holds the current folder"),
            output_folder(out, force=True),
        ):
            pytest.fail("the block ran")


def test_a_link_is_followed(tmp_path, renames):
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "out")
    with output_folder(tmp_path / "link", force=True) as hidden:
        (hidden / "a").write_text("1")
        assert hidden.parent == tmp_path / "disk" / ".out.recall-work"
    assert tree(tmp_path / "disk") == {"out": "", "out/a": "1"}
    assert (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("use", [output_folder, output_file])
@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/out", "/", "x" * 300])
def test_a_place_that_cannot_be_written_is_the_users_error(use, place, tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(InputError) as caught, use(tmp_path / place):
        pytest.fail("the block ran")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file": "1"}


@pytest.mark.skipif(os.geteuid() == 0, reason="permissions do not bind root")
def test_a_read_only_parent_is_the_users_error(tmp_path):
    tmp_path.chmod(0o500)
    with (
        pytest.raises(InputError, match=r"cannot write .*Permission denied"),
        output_folder(tmp_path / "out"),
    ):
        pytest.fail("the block ran")


@pytest.mark.skipif(sys.platform != "linux", reason="needs renameat2")
def test_readers_find_the_folder_at_every_moment(tmp_path):
    out = tmp_path / "out"

    def publish(version: int) -> None:
        with output_folder(out, force=True) as hidden:
            (hidden / "a").write_text(str(version))

    publish(0)
    done, misses, looks = threading.Event(), 0, 0

    def look() -> None:
        nonlocal misses, looks
        while not done.is_set():
            misses += not out.is_dir()
            looks += 1

    reader = threading.Thread(target=look)
    reader.start()
    for version in range(1, 60):
        publish(version)
    done.set()
    reader.join()
    assert looks > 60
    assert misses == 0


BLOCKED = """
import sys, time
from pathlib import Path
from recall_jax.files.output import output_file, output_folder, work_folder
use = {"folder": output_folder, "file": output_file}[sys.argv[1]]
with use(Path(sys.argv[2]), force=True) as hidden:
    (hidden / "a" if sys.argv[1] == "folder" else hidden).write_text("half")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_the_old_output_whole(kind, number, tmp_path):
    out = tmp_path / "out"
    if kind == "folder":
        out.mkdir()
        (out / "a").write_text("old")
    else:
        out.write_text("old")
    before = tree(tmp_path)
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED, kind, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        process.wait()
    after = tree(tmp_path)
    assert before.items() <= after.items()
    if number == signal.SIGINT:
        assert after == before
    else:
        assert all(name.startswith(".out.recall-") for name in after.keys() - before.keys())


# -------------------------------------------------------------------------------- long work


def leave_unfinished(out: Path, error: BaseException, journal: str = "one\n") -> BaseException:
    """Work that fails with `error` after a file and a journal were written."""
    with pytest.raises(type(error)) as caught, work_folder(out) as work:
        (work.folder / "a").write_text("1")
        work.journal.write_text(journal)
        raise error
    return caught.value


STOPS = [
    StorageError("full"),
    UnfinishedError("too little memory"),
    KeyboardInterrupt(),
    SystemExit(143),
    MemoryError(),
    RuntimeError("a fault of ours"),
]
KEPT = {
    ".out.recall-work": "",
    ".out.recall-work/out": "",
    ".out.recall-work/out/a": "1",
    ".out.recall-work/journal.jsonl": "one\n",
    ".out.recall-work/lock": f"{os.getpid()}\n",
}


def test_a_work_folder_appears_when_the_block_ends(tmp_path, renames):
    out = tmp_path / "new" / "out"
    with work_folder(out) as work:
        assert work.journal == out.parent / ".out.recall-work" / "journal.jsonl"
        (work.folder / "sub").mkdir()
        (work.folder / "sub" / "a").write_text("1")
        work.journal.write_text("one\n")
        assert not out.exists()
    assert tree(tmp_path) == {"new": "", "new/out": "", "new/out/sub": "", "new/out/sub/a": "1"}
    plain = tmp_path / "plain"
    plain.mkdir()
    assert out.stat().st_mode == plain.stat().st_mode


def test_force_replaces_by_a_work_folder(tmp_path, renames):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("1")
    with work_folder(out, force=True) as work:
        (work.folder / "new").write_text("2")
        assert tree(out) == {"old": "1"}
    assert tree(tmp_path) == {"out": "", "out/new": "2"}


@pytest.mark.parametrize("error", STOPS, ids=lambda error: type(error).__name__)
def test_all_but_a_wrong_input_keeps_the_work_and_says_so(error, tmp_path):
    caught = leave_unfinished(tmp_path / "out", error)
    assert tree(tmp_path) == KEPT
    (note,) = caught.__notes__
    assert note.startswith("what is done is kept: ") and "--resume" in note
    assert ("fix the cause" in note) == isinstance(error, Exception)


@pytest.mark.parametrize("error", STOPS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("journal", ["", None])
def test_nothing_is_kept_without_a_journal(error, journal, tmp_path):
    with pytest.raises(type(error)) as caught, work_folder(tmp_path / "new" / "out") as work:
        (work.folder / "a").write_text("1")
        if journal is not None:
            work.journal.write_text(journal)
        raise type(error)(*error.args)
    assert not hasattr(caught.value, "__notes__")
    assert tree(tmp_path) == {}


def test_a_wrong_input_removes_the_work(tmp_path):
    caught = leave_unfinished(tmp_path / "new" / "er" / "out", InputError("bad"))
    assert not hasattr(caught, "__notes__")
    assert tree(tmp_path) == {}


def test_an_error_while_resuming_removes_the_work_too(tmp_path):
    leave_unfinished(tmp_path / "out", KeyboardInterrupt())
    with pytest.raises(InputError), work_folder(tmp_path / "out", resume=True):
        raise InputError
    assert tree(tmp_path) == {}


def test_resume_takes_up_what_was_left(tmp_path):
    out = tmp_path / "out"
    leave_unfinished(out, KeyboardInterrupt())
    with work_folder(out, resume=True) as work:
        assert tree(work.folder) == {"a": "1"}
        assert work.journal.read_text() == "one\n"
        (work.folder / "b").write_text("2")
    assert tree(tmp_path) == {"out": "", "out/a": "1", "out/b": "2"}


@pytest.mark.parametrize(
    ("resume", "journal"), [(False, "one\n"), (True, ""), (True, None)], ids=str
)
def test_what_is_not_to_be_resumed_is_removed_first(resume, journal, tmp_path):
    home = tmp_path / ".out.recall-work"
    (home / "out" / "sub").mkdir(parents=True)
    (home / "out" / "a").write_text("half")
    (home / "journal.new").write_text("half")
    (home / "link").symlink_to(tmp_path)
    if journal is not None:
        (home / "journal.jsonl").write_text(journal)
    with work_folder(tmp_path / "out", resume=resume) as work:
        assert tree(home) == {"out": "", "lock": f"{os.getpid()}\n"}
        assert work.folder.is_dir()
    assert tree(tmp_path) == {"out": ""}


@pytest.mark.parametrize("resume", [False, True])
def test_a_refusal_leaves_kept_work_alone(resume, tmp_path):
    out = tmp_path / "out"
    leave_unfinished(out, KeyboardInterrupt())
    out.mkdir()
    with pytest.raises(InputError, match="out exists"), work_folder(out, resume=resume):
        pytest.fail("the block ran")
    (out / "model").mkdir()
    with (
        pytest.raises(InputError, match="holds the input"),
        work_folder(out, resume=resume, force=True, inputs=[out / "model"]),
    ):
        pytest.fail("the block ran")
    assert {name: text for name, text in tree(tmp_path).items() if name.startswith(".")} == KEPT


@pytest.mark.parametrize("place", ["file/out", "file/deep/out", "/proc/out", "/", "x" * 300])
def test_work_that_cannot_be_written_is_the_users_error(place, tmp_path):
    (tmp_path / "file").write_text("1")
    with pytest.raises(InputError) as caught, work_folder(tmp_path / place):
        pytest.fail("the block ran")
    assert "\n" not in str(caught.value)
    assert tree(tmp_path) == {"file": "1"}


def test_a_link_in_the_place_of_the_work_is_not_followed(tmp_path):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "a").write_text("1")
    (tmp_path / ".out.recall-work").symlink_to(tmp_path / "theirs")
    with pytest.raises(InputError, match="is a link"), work_folder(tmp_path / "out"):
        pytest.fail("the block ran")
    assert tree(tmp_path / "theirs") == {"a": "1"}


def test_a_folder_that_appears_meanwhile_is_not_overwritten_by_work(tmp_path, renames):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="has appeared meanwhile"), work_folder(out):
        out.mkdir()
        (out / "theirs").write_text("1")
    assert tree(tmp_path) == {"out": "", "out/theirs": "1"}


WORKING = """
import os, sys, time
from pathlib import Path
from recall_jax.files import output
from recall_jax.files.output import work_folder
moment, out = sys.argv[1], Path(sys.argv[2])
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
if moment == "published":
    output._drop = wait
with work_folder(out, force=True) as work:
    (work.folder / "a").write_text("1")
    work.journal.write_text("one\\n")
    if moment == "writing":
        wait()
"""


@contextmanager
def working(moment: str, out: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has come to `moment` of its work and waits there."""
    process = subprocess.Popen(
        [sys.executable, "-c", WORKING, moment, str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "ready\n"
        try:
            yield process
        finally:
            process.kill()
            process.wait()


@pytest.mark.parametrize("resume", [False, True])
def test_two_at_once_are_told_apart_and_the_first_is_not_disturbed(resume, tmp_path):
    out = tmp_path / "out"
    with working("writing", out) as process:
        before = tree(tmp_path)
        words = rf"another run is writing .*out \(process {process.pid}\): wait for it"
        with pytest.raises(InputError, match=words), work_folder(out, resume=resume):
            pytest.fail("the block ran")
        assert tree(tmp_path) == before == KEPT | {".out.recall-work/lock": f"{process.pid}\n"}
        with work_folder(tmp_path / "other"):
            pass
    with work_folder(out, resume=resume) as work:
        assert tree(work.folder) == ({"a": "1"} if resume else {})
    assert (out / "a").exists() == resume


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_leaves_its_work_and_frees_the_lock(number, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "old").write_text("0")
    with working("writing", out) as process:
        process.send_signal(number)
        process.wait()
    assert tree(out) == {"old": "0"}
    with work_folder(out, force=True, resume=True) as work:
        assert work.journal.read_text() == "one\n"
    assert tree(tmp_path) == {"out": "", "out/a": "1"}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("call", ["refused", "resumed", "fresh"])
def test_a_kill_between_publishing_and_removing_is_harmless(old, call, tmp_path):
    out = tmp_path / "out"
    if old:
        out.mkdir()
        (out / "old").write_text("0")
    with working("published", out):
        pass
    assert tree(out) == {"a": "1"}
    assert (tmp_path / ".out.recall-work").is_dir()
    if call == "refused":
        with pytest.raises(InputError, match="out exists"), work_folder(out):
            pytest.fail("the block ran")
        assert tree(out) == {"a": "1"}
    else:
        with work_folder(out, force=True, resume=call == "resumed") as work:
            assert tree(work.folder) == {}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_system_without_locks_is_worked_on_all_the_same(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", unsupported)
    with work_folder(tmp_path / "out") as work:
        (work.folder / "a").write_text("1")
    assert tree(tmp_path) == {"out": "", "out/a": "1"}


def test_many_processes_at_once_give_one_output_at_a_time(tmp_path):
    code = """
import sys
from pathlib import Path
from recall_jax.errors import InputError
from recall_jax.files.output import work_folder
done = 0
while done < 20:
    try:
        with work_folder(Path(sys.argv[1]), force=True) as work:
            for name in "abc":
                (work.folder / name).write_text(sys.argv[2])
            assert len({(work.folder / name).read_text() for name in "abc"}) == 1
            assert len(list(work.folder.iterdir())) == 3
        done += 1
    except InputError as error:
        assert "another run is writing" in str(error), error
"""
    processes = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), str(number)])
        for number in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert len(set(tree(tmp_path / "out").values())) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.fixture
def small_disk(disk):
    """A file system of 64 KiB."""
    return disk("size=64k")


@pytest.mark.parametrize("use", [work_folder, output_folder, output_file])
def test_a_full_disk_is_the_storages_fault_and_leaves_nothing(use, disk, small_disk):
    disk("nr_inodes=2")
    (small_disk / "last").touch()
    with (
        pytest.raises(StorageError, match=r"cannot write .*No space left"),
        use(small_disk / "out"),
    ):
        pytest.fail("the block ran")
    assert tree(small_disk) == {"last": ""}


def test_a_read_only_disk_is_the_storages_fault(disk, small_disk):
    disk("ro")
    with (
        pytest.raises(StorageError, match=r"cannot write .*Read-only"),
        work_folder(small_disk / "out"),
    ):
        pytest.fail("the block ran")
    assert tree(small_disk) == {}


# ----------------------------------------------------------------------------------- files


def test_a_file_appears_when_the_block_ends(tmp_path, renames):
    out = tmp_path / "new" / "reps.npz"
    with output_file(out) as hidden:
        assert hidden.suffix == ".npz"
        hidden.write_text("1")
        assert not out.exists()
    assert tree(tmp_path) == {"new": "", "new/reps.npz": "1"}
    (tmp_path / "plain").touch()
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_a_file_that_fails(error, tmp_path):
    with pytest.raises(error), output_file(tmp_path / "new" / "out.json") as hidden:
        hidden.write_text("1")
        raise error
    assert tree(tmp_path) == {}


def test_an_existing_file_is_kept_without_force_and_replaced_with_it(tmp_path):
    out = tmp_path / "out.json"
    out.write_text("old")
    with pytest.raises(InputError, match=r"out\.json exists"), output_file(out):
        pytest.fail("the block ran")
    assert tree(tmp_path) == {"out.json": "old"}
    with output_file(out, force=True) as hidden:
        hidden.write_text("new")
        assert out.read_text() == "old"
    assert tree(tmp_path) == {"out.json": "new"}


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path, renames):
    out = tmp_path / "out.json"
    with pytest.raises(InputError, match="has appeared meanwhile"), output_file(out) as hidden:
        hidden.write_text("ours")
        out.write_text("theirs")
    assert tree(tmp_path) == {"out.json": "theirs"}


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_or_device_is_no_output_file(force, tmp_path):
    for out in (tmp_path, Path("/dev/null")):
        with pytest.raises(InputError, match="not a regular file"), output_file(out, force=force):
            pytest.fail("the block ran")
