"""Two processes merge trees together: each reads and writes its own part of every leaf."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import yaml
from toys import environment
from tree_layouts import FORWARD, TREE, plain, save_models

from recall_jax.checkpoint.orbax import load_orbax
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import read_recipe

# As the command does, which leaves jax's own end of a pod out: that may find process 0 gone.
COMMAND = "from recall_jax.cli.main import run; run()"


def start(index: int, port: int, cache: Path, *words: object) -> subprocess.Popen:
    variables = {
        **os.environ,  # strict jax too
        **environment(cache, devices=2),
        "PYTHONPATH": str(Path(__file__).parent),
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
    }
    return subprocess.Popen(
        [sys.executable, "-c", COMMAND, *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=variables,
    )


def test_two_processes_give_what_one_gives(cache, tmp_path):
    rng = np.random.default_rng(5)
    lines = [json.dumps({"input_ids": rng.integers(0, 23, size=7).tolist()}) for _ in range(9)]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines) + "\n")
    recipe = {
        "merge_method": "recall",
        "models": [{"model": name} for name in save_models(tmp_path, "maxtext")],
        "tree": TREE["maxtext"],
        "forward": FORWARD["maxtext"],
        "samples": {"data": str(tmp_path / "rows.jsonl"), "count": 4},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    out = tmp_path / "out"
    words = ("merge", tmp_path / "recipe.yml", out, "--distributed", "--quiet")
    started = [start(index, port, cache, *words) for index in range(2)]
    for process in started:
        said, told = process.communicate(timeout=100)
        assert (process.returncode, said, told) == (0, "", "")
    alone = job.merge(read_recipe(tmp_path / "recipe.yml"), tmp_path / "alone")
    together = json.loads((out / "recall_report.json").read_text())
    np.testing.assert_allclose(together["weights"], alone["weights"], rtol=1e-6)
    # every leaf has an axis that four devices cut, and each part is read once
    assert together["bytes"]["read"] <= 1.01 * alone["bytes"]["read"]
    expected = plain("maxtext", load_orbax(tmp_path / "alone"))
    for name, array in plain("maxtext", load_orbax(out)).items():
        np.testing.assert_allclose(array, expected[name], rtol=1e-6, atol=1e-7, err_msg=name)
    parts = {path.name for path in (out / "tree" / "state").iterdir()}
    assert {"ocdbt.process_0", "ocdbt.process_1"} <= parts
