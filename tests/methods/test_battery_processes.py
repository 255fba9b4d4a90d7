"""The battery's part on real processes: several at once, killed ones, and those watched for memory.

`make test` runs one method for each combination of needs, the soak all of them.
"""

import json
import signal
import socket
import subprocess
import sys

import pytest
from deep_models import PROMPT_FREE
from entries import (
    ENTRIES,
    OWN,
    assert_near,
    representatives,
    tolerance,
    values_of_recipe,
    write_models,
)
from haste import in_haste
from toys import TIMED, environment, tree

from recall_jax.cli.programs_folder import programs_folder
from recall_jax.engine.pod.prepare import ON_MESH

pytestmark = pytest.mark.usefixtures("own_methods")
KEEP_PROGRAMS = {
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
}
FIRST = representatives()
EACH = [
    pytest.param(name, marks=[] if name in FIRST else pytest.mark.soak, id=name) for name in ENTRIES
]
BEGIN = f"""
import json, os, signal, sys, threading, time
from dataclasses import replace
from pathlib import Path
from recall_jax.jobs import merge as job
from recall_jax.recipes.plugins import load_plugins
from recall_jax.recipes.recipe import read_recipe
import recall_jax.engine.pooled
load_plugins(map(Path, {list(map(str, OWN))}))
"""
# Forks for each merge, which spares it the imports; no thread has been started by then.
ONE_BY_ONE = (
    BEGIN
    + """
def kill_within(unit, done, total, **moved):
    if unit == "layers.1":
        os.kill(os.getpid(), signal.SIGKILL)

def watch(peak):
    while True:
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]) * 1024)
        time.sleep(0.002)

def run(recipe, out, killed):
    peak = [0]
    threading.Thread(target=watch, args=(peak,), daemon=True).start()
    more = {"progress": kill_within} if killed else {"options": job.MergeOptions(resume=True)}
    job.merge(read_recipe(Path(recipe)), Path(out), **more)
    Path(out + ".peak").write_text(str(peak[0]))

for line in sys.stdin:
    if child := os.fork():
        print("ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    else:
        run(*json.loads(line))
        sys.stderr.flush()
        os._exit(0)
"""
)
# One pod for all merges, which spares each of them the start; keys are written once in a run.
TOGETHER = (
    BEGIN
    + """
from recall_jax.parallel.processes import connect

class Prefixed:
    def __init__(self, store, prefix):
        self.store, self.prefix, self.alive = store, prefix, store.alive
    def put(self, key, text):
        return self.store.put(self.prefix + key, text)
    def get(self, key):
        return self.store.get(self.prefix + key)
    def under(self, folder):
        return self.store.under(self.prefix + folder)

processes = connect()
for line in sys.stdin:
    recipe, out = json.loads(line)
    own = replace(processes, store=Prefixed(processes.store, Path(out).name + "/"))
    options = job.MergeOptions(mesh="auto", processes=own)
    job.merge(read_recipe(Path(recipe)), Path(out), options=options)
    print("ended", processes.index, flush=True)
"""
)


class Child:
    """A program that reads a line of JSON for each merge, and answers when that has ended."""

    def __init__(self, program, cache, **variables):
        self.process = subprocess.Popen(
            [sys.executable, "-c", program],
            env={
                **environment(cache),
                **PROMPT_FREE,
                **KEEP_PROGRAMS,
                "JAX_COMPILATION_CACHE_DIR": str(programs_folder()),
                **variables,
            },
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, recipe, out, *more):
        print(json.dumps([str(recipe), str(out), *more]), file=self.process.stdin)
        self.process.stdin.flush()

    def answer(self):
        for line in self.process.stdout:  # among what libraries print
            if line.startswith("ended "):
                return int(line.removeprefix("ended "))
        return self.process.wait()

    def end(self):
        self.process.kill()
        with self.process:
            pass


