"""Linear merge of three checkpoints of half a gigabyte, whole process, against `cp` and mergekit.

    .venv/bin/python benchmarks/merge.py [--mergekit MERGEKIT_YAML] [--runs 5] [--folder DIR]

The inputs are random bfloat16 weights in Llama format, made once in --folder and read warm. `cp` is
timed on as many bytes as the merge writes, and on as many as it reads. RECALL is timed on 16
typical samples of 128 tokens, its forward passes alone by `recall extract`.
"""

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from measure import Run, environment, interleaved, make_models, median, report

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "rms_norm_eps": 1e-5,
    "dtype": "bfloat16",
}
NUM_MODELS = 3

LINEAR, RECALL = "recall merge, linear", "recall quick, 16 x 128 tokens"
FORWARD = "its forward passes alone: recall extract"
START_UP = "start-up: import jax, find devices"
COPY, COPY_INPUTS = "cp of the output", "cp of the inputs"
MERGEKIT = "mergekit linear"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment with mergekit")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "recall_benchmark")
    )
    args = parser.parse_args()
    paths = make_models(args.folder, CONFIG, NUM_MODELS, (16, 128))
    models = "".join(f"- {{model: {path}, parameters: {{weight: 1.0}}}}\n" for path in paths)
    linear = args.folder / "linear.yml"
    linear.write_text(f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n")
    recall = shutil.which("recall", path=str(Path(sys.executable).parent)) or "recall"
    out, copy, reps = (args.folder / name for name in ("out", "copy", "reps.npz"))
    weights = [str(path / "model.safetensors") for path in paths]
    typical = ["--typical", str(args.folder / "typical.jsonl")]
    names = list(map(str, paths))
    commands = {
        LINEAR: [recall, "merge", str(linear), str(out)],
        RECALL: [recall, "quick", *names, *typical, "--out", str(out)],
        FORWARD: [recall, "extract", *names, *typical, "--out", str(reps)],
        START_UP: [sys.executable, "-c", "import jax; jax.devices()"],
        COPY: ["cp", weights[0], str(copy)],
        COPY_INPUTS: ["sh", "-c", f"mkdir {copy} && cp --parents {' '.join(weights)} {copy}"],
        "dd of the output, fsync": ["dd", f"if={weights[0]}", f"of={copy}", "bs=16M", "conv=fsync"],
    }
    if args.mergekit:
        kit = args.folder / "mergekit"
        commands[MERGEKIT] = [args.mergekit, str(linear), str(kit), "--lazy-unpickle"]
    results = interleaved(commands, args.runs, [out, copy, reps, args.folder / "mergekit"])
    rows: list[dict[str, object]] = []
    for name, runs in results.items():
        seconds = median([run.seconds for run in runs])
        rows.append(
            {
                "what": name,
                "seconds": round(seconds, 3),
                "range": [round(f([run.seconds for run in runs]), 3) for f in (min, max)],
                "peak_anonymous_mb": round(max(run.peak_anonymous_bytes for run in runs) / 1e6),
            }
        )
    rows.append({"what": "ratios", **_ratios(results)})
    size = (paths[0] / "model.safetensors").stat().st_size
    title = f"merge of {NUM_MODELS} checkpoints of {size / 1e6:.0f} MB, {args.runs} runs, median"
    report(title, rows, environment("jax", "numpy", "recall-jax"))


def _ratios(results: dict[str, list[Run]]) -> dict[str, float]:
    """What is promised of a merge, from the medians."""
    took = {name: median([run.seconds for run in runs]) for name, runs in results.items()}
    after_start = took[LINEAR] - took[START_UP]
    ratios = {
        "linear after start-up / cp of the output": after_start / took[COPY],
        "linear after start-up / cp of the inputs": after_start / took[COPY_INPUTS],
        "RECALL / (forward alone + linear merge after start-up)": took[RECALL]
        / (took[FORWARD] + after_start),
    }
    if MERGEKIT in took:
        ratios["linear / mergekit"] = took[LINEAR] / took[MERGEKIT]
    return {name: round(ratio, 3) for name, ratio in ratios.items()}


if __name__ == "__main__":
    main()
