"""Merges of three random models by 1, 2 and 4 processes on this machine, against one without a pod.

    .venv/bin/python benchmarks/pod_merge.py [--runs 3] [--folder DIR] [--hidden-size 768]
                                             [--num-hidden-layers 11] [--method recall]

Each process has one CPU device, and all share the cores: the processes show what each of them reads
and holds; that they save no time here says nothing of machines of their own. The inputs are read
warm, after a run of each that compiles.
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from measure import anonymous_bytes, environment, make_models, median, report

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 11,
    "num_attention_heads": 12,
    "num_key_value_heads": 12,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
COUNTS = (0, 1, 2, 4)  # processes; 0 is the plain engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "recall_pods"))
    parser.add_argument("--hidden-size", type=int, default=768)
    parser.add_argument("--num-hidden-layers", type=int, default=11)
    parser.add_argument("--method", choices=("linear", "recall"), action="append")
    args = parser.parse_args()
    sizes = {"hidden_size": args.hidden_size, "intermediate_size": 8 * args.hidden_size // 3}
    sizes["num_hidden_layers"] = args.num_hidden_layers
    paths = make_models(args.folder, CONFIG | sizes, 3, (8, 64))
    rows: list[dict[str, object]] = []
    for method in args.method or ("linear", "recall"):
        runs: dict[int, list[dict[str, Any]]] = {count: [] for count in COUNTS}
        for _ in range(args.runs + 1):
            for count in COUNTS:
                runs[count].append(_run(args.folder, _recipe(args.folder, method, paths), count))
        rows += [_row(method, count, found[1:]) for count, found in runs.items()]
    size = (paths[0] / "model.safetensors").stat().st_size
    title = f"merge of 3 checkpoints of {size / 1e6:.0f} MB, {args.runs} runs, median"
    report(title, rows, environment("jax", "numpy", "recall-jax"))


def _recipe(folder: Path, method: str, paths: list[Path]) -> Path:
    models = "".join(f"- {{model: {path}, parameters: {{weight: 1.0}}}}\n" for path in paths)
    text = f"merge_method: linear\nmodels:\n{models}"
    if method == "recall":
        models = "".join(f"- {{model: {path}}}\n" for path in paths)
        samples = f"samples: {{typical: {folder / 'typical.jsonl'}}}\n"
        text = f"merge_method: recall\nmodels:\n{models}{samples}"
    (folder / f"{method}.yml").write_text(text)
    return folder / f"{method}.yml"


def _run(folder: Path, recipe: Path, count: int) -> dict[str, Any]:
    """Seconds, and of each process the peak of its anonymous memory and the bytes it read."""
    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    recall = shutil.which("recall", path=str(Path(sys.executable).parent)) or "recall"
    command = [recall, "merge", str(recipe), str(out), "--quiet"]
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    if count:
        command += ["--distributed"]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        env |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    start = time.perf_counter()
    processes = [
        subprocess.Popen(command, env=env | ({"JAX_PROCESS_ID": str(index)} if count else {}))
        for index in range(max(count, 1))
    ]
    peaks = [0] * len(processes)
    while any(process.poll() is None for process in processes):
        peaks = [
            max(peak, anonymous_bytes(p.pid)) for peak, p in zip(peaks, processes, strict=True)
        ]
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    if any(process.returncode for process in processes):
        raise SystemExit(f"{' '.join(command)} failed")
    told = json.loads((out / "recall_report.json").read_text())
    each = told.get("processes") or [{"read": told["bytes"]["read"]}]
    return {
        "seconds": seconds,
        "total_s": told["timing_s"]["total"],
        "peak": max(peaks),
        "read": [process["read"] for process in each],
    }


def _row(method: str, count: int, runs: list[dict[str, Any]]) -> dict[str, object]:
    return {
        "what": f"{method}, " + (f"{count} of a pod" if count else "plain"),
        "seconds": round(median([run["seconds"] for run in runs]), 2),
        "range": [round(f(run["seconds"] for run in runs), 2) for f in (min, max)],
        "merge_s": round(median([run["total_s"] for run in runs]), 2),
        "peak_anonymous_mb": round(max(run["peak"] for run in runs) / 1e6),
        "read_mb": [round(size / 1e6, 1) for size in runs[-1]["read"]],
    }


if __name__ == "__main__":
    main()
