"""What the benchmarks share: whole processes timed, their memory, and what ran where."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import tensor_shapes
from recall_jax.parallel.machine import processor


@dataclass(frozen=True)
class Run:
    """One finished process: wall seconds, peak of its anonymous memory, what it printed."""

    seconds: float
    peak_anonymous_bytes: int
    output: str


def run_process(command: Sequence[str]) -> Run:
    """Run a command to its end, sampling its anonymous memory every 10 ms."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    peak = 0
    while process.poll() is None:
        peak = max(peak, anonymous_bytes(process.pid))
        time.sleep(0.01)
    seconds = time.perf_counter() - start
    output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{output}")
    return Run(seconds, peak, output)


def anonymous_bytes(pid: int | str = "self") -> int:
    """Anonymous resident memory of a process: what it holds beyond mapped files."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)


def interleaved(
    commands: dict[str, Sequence[str]], runs: int, outputs: Sequence[Path]
) -> dict[str, list[Run]]:
    """Each command `runs` times in turn, A B C A B C, after one warm-up of each.

    `outputs` of earlier runs are removed before each, outside the measured time.
    """
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(runs + 1):
        for name, command in commands.items():
            for path in outputs:
                shutil.rmtree(path, ignore_errors=True)
                path.unlink(missing_ok=True)
            os.sync()
            results[name].append(run_process(command))
    return {name: measured[1:] for name, measured in results.items()}


def make_models(
    folder: Path, config: dict[str, Any], num_models: int, samples: tuple[int, int]
) -> list[Path]:
    """Random bfloat16 checkpoints, if not there yet, and typical.jsonl: (rows, tokens) of words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    arch = read_architecture(config)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    specs = {name: TensorSpec(bfloat16, shape) for name, shape in tensor_shapes(arch).items()}
    paths = [folder / f"{arch.num_hidden_layers}-layers-{k}" for k in range(num_models)]
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        path.mkdir(parents=True)
        random = np.random.default_rng(seed)
        with ShardedWriter(path, specs) as writer:
            for name, spec in specs.items():
                values = random.standard_normal(spec.shape, np.float32) * 0.02
                writer.write(name, values.astype(bfloat16))
        (path / "config.json").write_text(json.dumps(config))
        words = {"<unk>": 0} | {f"w{i}": i for i in range(1, config["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
        tokenizer.add_special_tokens(["<unk>"])
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unk>"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(0)
    rows = random.integers(1, config["vocab_size"], samples)
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows]
    (folder / "typical.jsonl").write_text("\n".join(lines))
    return paths


def median(values: Sequence[float]) -> float:
    """The middle value."""
    return statistics.median(values)


def environment(*packages: str) -> dict[str, str]:
    """Machine and versions, to stand beside the figures."""
    found = {"python": platform.python_version(), "machine": processor()}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def report(title: str, rows: Sequence[dict[str, object]], env: dict[str, str]) -> None:
    """Print results as JSON lines under a title."""
    sys.stdout.write(f"{title}\n{json.dumps(env)}\n")
    for row in rows:
        sys.stdout.write(json.dumps(row) + "\n")
