"""Merges over a mesh and by several processes, as a user starts them."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from test_processes import free_port
from toys import TIMED, environment, tree

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.pod.gather import gather
from recall_jax.jobs.verify import verify

# `recall`, in which one function of ours kills its process when it is called for the n-th time.
# What a process compiles is kept for the next: jax lets only process 0 do so, but on CPU each has
# programs of its own.
START = """
import importlib, os, signal, sys
from types import SimpleNamespace
from jax._src import compiler
from recall_jax.cli.main import run
compiler.distributed = SimpleNamespace(global_state=SimpleNamespace(process_id=0, client=None))
module, path, count, *sys.argv[1:] = sys.argv[1:]
if module:
    *owner, name = path.split(".")
    holder = importlib.import_module(module)
    for each in owner:
        holder = getattr(holder, each)
    kept, left = getattr(holder, name), int(count)
    def dies(*given, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return kept(*given, **named)
    setattr(holder, name, dies)
run()
"""
LOST = (
    "recall: process {} of 2 was lost: what is done is kept: start all processes again with "
    "--resume to go on\n"
)


MESH = ("--mesh", "fsdp=2,tensor=2")


@dataclass(frozen=True)
class Death:
    """Process `index` is killed when it calls a function for the `count`-th time."""

    index: int
    module: str
    path: str
    count: int


@dataclass(frozen=True)
class Ended:
    """Exit status, stdout and stderr of each process; seconds that all took."""

    status: list[int]
    out: list[str]
    err: list[str]
    seconds: float


@dataclass(frozen=True)
class Pod:
    """Starts the processes of a merge on this machine, `devices` each."""

    cache: Path
    folder: Path

    def merge(
        self,
        recipe: dict[str, Any],
        out: str,
        *options: str,
        processes: int = 2,
        devices: int = 2,
        death: Death | None = None,
    ) -> Ended:
        """`recall merge` in each; in the name of OUT, {} is the number of the process."""
        path = self.folder / "recipe.yml"
        path.write_text(yaml.safe_dump(recipe))
        shared = environment(self.cache, devices) | {
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{free_port()}",
            "JAX_NUM_PROCESSES": str(processes),
        }
        began, running = time.monotonic(), []
        try:
            for index in range(processes):
                dies = death if death and death.index == index else Death(index, "", "", 0)
                words = [dies.module, dies.path, str(dies.count), "merge", str(path)]
                words += [str(self.folder / out.format(index)), "--distributed", *options]
                running.append(
                    subprocess.Popen(
                        [sys.executable, "-c", START, *words],
                        env=shared | {"JAX_PROCESS_ID": str(index)},
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        text=True,
                    )
                )
            texts = [process.communicate(timeout=150) for process in running]
        finally:
            for process in running:
                process.kill()
        out_texts, err_texts = zip(*texts, strict=True)
        seconds = time.monotonic() - began
        status = [process.returncode for process in running]
        return Ended(status, list(out_texts), list(err_texts), seconds)


@pytest.fixture
def pod(tmp_path, cache) -> Pod:
    return Pod(cache, tmp_path)


@pytest.fixture(scope="module")
def undisturbed(recall_recipe, cache, tmp_path_factory) -> tuple[Pod, Ended]:
    """A merge by two processes of two devices each, into "out"."""
    pod = Pod(cache, tmp_path_factory.mktemp("undisturbed"))
    return pod, pod.merge(recall_recipe, "out", *MESH)


@pytest.fixture(scope="module")
def recall_recipe(toys) -> dict[str, Any]:
    return {
        "merge_method": "recall",
        "models": [{"model": model} for model in toys.qwen2],
        "samples": {"data": toys.data, "count": 6},
    }


@pytest.fixture(scope="module")
def alone(recall_recipe, cache, tmp_path_factory) -> Path:
    """The same merge by one process on one device."""
    folder = tmp_path_factory.mktemp("alone")
    (folder / "recipe.yml").write_text(yaml.safe_dump(recall_recipe))
    words = [sys.executable, "-c", START, "", "", "0", "merge", folder / "recipe.yml"]
    subprocess.run([*words, folder / "out", "--quiet"], check=True, env=environment(cache))
    return folder / "out"


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "recall_report.json").read_text())


def assert_equal(ours: Path, theirs: Path) -> None:
    """Weights to 1e-6, tensors bit for bit or one unit in the last place; files are vouched for."""
    mine, its = report(ours), report(theirs)
    np.testing.assert_allclose(mine["weights"], its["weights"], rtol=0, atol=1e-6)
    assert mine["typical_samples"] == its["typical_samples"]
    models = [open_checkpoint(folder) for folder in (ours, theirs)]
    assert set(models[0].specs) == set(models[1].specs)
    for name, spec in models[1].specs.items():
        assert models[0].specs[name] == spec
        a, b = (model.read(name) for model in models)
        unit = np.spacing(np.abs(b).astype(b.dtype)).astype(np.float32)
        distance = np.abs(a.astype(np.float32) - b.astype(np.float32))
        assert (distance <= np.abs(unit)).all(), name
    assert not verify(ours).faults


def test_two_processes_merge_as_one_does(undisturbed, alone):
    assert_merged(*undisturbed, alone, processes=2)


@pytest.mark.soak
def test_four_processes_merge_as_one_does(pod, recall_recipe, alone):
    ended = pod.merge(recall_recipe, "out", processes=4, devices=1)
    assert_merged(pod, ended, alone, processes=4)


def test_four_processes_share_a_merge_that_runs_no_model(pod, recall_recipe, recall):
    linear = {
        "merge_method": "linear",
        "models": [each | {"parameters": {"weight": 1.0}} for each in recall_recipe["models"]],
    }
    ended = pod.merge(linear, "out", processes=4, devices=1)
    assert recall("merge", pod.folder / "recipe.yml", pod.folder / "one", "--quiet").status == 0
    shutil.move(pod.folder / "one", pod.folder.parent / "one")
    assert_merged(pod, ended, pod.folder.parent / "one", processes=4)


def assert_merged(pod: Pod, ended: Ended, alone: Path, *, processes: int) -> None:
    assert ended.status == [0] * processes, ended.err
    assert_equal(pod.folder / "out", alone)
    assert ended.out[1:] == [""] * (processes - 1)
    assert ended.err[1:] == [""] * (processes - 1)
    assert f"of {processes} processes" in ended.out[0]
    assert sorted(path.name for path in pod.folder.iterdir()) == ["out", "recipe.yml"]
    whole = report(alone)["bytes"]["read"]
    for each in report(pod.folder / "out")["processes"]:
        assert each["read"] <= whole / processes * 1.05


MOMENTS = {
    "choosing": Death(1, "recall_jax.engine.pod.forward", "ShardedForward.advance", 2),
    "preparing": Death(0, "recall_jax.engine.journal", "MergeJournal.record_prepared", 1),
    "comparing": Death(1, "recall_jax.methods.recall", "Comparer.values", 3),
    "in a file": Death(1, "recall_jax.engine.pod.writer", "UnitWriter._write", 4),
    "after a file": Death(0, "recall_jax.engine.journal", "MergeJournal.record_unit", 3),
    "not yet in the journal": Death(
        1, "recall_jax.engine.pod.writer", "UnitWriter._finish_file", 5
    ),
    "after the last unit": Death(1, "recall_jax.jobs.merge", "make_report", 1),
    "before the end": Death(0, "recall_jax.jobs.merge", "write_outcome", 1),
}


@pytest.mark.soak
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_lost_process_ends_all_and_a_restart_goes_on(pod, recall_recipe, undisturbed, moment):
    death = MOMENTS[moment]
    ended = pod.merge(recall_recipe, "out", *MESH, death=death)
    other = 1 - death.index
    assert ended.status[death.index] == -signal.SIGKILL
    assert ended.status[other] == 2
    assert ended.err[other] == LOST.format(death.index)
    assert ended.seconds < 60
    assert not (pod.folder / "out").exists()
    again = pod.merge(recall_recipe, "out", *MESH, "--resume")
    assert again.status == [0, 0], again.err
    whole, resumed = (tree(each.folder / "out") for each in (undisturbed[0], pod))
    assert resumed.keys() == whole.keys()
    assert {name for name in whole if whole[name] != resumed[name]} <= TIMED
    assert not verify(pod.folder / "out").faults


def test_parts_are_gone_on_with_after_a_loss_and_joined(pod, recall_recipe, undisturbed, alone):
    death = Death(0, "recall_jax.engine.journal", "MergeJournal.record_unit", 4)
    ended = pod.merge(recall_recipe, "part-{}", *MESH, "--parts", death=death)
    assert (ended.status[1], ended.err[1]) == (2, LOST.format(0))
    ended = pod.merge(recall_recipe, "part-{}", *MESH, "--parts", "--resume")
    assert ended.status == [0, 0], ended.err
    resumed = report(pod.folder / "part-0")["resumed_units"]
    assert resumed >= 2
    parts = [pod.folder / f"part-{index}" for index in range(2)]
    gather(parts[::-1], pod.folder / "joined")
    assert_equal(pod.folder / "joined", alone)
    whole, joined = (tree(f) for f in (undisturbed[0].folder / "out", pod.folder / "joined"))
    weights = [name for name in whole if name.startswith("model")]
    assert [name for name in weights if whole[name] != joined[name]] == []


def test_what_is_wrong_is_said_by_each_in_a_line(pod, recall_recipe):
    recipe = recall_recipe | {"models": [{"model": "no-such-model"}, {"model": "nor-this"}]}
    ended = pod.merge(recipe, "out")
    assert ended.status == [2, 2]
    for text in ended.err:
        assert text.startswith("recall: ") and text.count("\n") == 1
        assert "no-such-model" in text
    (pod.folder / "out").mkdir()
    ended = pod.merge(recall_recipe, "out")
    assert ended.status == [2, 2]
    assert "exists: choose another folder or pass --force" in ended.err[0]
    assert list((pod.folder / "out").iterdir()) == []


def test_one_fault_of_one_process_ends_all(pod, recall_recipe, tmp_path):
    newest = tmp_path / "newest"
    shutil.copytree(recall_recipe["models"][-1]["model"], newest)
    shard = open_checkpoint(newest)
    path = newest / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-4:-2] = np.asarray([np.nan], np.float32).tobytes()[2:]  # the last row is process 1's
    path.write_bytes(content)
    assert shard.specs
    models = [*recall_recipe["models"][:-1], {"model": str(newest)}]
    ended = pod.merge(recall_recipe | {"models": models}, "out", *MESH)
    assert ended.status == [2, 2]
    for text in ended.err:
        assert "holds NaN or infinite values; repair this model" in text
        assert text.count("\n") == 1
    assert sorted(os.listdir(pod.folder)) == ["newest", "recipe.yml"]
