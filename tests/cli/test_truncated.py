"""An input that is cut short while it is mapped ends the command with one line, not in silence."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toys import copy_model, environment

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.writer import ShardedWriter

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the handler is Linux's")

READ = """
import os, sys
import numpy as np
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.cli.mapped_files import explain_lost_bytes

explain_lost_bytes()
path = sys.argv[1] + "/model.safetensors"
array = open_checkpoint(sys.argv[1]).read("model.embed_tokens.weight")
"""
TOUCH = {
    "numpy": """
os.truncate(path, 0)
print(array.astype(np.float32).sum())
""",
    "another thread": """
import threading
os.truncate(path, 0)
thread = threading.Thread(target=lambda: print(array.astype(np.float32).sum()))
thread.start()
thread.join()
""",
    "several threads": """
from concurrent.futures import ThreadPoolExecutor
os.truncate(path, 0)
with ThreadPoolExecutor(8) as pool:
    print(sum(pool.map(lambda row: row.tobytes()[0], np.array_split(array, 64))))
""",
    "jax": """
import jax, jax.numpy as jnp
put = jax.device_put(array)
program = jax.jit(lambda x: jnp.sum(x.astype(jnp.float32) @ x.astype(jnp.float32).T))
program.lower(put).compile()
os.truncate(path, 0)
print(program(put))
""",
}


@pytest.fixture
def model(toys, tmp_path) -> Path:
    """A model as we write it, whose first tensor jax takes as it is mapped, without a copy."""
    source, folder = open_checkpoint(toys.qwen2[0]), copy_model(toys.qwen2[0], tmp_path / "a model")
    embedding = "model.embed_tokens.weight"
    with ShardedWriter(folder, {embedding: source.specs[embedding]}) as writer:
        writer.write(embedding, source.read(embedding))
    return folder


def run(code: str, *arguments: object, cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(cache),
        timeout=120,
    )


@pytest.mark.parametrize("how", TOUCH)
def test_a_file_cut_short_is_named_by_whoever_touches_it(how, model, cache):
    done = run(READ + TOUCH[how], model, cache=cache)
    assert done.returncode == 2, done
    assert done.stdout == ""
    path = model / "model.safetensors"
    assert done.stderr.startswith(f"recall: {path} was cut short") and done.stderr.count("\n") == 1


def test_without_the_handler_there_is_no_word(model, cache):
    code = READ.replace("explain_lost_bytes()\n", "") + TOUCH["numpy"]
    done = run(code, model, cache=cache)
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")


# The command line, told to wait for a word when some of the units are merged.
STALLED = """
import sys
from recall_jax import job
from recall_jax.cli.main import main

merge = job.merge

def stall(unit, done, total, **rest):
    if done == 3:
        print("half", flush=True)
        sys.stdin.readline()

job.merge = lambda *arguments, **options: merge(*arguments, **options | {"progress": stall})
main(sys.argv[1:])
"""


def test_a_merge_whose_input_is_cut_short_ends_in_one_line(toys, tmp_path, cache):
    models = [copy_model(name, tmp_path / str(k)) for k, name in enumerate(toys.qwen2)]
    recipe = tmp_path / "recipe.yml"
    values = {"merge_method": "average", "models": [{"model": str(model)} for model in models]}
    recipe.write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, "merge", str(recipe), str(tmp_path / "out")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cache),
    )
    try:
        assert process.stdout.readline() == "half\n", process.communicate()
        os.truncate(models[1] / "model.safetensors", 0)
        out, err = process.communicate("on\n", timeout=120)
    finally:
        process.kill()
    assert process.returncode == 2, err
    assert out == ""
    assert err.startswith("recall: ") and err.count("\n") == 1
    assert str(models[1] / "model.safetensors") in err
    assert not (tmp_path / "out").exists()
