"""What a kill leaves beside an output is swept by whoever comes next; signals wait for clean-up."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toys import tree

from recall_jax.errors import InputError, StorageError
from recall_jax.files import publish
from recall_jax.files.interruption import STOPPING, uninterrupted
from recall_jax.files.output import output_file, output_folder, work_folder

USES = [output_folder, output_file, work_folder]
LONG = ["x" * 255, "é" * 127, "x" * 243]


def fill(use, place, text: str = "1") -> None:
    """Write something into what a `use` has yielded."""
    if use is output_file:
        place.write_text(text)
    else:
        (place if use is output_folder else place.folder).joinpath("a").write_text(text)


def content(out: Path) -> str:
    return (out if out.is_file() else out / "a").read_text()


STOPPED = """
import os, signal, sys
from pathlib import Path
from recall_jax.files import output, publish
name, moment, out = sys.argv[1], sys.argv[2], Path(sys.argv[3])

def die(*_):
    print("ready", flush=True)
    if moment == "waiting":
        sys.stdin.read()
    else:
        os.kill(os.getpid(), signal.SIGKILL)

if moment == "between two renames":
    publish._renameat2 = lambda *_: False
    rename = Path.rename
    Path.rename = lambda source, target: die() if target == out else rename(source, target)
if moment == "published":
    output.confirm = die
with getattr(output, name)(out, force=True) as place:
    if name == "output_file":
        place.write_text("new")
    else:
        (place if name == "output_folder" else place.folder).joinpath("a").write_text("new")
    if moment in ("waiting", "writing"):
        die()
