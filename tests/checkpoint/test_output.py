"""Outputs appear whole or not at all, whatever happens while they are written."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from recall_jax import output
from recall_jax.errors import InputError
from recall_jax.output import output_file, output_folder


@pytest.fixture(params=["renameat2", "plain renames"])
def renames(request, monkeypatch):
    """Both ways to publish: Linux's atomic calls, and what other systems have."""
    if request.param == "plain renames":
        monkeypatch.setattr(output, "_renameat2", lambda *_: False)
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
        assert hidden.parent == tmp_path
        assert hidden.name.startswith(".out.recall-")
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
        assert hidden.parent == tmp_path / "disk"
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
from recall_jax.output import output_file, output_folder
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
