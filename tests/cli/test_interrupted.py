"""A merge that is stopped leaves no OUT, or the OUT that was there, whole."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toys import environment, tree

# The command line, told to wait when some of the units are merged.
STALLED = """
import sys, time
from recall_jax import job
from recall_jax.cli.main import main

merge = job.merge

def stall(unit, done, total):
    if done == 3:
        print("half", flush=True)
        time.sleep(60)

job.merge = lambda *arguments, **options: merge(*arguments, **options | {"progress": stall})
main(sys.argv[1:])
"""
OLD = {"config.json": b"{}", "deep": None, "deep/old": b"1"}


@pytest.fixture(scope="module")
def recipe(toys, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("recipe") / "recipe.yml"
    models = [{"model": model} for model in toys.llama]
    path.write_text(json.dumps({"merge_method": "average", "models": models}))
    return path


@pytest.fixture(scope="module")
def stopped(recipe, cache, tmp_path_factory):
    """By signal and whether OUT was there: (exit status, stderr, OUT's parent)."""
    running = {}
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        for existing in (False, True):
            folder = tmp_path_factory.mktemp("stopped")
            command = [sys.executable, "-c", STALLED, "merge", str(recipe), str(folder / "out")]
            if existing:
                (folder / "out" / "deep").mkdir(parents=True)
                (folder / "out" / "config.json").write_bytes(OLD["config.json"])
                (folder / "out" / "deep" / "old").write_bytes(OLD["deep/old"])
                command.append("--force")
            process = subprocess.Popen(
                command,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment(cache),
            )
            running[number, existing] = process, folder
    found = {}
    try:
        for (number, existing), (process, folder) in running.items():
            assert process.stdout.readline() == "half\n", process.communicate()
            assert [path.name for path in folder.iterdir() if path.name.startswith(".out.recall-")]
            process.send_signal(number)
            _, err = process.communicate(timeout=60)
            found[number, existing] = process.returncode, err, folder
    finally:
        for process, _ in running.values():
            process.kill()
            process.communicate()
    return found


@pytest.mark.parametrize("existing", [False, True])
def test_ctrl_c(existing, stopped):
    status, err, folder = stopped[signal.SIGINT, existing]
    assert status == 130
    assert err == "recall: interrupted\n"
    assert_untouched(folder, existing)


@pytest.mark.parametrize("existing", [False, True])
def test_termination(existing, stopped):
    status, err, folder = stopped[signal.SIGTERM, existing]
    assert status in (143, -signal.SIGTERM)
    assert err.count("\n") <= 1 and "Traceback" not in err
    assert_untouched(folder, existing)


def assert_untouched(folder: Path, existing: bool) -> None:
    expected = {"out": None} | {f"out/{name}": content for name, content in OLD.items()}
    assert tree(folder) == (expected if existing else {})


@pytest.mark.parametrize("existing", [False, True])
def test_a_kill_leaves_no_half_result(existing, stopped, recall, recipe):
    _, _, folder = stopped[signal.SIGKILL, existing]
    if existing:
        assert tree(folder / "out") == OLD
    else:
        assert not (folder / "out").exists()
    # what it left is in nobody's way
    force = ["--force"] if existing else []
    done = recall("merge", recipe, folder / "out", *force)
    assert done.status == 0, done.err
    assert (folder / "out" / "recall_report.json").exists()