"""


def stopped(use, moment: str, out: Path) -> subprocess.Popen:
    """Another process that is killed, or waits, at a moment of its work."""
    command = [sys.executable, "-c", STOPPED, use.__name__, moment, str(out)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    assert process.stdout.readline() == "ready\n"
    if moment != "waiting":
        process.communicate()
    return process


@pytest.mark.parametrize("then", USES)
@pytest.mark.parametrize("use", USES)
def test_what_a_kill_leaves_is_swept_by_the_next_run(use, then, tmp_path):
    out = tmp_path / "new" / "out"
    stopped(use, "writing", out)
    assert os.listdir(out.parent) == [".out.recall-work"]
    with then(out) as place:
        fill(then, place)
    assert os.listdir(out.parent) == ["out"]
    assert content(out) == "1"


@pytest.mark.parametrize("use", USES)
def test_a_refused_run_sweeps_as_well(use, tmp_path):
    out = tmp_path / "out"
    stopped(use, "published", out)
    assert sorted(os.listdir(tmp_path)) == [".out.recall-work", "out"]
    with pytest.raises(InputError, match="out exists"), use(out):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == ["out"]
    assert content(out) == "new"


@pytest.mark.parametrize("use", [output_folder, work_folder])
def test_a_kill_between_two_renames_loses_nothing(use, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "a").write_text("old")
    stopped(use, "between two renames", out)
    assert not out.exists()  # the one moment without, where names cannot be exchanged
    with pytest.raises(InputError, match="out exists"), use(out):
        pytest.fail("the block ran")
    assert tree(tmp_path) == {"out": None, "out/a": b"old"}


@pytest.mark.parametrize("then", USES)
@pytest.mark.parametrize("use", [output_folder, output_file])
def test_the_second_of_two_at_once_is_refused(use, then, tmp_path):
    out = tmp_path / "out"
    process = stopped(use, "waiting", out)
    try:
        before = tree(tmp_path)
        words = rf"another run is writing .*out \(process {process.pid}\): wait for it"
        with pytest.raises(InputError, match=words), then(out):
            pytest.fail("the block ran")
        assert tree(tmp_path) == before
    finally:
        process.communicate()
    assert process.returncode == 0
    assert content(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("name", LONG)
@pytest.mark.parametrize("use", USES)
def test_an_output_may_have_the_longest_name(use, name, tmp_path):
    for _ in range(2):
        with use(tmp_path / name, force=True) as place:
            fill(use, place)
            assert len(os.listdir(tmp_path)) in (1, 2)
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize("use", USES)
def test_names_that_are_long_and_alike_do_not_meet(use, tmp_path):
    with use(tmp_path / ("x" * 254 + "a")) as one, use(tmp_path / ("x" * 254 + "b")) as other:
        fill(use, one, "1")
        fill(use, other, "2")
    assert [content(tmp_path / name) for name in sorted(os.listdir(tmp_path))] == ["1", "2"]


@pytest.mark.parametrize("use", USES)
def test_a_name_that_is_too_long_is_refused_first(use, tmp_path):
    with pytest.raises(InputError, match="File name too long"), use(tmp_path / ("x" * 256)):
        pytest.fail("the block ran")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("use", [output_folder, work_folder])
def test_where_a_disk_is_mounted_nothing_can_be_renamed(use, disk):
    place = disk("size=64k")
    with pytest.raises(InputError, match="choose a folder in it"), use(place, force=True):
        pytest.fail("the block ran")
    with use(place / "out"):
        pass
    assert os.listdir(place) == ["out"]


# ---------------------------------------------------------------------------------- the disk


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("force", [False, True])
def test_a_disk_that_does_not_confirm_is_told_of_with_the_output(use, force, tmp_path, monkeypatch):
    sync, out = publish._sync, tmp_path / "new" / "out"
    if force:
        with use(out) as place:
            fill(use, place, "old")

    def fail(path):
        if path == out.parent:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        sync(path)

    monkeypatch.setattr(publish, "_sync", fail)
    words = r"out is there and complete, but the disk did not confirm it \(Input/output error\)"
    with pytest.raises(StorageError, match=words) as caught, use(out, force=force) as place:
        fill(use, place)
        if use is work_folder:
            place.journal.write_text("one\n")
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(out.parent) == ["out"]
    assert content(out) == "1"


@pytest.mark.parametrize("use", USES)
def test_a_disk_that_loses_the_bytes_leaves_no_output(use, tmp_path, monkeypatch):
    def fail(path):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(publish, "_sync", fail)
    words = r"cannot write .*Input/output error"
    with pytest.raises(StorageError, match=words), use(tmp_path / "out") as place:
        fill(use, place)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("use", USES)
def test_folders_need_not_be_synced_where_that_is_not_known(use, tmp_path, monkeypatch):
    sync = publish._sync

    def fail(path):
        if path.is_dir():
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(path)

    monkeypatch.setattr(publish, "_sync", fail)
    with use(tmp_path / "out") as place:
        fill(use, place)
    assert os.listdir(tmp_path) == ["out"]


# ---------------------------------------------------------------------- what others have left


def leave_kept(out: Path) -> None:
    with pytest.raises(KeyboardInterrupt), work_folder(out) as work:
        fill(work_folder, work, "kept")
        work.journal.write_text("one\n")
        raise KeyboardInterrupt


@pytest.mark.parametrize("use", [output_folder, output_file])
def test_kept_work_is_moot_once_the_output_is_another(use, tmp_path):
    out = tmp_path / "out"
    leave_kept(out)
    before = tree(tmp_path)
    with pytest.raises(InputError, match="refused"), use(out):
        raise InputError("refused")
    assert tree(tmp_path) == before
    with use(out) as place:
        fill(use, place)
    assert os.listdir(tmp_path) == ["out"]


def test_a_work_is_kept_for_what_a_work_within_it_has_noted(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt) as caught, work_folder(out) as work:
        leave_kept(work.folder / "deep" / "inner")
        raise KeyboardInterrupt
    assert caught.value.__notes__ == [
        "what is done is kept: run the same command with --resume to go on"
    ]
    with (
        work_folder(out, resume=True) as work,
        work_folder(work.folder / "deep" / "inner", resume=True) as inner,
    ):
        assert (inner.folder / "a").read_text() == "kept"
    assert content(out / "deep" / "inner") == "kept"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("use", [output_folder, work_folder])
def test_what_is_removed_promises_no_resume_of_a_work_within_it(use, tmp_path):
    with pytest.raises(KeyboardInterrupt) as caught, use(tmp_path / "out") as place:
        if use is work_folder:
            place.scratch.mkdir()
        with work_folder((place if use is output_folder else place.scratch) / "inner") as work:
            work.journal.write_text("one\n")
            raise KeyboardInterrupt
    assert not getattr(caught.value, "__notes__", None)
    assert os.listdir(tmp_path) == []


# ----------------------------------------------------------------------------------- signals


@pytest.fixture(params=STOPPING, ids=lambda number: number.name)
def number(request):
    """A signal that raises SystemExit, as in the command."""

    def stop(number, frame):
        raise SystemExit(128 + number)

    kept = signal.signal(request.param, stop)
    yield request.param
    signal.signal(request.param, kept)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("error", [InputError("wrong"), KeyboardInterrupt(), RuntimeError("ours")])
def test_signals_wait_until_all_is_cleared_up(use, error, number, tmp_path, monkeypatch):
    rmtree, unlink = shutil.rmtree, Path.unlink

    def interrupted(remove):
        def removing(*arguments, **options):
            os.kill(os.getpid(), number)
            remove(*arguments, **options)

        return removing

    with pytest.raises(SystemExit) as caught, use(tmp_path / "new" / "out") as place:
        fill(use, place)
        monkeypatch.setattr(shutil, "rmtree", interrupted(rmtree))
        monkeypatch.setattr(Path, "unlink", interrupted(unlink))
        raise error
    monkeypatch.undo()
    assert caught.value.code == 128 + number
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("use", USES)
def test_a_signal_at_the_rename_comes_after_it(use, number, tmp_path, monkeypatch):
    rename = publish._renameat2

    def interrupted(*arguments):
        os.kill(os.getpid(), number)
        return rename(*arguments)

    monkeypatch.setattr(publish, "_renameat2", interrupted)
    with pytest.raises(SystemExit) as caught, use(tmp_path / "out") as place:
        fill(use, place)
        if use is work_folder:
            place.journal.write_text("one\n")
    assert not hasattr(caught.value, "__notes__")
    assert os.listdir(tmp_path) == ["out"]
    assert content(tmp_path / "out") == "1"


def test_handlers_are_what_they_were(number):
    before = signal.getsignal(number)
    with uninterrupted(), uninterrupted():
        assert signal.getsignal(number) is not before
    assert signal.getsignal(number) is before
    with pytest.raises(SystemExit), uninterrupted():
        with uninterrupted():
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
        held = True
    assert held  # the inner end is not the end
    assert signal.getsignal(number) is before


def test_a_signal_that_is_ignored_stays_so(number):
    signal.signal(number, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(number) is signal.SIG_IGN
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is signal.SIG_IGN
