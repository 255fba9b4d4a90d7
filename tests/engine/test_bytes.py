"""Every byte is read once and written once: by our own count, and by the system's."""

import json
import subprocess
import sys

import ml_dtypes
import pytest
from deep_models import write_model
from toys import environment

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.recipes.recipe import make_recipe

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/io is Linux's")

# What merging loads and compiles has been loaded and compiled when the counting begins.
MERGE_AND_COUNT = """
import json, os, sys
from pathlib import Path
from recall_jax.jobs import merge as job
from recall_jax.engine import pooled
from recall_jax.recipes.recipe import read_recipe

def count():
    lines = Path("/proc/self/io").read_text().splitlines()
    return {name: int(value) for name, value in (line.split(":") for line in lines)}

def evict(folder):
    for path in Path(folder).glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

folder, fits = Path(sys.argv[1]), sys.argv[2] == "fits"
if not fits:
    pooled.cacheable_bytes = lambda budget: 0
job.merge(read_recipe(folder / "warm.yml"), folder / "warm")
recipe = read_recipe(folder / "recipe.yml")
os.sync()
for entry in recipe.models:
    evict(entry.model)
before = count()
report = job.merge(recipe, folder / "out")
after = count()
counted = {name: after[name] - before[name] for name in after}
for entry in recipe.models:  # and once more, to see whether this file system counts at all
    evict(entry.model)
before = count()
for entry in recipe.models:
    for path in Path(entry.model).glob("*.safetensors"):
        path.read_bytes()
counted["probe"] = count()["read_bytes"] - before["read_bytes"]
print(json.dumps({"report": report, "counted": counted}))
"""


@pytest.mark.parametrize(
    ("method", "fits"), [("recall", True), ("recall", False), ("linear", True)]
)
def test_every_byte_is_read_once_and_written_once(method, fits, toys, tmp_path, cache):
    models = [
        write_model(
            toys.llama[0],
            tmp_path / str(k),
            ml_dtypes.bfloat16,
            seed=k,
            num_hidden_layers=7,
            shard_bytes=12_000_000,
        )
        for k in range(3)
    ]
    assert len(list(models[0].glob("*.safetensors"))) > 2

    def write_recipe(name, folders):
        entries = [{"model": str(folder), "parameters": {"weight": 1.0}} for folder in folders]
        values = {"merge_method": "linear", "models": entries}
        if method == "recall":
            values = {"merge_method": "recall", "models": [{"model": str(f)} for f in folders]}
            values["samples"] = {"data": toys.data, "count": 8}
        (tmp_path / name).write_text(make_recipe(values).to_yaml())

    write_recipe("recipe.yml", models)
    write_recipe("warm.yml", toys.llama)
    done = subprocess.run(
        [sys.executable, "-c", MERGE_AND_COUNT, str(tmp_path), "fits" if fits else "does not"],
        capture_output=True,
        text=True,
        env=environment(cache),
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    report, counted = found["report"], found["counted"]
    size = open_checkpoint(models[0]).nbytes
    passes = report["selection_passes"]
    assert passes == (0 if fits else 1)
    told = report["bytes"]
    assert 0.98 * (3 + passes) * size <= told["read"] <= (3 + passes) * size
    assert told["written"] == size
    if counted["probe"] < 2.9 * size:
        pytest.skip("this file system keeps its files in memory, or does not count what it reads")
    # a selection's pages may still be there for the merge, which spares the disk
    assert 0.98 * 3 * size <= counted["read_bytes"] <= 1.02 * (3 + passes) * size
    assert counted["write_bytes"] <= 1.02 * size
