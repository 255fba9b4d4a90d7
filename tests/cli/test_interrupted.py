"""A merge that is stopped leaves no OUT, or the OUT that was there, whole; `--resume` goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toys import TIMED, environment, tree

# The command line, told to wait when some of the units are merged.
STALLED = """
import sys, time
from recall_jax.jobs import merge as job
from recall_jax.cli.main import main

merge = job.merge

def stall(unit, done, total, **moved):
    if done == 3:
        print("half", flush=True)
        time.sleep(60)

job.merge = lambda *arguments, **options: merge(*arguments, **options | {"progress": stall})
main(sys.argv[1:])
"""
OLD = {"config.json": b"{}", "deep": None, "deep/old": b"1"}
GO_ON = "run the same command with --resume to go on"


@pytest.fixture(scope="module")
def recipe(toys, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yml"
    models = [{"model": model} for model in toys.llama]
    path.write_text(json.dumps({"merge_method": "average", "models": models}))
    return path


def start_stalled(command, folder: Path, cache: Path, existing: bool = False) -> subprocess.Popen:
    """A merge into `folder`/out that waits after three units."""
    if existing:
        (folder / "out" / "deep").mkdir(parents=True)
        (folder / "out" / "config.json").write_bytes(OLD["config.json"])
        (folder / "out" / "deep" / "old").write_bytes(OLD["deep/old"])
        command = [*command, "--force"]
    return subprocess.Popen(
        [sys.executable, "-c", STALLED, *map(str, command)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
    )


def stop(process: subprocess.Popen, number: int) -> str:
    """Send a signal once the merge waits; stderr."""
    lines = iter(process.stdout.readline, "")
    assert "half\n" in lines, process.communicate()
    process.send_signal(number)
    return process.communicate(timeout=60)[1]


@pytest.fixture(scope="module")
def stopped(recipe, cache, tmp_path_factory):
    """By signal and whether OUT was there: (exit status, stderr, OUT's parent)."""
    running = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for existing in (False, True):
            folder = tmp_path_factory.mktemp("stopped")
            command = ["merge", recipe, folder / "out"]
            running[number, existing] = start_stalled(command, folder, cache, existing), folder
    found = {}
    try:
        for (number, existing), (process, folder) in running.items():
            err = stop(process, number)
            found[number, existing] = process.returncode, err, folder
    finally:
        for process, _ in running.values():
            process.kill()
            process.communicate()
    return found


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize(
    ("number", "status", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal_is_one_line_and_keeps_what_is_done(number, status, word, existing, stopped):
    found, err, folder = stopped[number, existing]
    assert found == status
    assert err == f"recall: {word}; what is done is kept: {GO_ON}\n"
    assert_untouched(folder, existing)
    assert (folder / ".out.recall-work" / "journal.jsonl").read_text().count('"unit"') >= 2


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_resume_goes_on_to_the_identical_bytes(number, existing, stopped, recall, recipe, tmp_path):
    _, _, folder = stopped[number, existing]
    assert_untouched(folder, existing)
    force = ["--force"] if existing else []
    done = recall("merge", recipe, folder / "out", "--resume", *force)
    assert done.status == 0, done.err
    assert done.err == ""
    whole = recall("merge", recipe, tmp_path / "out")
    assert whole.status == 0, whole.err
    resumed, fresh = tree(folder / "out"), tree(tmp_path / "out")
    assert resumed.keys() == fresh.keys()
    assert {name for name in fresh if resumed[name] != fresh[name]} <= TIMED
    report = json.loads(resumed["recall_report.json"])
    expected = json.loads(fresh["recall_report.json"])
    assert report["weights"] == expected["weights"]
    assert 2 <= report["resumed_units"] < len(report["units"])
    assert expected["resumed_units"] == 0
    assert report["bytes"]["written"] < expected["bytes"]["written"]
    assert os.listdir(folder) == ["out"]


def assert_untouched(folder: Path, existing: bool) -> None:
    found = tree(folder / "out") if existing else (folder / "out").exists()
    assert found == (OLD if existing else False)


def test_without_resume_it_starts_afresh(recipe, recall, cache, tmp_path):
    process = start_stalled(["merge", recipe, tmp_path / "out"], tmp_path, cache)
    stop(process, signal.SIGKILL)
    done = recall("merge", recipe, tmp_path / "out")
    assert done.status == 0, done.err
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["resumed_units"] == 0
    assert os.listdir(tmp_path) == ["out"]


def test_resume_with_nothing_to_resume_is_a_merge(recipe, recall, tmp_path):
    done = recall("merge", recipe, tmp_path / "out", "--resume")
    assert done.status == 0, done.err
    assert os.listdir(tmp_path) == ["out"]
