"""Memory does not grow with depth."""

import json
import re
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from toys import copy_model, environment, write_rows

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import tensor_shapes

# A layer takes 8.4 MB in bfloat16: eighteen more of them would show, were they kept.
WIDTHS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_key_value_heads": 4,
    "head_dim": 128,
}

MERGE_AND_WATCH = """
import sys, threading, time
from pathlib import Path
from recall_jax.cli.main import main

peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.split("RssAnon:")[1].split()[0]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
try:
    main(sys.argv[1:])
finally:
    print(peak * 1024)
"""


def write_deep_model(template: str, folder: Path, num_hidden_layers: int, seed: int) -> Path:
    """Random weights, the same in every layer."""
    copy_model(template, folder, num_hidden_layers=num_hidden_layers, **WIDTHS)
    for path in folder.glob("model*"):
        path.unlink()
    arch = read_architecture(json.loads((folder / "config.json").read_text()))
    specs = {
        name: TensorSpec(np.dtype(ml_dtypes.bfloat16), shape)
        for name, shape in tensor_shapes(arch).items()
    }
    draws = np.random.default_rng(seed)
    arrays = {}
    with ShardedWriter(folder, specs) as writer:
        for name, spec in specs.items():
            kind = re.sub(r"\.\d+\.", ".", name)
            if kind not in arrays:
                scaled = draws.standard_normal(spec.shape, np.float32) * 0.02
                arrays[kind] = scaled.astype(spec.dtype)
            writer.write(name, arrays[kind])
    return folder


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux's")
def test_twice_the_layers_take_no_more_memory(toys, tmp_path, cache):
    # three rows: all of them are typical, so that one pass is all
    data = write_rows(tmp_path / "data.jsonl", ["abcdef", "hXYZ01 a", "f0f1"])
    peaks = {}
    for layers in (18, 36):
        models = [
            write_deep_model(toys.llama[0], tmp_path / f"{layers}-{seed}", layers, seed)
            for seed in (0, 1)
        ]
        out = tmp_path / f"out-{layers}"
        command = [sys.executable, "-c", MERGE_AND_WATCH, "quick", *map(str, models)]
        command += ["--data", str(data), "--out", str(out), "--quiet"]
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment(cache), timeout=250
        )
        assert done.returncode == 0, done.stderr
        peaks[layers] = int(done.stdout)
        report = json.loads((out / "recall_report.json").read_text())
        assert len(report["units"]) == layers + 2
    assert peaks[36] < 1.1 * peaks[18]
    # which would say nothing if the layers did not weigh in
    assert 0.3 * peaks[18] < 18 * 8.4e6
