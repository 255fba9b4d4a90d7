"""What the command says when it is told to stop, and that notes on errors are part of the line."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from toys import environment

from recall_jax.cli import main as cli_main
from recall_jax.errors import InputError
from recall_jax.files.interruption import STOPPING
from recall_jax.jobs import convert as conversion

NOTE = "go on with\n--resume"


@pytest.fixture(autouse=True)
def handlers():
    kept = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in kept.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("options", [[], ["--debug"], ["--quiet"]])
@pytest.mark.parametrize(
    ("number", "status", "line"),
    [
        (signal.SIGINT, 130, "recall: interrupted; go on with --resume; second\n"),
        (signal.SIGTERM, 143, "recall: terminated; go on with --resume; second\n"),
        (signal.SIGHUP, 129, "recall: hung up; go on with --resume; second\n"),
    ],
)
def test_a_signal_is_one_line_with_the_notes(
    number, status, line, options, recall, toys, monkeypatch
):
    def stopped(*_):
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        except BaseException as error:
            error.add_note(NOTE)
            error.add_note("second")
            raise

    monkeypatch.setattr(conversion, "describe_checkpoint", stopped)
    done = recall("inspect", toys.llama[0], *options)
    assert (done.status, done.out, done.err) == (status, "", line)


def test_a_users_error_is_one_line_with_the_notes(recall, toys, monkeypatch):
    def refused(*_):
        error = InputError("no such thing")
        error.add_note(NOTE)
        raise error

    monkeypatch.setattr(conversion, "describe_checkpoint", refused)
    done = recall("inspect", toys.llama[0])
    assert (done.status, done.err) == (2, "recall: no such thing; go on with --resume\n")


def test_a_status_that_no_signal_gave_passes(recall, toys, monkeypatch):
    def leave(*_):
        raise SystemExit(7)

    monkeypatch.setattr(conversion, "describe_checkpoint", leave)
    done = recall("inspect", toys.llama[0])
    assert (done.status, done.err) == (7, "")


def test_a_job_in_a_shells_background_ignores_the_keyboard(toys, cache):
    code = """
import os, signal, sys
from recall_jax.jobs import convert as conversion
from recall_jax.cli import main as cli_main
from recall_jax.cli.main import main

describe = conversion.describe_checkpoint

def interrupted(*arguments):
    os.kill(os.getpid(), signal.SIGINT)
    return describe(*arguments)

conversion.describe_checkpoint = interrupted
main(["inspect", sys.argv[1]])
"""
    done = subprocess.run(
        [
            "/bin/sh",
            "-c",
            'trap "" INT; exec "$@"',
            "sh",
            sys.executable,
            "-c",
            code,
            toys.llama[0],
        ],
        capture_output=True,
        text=True,
        env=environment(cache),
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "llama" in done.stdout


SWALLOWED = """
import os, signal, sys, time, weakref
from recall_jax.jobs import convert as conversion
from recall_jax.cli import main as cli_main
from recall_jax.cli.main import main

class Thing:
    pass

def describe(*_):
    thing = Thing()
    weakref.finalize(thing, os.kill, os.getpid(), signal.SIGINT)
    del thing  # the handler's exception is raised in a callback, where Python drops it
    time.sleep(30)

conversion.describe_checkpoint = describe
main(sys.argv[1:])
"""


def test_a_signal_in_a_callback_of_memory_management_is_not_lost(toys, cache):
    done = subprocess.run(
        [sys.executable, "-c", SWALLOWED, "inspect", toys.llama[0]],
        capture_output=True,
        text=True,
        env=environment(cache),
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (130, "recall: interrupted\n")


def test_before_anything_is_begun_the_command_just_ends(cache):
    code = """
import os, signal
from recall_jax.cli import signals
signals.catch()
try:
    os.kill(os.getpid(), signal.SIGTERM)
finally:
    print("unwound")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment(cache)
    )
    assert (done.returncode, done.stdout) == (143, "")
    assert done.stderr == "recall: terminated\n"


@pytest.mark.parametrize("status", [130, 143])
def test_a_signal_inside_a_c_callback_is_no_fault_of_ours(status, recall, monkeypatch):
    def interrupted(*arguments, **options):
        try:
            raise SystemExit(status)
        except SystemExit as end:
            raise SystemError(
                "<class 'numpy.dtype'> returned a result with an exception set"
            ) from end

    monkeypatch.setattr(cli_main, "_command", lambda: interrupted)
    done = recall("demo")
    assert done.status == status
    assert done.err.startswith("recall: interrupted" if status == 130 else "recall: terminated")


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_rows_are_cleared_away(number, times, recall, monkeypatch, tmp_path):
    def stopped(path, rows):
        path.write_text("half")
        for _ in range(times):
            os.kill(os.getpid(), number)

    rmtree = shutil.rmtree

    def slow(*arguments, **options):
        os.kill(os.getpid(), number)
        rmtree(*arguments, **options)

    monkeypatch.setattr("recall_jax.inputs.data.write_jsonl", stopped)
    monkeypatch.setattr(shutil, "rmtree", slow)
    (tmp_path / "sst2").mkdir()
    (tmp_path / "sst2" / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    done = recall("rows", "sst2", "--data-root", tmp_path, "--out", tmp_path / "new" / "out")
    assert done.status == 128 + number
    assert done.err.count("\n") == 1
    assert os.listdir(tmp_path) == ["sst2"]


def test_a_terminal_that_is_gone_changes_nothing(recall, toys, monkeypatch):
    class Gone:
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

        flush = write

    def stopped(*_):
        try:
            os.kill(os.getpid(), signal.SIGHUP)
        finally:  # as a progress bar, which is to be taken away
            Gone().write("")

    monkeypatch.setattr(conversion, "describe_checkpoint", stopped)
    monkeypatch.setattr(sys, "stderr", Gone())
    assert recall("inspect", toys.llama[0]).status == 129


NAMES = ["é", "日本", "\udcff", "±"]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_a_name_that_the_encoding_lacks_is_shown_all_the_same(
    name, encoding, toys, tmp_path, monkeypatch
):
    folder = tmp_path / name
    folder.symlink_to(toys.llama[0])
    for words, status in ([str(folder)], 0), ([str(folder / "no")], 2):
        streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as end:
            cli_main.main(["inspect", *words])
        assert end.value.code == status
        said = [(stream.flush(), stream.buffer.getvalue())[1] for stream in streams]
        assert said[status == 0] == b""
        assert said[status == 2].decode(encoding)
