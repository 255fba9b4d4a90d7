"""An input that is cut short while it is mapped ends the command with one line, not in silence."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from toys import copy_model, environment

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.jobs.verify import verify

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the handler is Linux's")

RECALL = str(Path(sys.executable).with_name("recall"))
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
    assert done.stderr.startswith(f"recall: {path} was truncated") and done.stderr.count("\n") == 1
    assert "restore it, then run the same command again (--resume " in done.stderr


def test_without_the_handler_there_is_no_word(model, cache):
    code = READ.replace("explain_lost_bytes()\n", "") + TOUCH["numpy"]
    done = run(code, model, cache=cache)
    assert (done.returncode, done.stderr) == (-signal.SIGBUS, "")


# The command line, told to wait for a word when some of the units are merged, and then perhaps to
# touch what it has mapped before another thread sees that the file is not what it was.
STALLED = """
import os
import sys
from recall_jax.jobs import merge as job
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.cli.main import main

merge = job.merge
array = open_checkpoint(os.environ["MAPPED"]).read("model.norm.weight")

def stall(unit, done, total, **rest):
    if done == 3:
        print("half", flush=True)
        if sys.stdin.readline() == "touch\\n":
            array.tobytes()

job.merge = lambda *arguments, **options: merge(*arguments, **options | {"progress": stall})
main(sys.argv[1:])
"""


class Halfway(NamedTuple):
    """A merge of three models that waits; the second is to be cut short."""

    process: subprocess.Popen[str]
    recipe: Path
    out: Path
    weights: Path

    def cut(self, word: str) -> str:
        """Cut the file short when three units are written, and say the word: what stderr says."""
        try:
            assert self.process.stdout.readline() == "half\n", self.process.communicate()
            journal = self.out.parent / ".out.recall-work" / "journal.jsonl"
            while journal.read_text().count('"unit"') < 3:
                assert self.process.poll() is None
                time.sleep(0.01)
            os.truncate(self.weights, 0)
            said, err = self.process.communicate(f"{word}\n", timeout=120)
        finally:
            self.process.kill()
        assert (self.process.returncode, said) == (2, ""), err
        assert err.startswith("recall: ") and err.count("\n") == 1
        assert str(self.weights) in err
        assert not self.out.exists()
        return err


@pytest.fixture
def halfway(toys, tmp_path, cache) -> Halfway:
    models = [copy_model(name, tmp_path / str(k)) for k, name in enumerate(toys.qwen2)]
    recipe, out = tmp_path / "recipe.yml", tmp_path / "out"
    values = {"merge_method": "average", "models": [{"model": str(model)} for model in models]}
    recipe.write_text(json.dumps(values))
    process = subprocess.Popen(
        [sys.executable, "-c", STALLED, "merge", str(recipe), str(out)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**environment(cache), "MAPPED": str(models[1])},
    )
    return Halfway(process, recipe, out, models[1] / "model.safetensors")


def test_a_merge_whose_input_is_cut_short_ends_in_one_line(halfway):
    halfway.cut("on")


def test_a_merge_goes_on_when_the_file_is_restored(halfway, cache, tmp_path):
    def merge(out: Path, *options: str) -> tuple[int, str]:
        command = [RECALL, "merge", str(halfway.recipe), str(out), *options]
        done = subprocess.run(command, capture_output=True, text=True, env=environment(cache))
        return done.returncode, done.stderr

    content, status = halfway.weights.read_bytes(), halfway.weights.stat()
    assert "was truncated or could not be read" in halfway.cut("touch")
    code, err = merge(halfway.out, "--resume")
    assert code == 2 and f"{halfway.weights} is truncated" in err

    halfway.weights.write_bytes(content)
    os.utime(halfway.weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert merge(halfway.out, "--resume", "--quiet") == (0, "")
    report = json.loads((halfway.out / "recall_report.json").read_text())
    assert report["resumed_units"] == 3
    assert verify(halfway.out).faults == ()
    assert merge(tmp_path / "whole", "--quiet") == (0, "")
    merged, whole = (folder / "model.safetensors" for folder in (halfway.out, tmp_path / "whole"))
    assert merged.read_bytes() == whole.read_bytes()
