"""The installed command in a process of its own: what a shell sees, and no chatter of libraries."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from toys import copy_model, environment, tree

RECALL = str(Path(sys.executable).with_name("recall"))


@pytest.fixture
def run(tmp_path, cache):
    """Run `recall` from a shell, after some commands of the shell, its streams redirected."""

    def run(*arguments, before=":", after=""):
        command = f"{shlex.join([RECALL, *map(str, arguments)])} {after}"
        return subprocess.run(
            ["/bin/sh", "-c", f"{before}; {command}"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(cache),
            timeout=120,
        )

    return run


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_merge_says_its_result_and_nothing_else(family, run, toys, tmp_path):
    models = getattr(toys, family)
    done = run("quick", *models, "--data", toys.data, "--out", "out", "--count", "8")
    assert done.returncode == 0
    assert done.stderr == ""
    assert f"{len(models)} models" in done.stdout
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["device"] == "cpu"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_bad_input_is_one_line_and_status_two(run, toys, tmp_path):
    copy_model(toys.llama[0], tmp_path / "odd", vocab_size=96)
    before = tree(tmp_path)
    for line, words in (
        (["quick", "nowhere", toys.llama[0], "--data", toys.data, "--out", "out"], "nowhere"),
        (["quick", "odd", toys.llama[0], "--data", toys.data, "--out", "out"], "odd"),
        (["merge", "no.yml", "out"], "no.yml"),
        (["inspect"], "recall inspect --help"),
        (["mreg"], "recall --help"),
    ):
        done = run(*line)
        assert done.returncode == 2, done
        assert done.stdout == ""
        assert done.stderr.startswith("recall: ") and done.stderr.count("\n") == 1
        assert words in done.stderr
    assert tree(tmp_path) == before


def test_a_full_disk_is_one_line_and_keeps_what_is_done(run, toys, tmp_path):
    recipe = tmp_path / "recipe.yml"
    models = [{"model": model} for model in toys.llama]
    recipe.write_text(json.dumps({"merge_method": "average", "models": models}))

    # no file larger than 100 blocks of 512 bytes
    done = run("merge", recipe, "out", before="ulimit -f 100")
    assert done.returncode == 2, done
    assert done.stderr.startswith("recall: ") and done.stderr.count("\n") == 1
    assert "model.safetensors" in done.stderr and "--resume" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", ".out.recall-work"}
    done = run("merge", recipe, "out", "--resume")
    assert done.returncode == 0, done
    assert {path.name for path in tmp_path.iterdir()} == {"recipe.yml", "out"}


def test_a_reader_may_leave_early(toys, cache):
    done = subprocess.run(
        f"'{RECALL}' inspect '{toys.llama[0]}' --json | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        env=environment(cache),
        timeout=120,
    )
    assert done.stdout == "{"
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_nobodys_fault(closed, run, toys, tmp_path):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "average", "models": [{"model": toys.llama[0]}]}))
    done = run("merge", "recipe.yml", "out", after=closed)
    assert (done.returncode, done.stderr) == (0, ""), done
    assert (tmp_path / "out" / "recall_report.json").exists()