def exact_in_haste(cache, devices):
    """Return flags of XLA for instructions that do not contract products and sums: in haste,
    programs of a mesh and of a device would contract others."""
    assert in_haste()
    return environment(cache, devices)["XLA_FLAGS"] + " --xla_cpu_max_isa=AVX"


@pytest.fixture(scope="module")
def alone(cache):
    child = Child(ONE_BY_ONE, cache)
    yield child
    child.end()


@pytest.fixture(scope="module")
def alone_in_haste(cache):
    child = Child(ONE_BY_ONE, cache, XLA_FLAGS=exact_in_haste(cache, devices=1))
    yield child
    child.end()


@pytest.fixture(scope="module")
def two(cache):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    variables = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "XLA_FLAGS": exact_in_haste(cache, devices=2),
    }
    children = [
        Child(TOGETHER, cache, JAX_PROCESS_ID=str(index), **variables) for index in range(2)
    ]
    yield children
    for child in children:
        child.end()


@pytest.fixture(scope="module")
def large(toys, tmp_path_factory):
    """Four relatives whose largest tensors have 1 MB, which are quickly decomposed."""
    folder = tmp_path_factory.mktemp("large")
    sizes = {"hidden_size": 128, "intermediate_size": 2048, "head_dim": 32}
    return write_models(toys.llama[0], folder, **sizes)


@pytest.fixture(scope="module")
def merged(large, rows, alone, tmp_path_factory):
    return merger(large, rows, alone, tmp_path_factory.mktemp("merged"))


@pytest.fixture(scope="module")
def merged_in_haste(models, rows, alone_in_haste, tmp_path_factory):
    return merger(models, rows, alone_in_haste, tmp_path_factory.mktemp("merged"))


def merger(models, rows, alone, folder):
    """Return a function: the recipe of a method, and the folder of its undisturbed merge."""

    def merge(name):
        recipe, out = folder / f"{name}.json", folder / name
        if not recipe.exists():
            recipe.write_text(json.dumps(values_of_recipe(name, models[1:], rows, models[0])))
            alone.ask(recipe, out, False)
            assert alone.answer() == 0
        return recipe, out

    return merge


# Unfused programs take more memory than is planned.
@pytest.mark.optimised
@pytest.mark.parametrize("name", EACH)
def test_memory_stays_within_the_plan(name, merged, alone, tmp_path):
    recipe, _ = merged(name)  # which compiles, in other memory
    out = tmp_path / name
    alone.ask(recipe, out, False)
    assert alone.answer() == 0
    planned = json.loads((out / "recall_report.json").read_text())["memory"]["planned_bytes"]
    assert int(out.with_name(f"{name}.peak").read_text()) <= planned


@pytest.mark.optimised
@pytest.mark.parametrize("name", EACH)
def test_a_killed_merge_goes_on_to_the_same_bytes(name, merged, alone, tmp_path):
    recipe, undisturbed = merged(name)
    out = tmp_path / "out"
    alone.ask(recipe, out, True)
    assert alone.answer() == -signal.SIGKILL
    assert not out.exists()
    alone.ask(recipe, out, False)
    assert alone.answer() == 0
    assert json.loads((out / "recall_report.json").read_text())["resumed_units"] in (1, 2)
    one, other = (
        {key: content for key, content in tree(folder).items() if key not in TIMED}
        for folder in (out, undisturbed)
    )
    assert one == other


@pytest.mark.parametrize("name", EACH)
def test_two_processes_give_what_one_gives(name, merged_in_haste, two, tmp_path):
    needs = ENTRIES[name].needs
    if not ON_MESH.meets(needs):
        pytest.skip(f"{name} runs on one host, and says so: see the other half of the battery")
    recipe, undisturbed = merged_in_haste(name)
    out = tmp_path / name
    for process in two:
        process.ask(recipe, out)
    assert [process.answer() for process in two] == [0, 1]
    assert_near(out, undisturbed, tolerance(needs))
