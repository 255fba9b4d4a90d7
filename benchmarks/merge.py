"""Linear merge of three checkpoints of half a gigabyte, whole process, against `cp` and mergekit.

    .venv/bin/python benchmarks/merge.py [--mergekit MERGEKIT_YAML] [--runs 5] [--folder DIR]

The inputs are random bfloat16 weights in Llama format, made once in --folder and read warm. `cp`
copies as many bytes as the merge writes. RECALL is timed on 16 typical samples of 128 tokens.
"""

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
from measure import environment, interleaved, median, report

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import ShardedWriter
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import tensor_shapes

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


def make_models(folder: Path) -> list[Path]:
    """Random checkpoints and typical samples, if they are not there yet."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    arch = read_architecture(CONFIG)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    specs = {name: TensorSpec(bfloat16, shape) for name, shape in tensor_shapes(arch).items()}
    paths = [folder / f"model{k}" for k in range(NUM_MODELS)]
    for seed, path in enumerate(paths):
        if path.exists():
            continue
        path.mkdir(parents=True)
        random = np.random.default_rng(seed)
        with ShardedWriter(path, specs) as writer:
            for name, spec in specs.items():
                values = random.standard_normal(spec.shape, np.float32) * 0.02
                writer.write(name, values.astype(bfloat16))
        (path / "config.json").write_text(json.dumps(CONFIG))
        words = {f"w{i}": i for i in range(CONFIG["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(path / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "w0"}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    random = np.random.default_rng(0)
    rows = random.integers(0, CONFIG["vocab_size"], (16, 128))
    lines = [json.dumps({"text": " ".join(f"w{i}" for i in row)}) for row in rows]
    (folder / "typical.jsonl").write_text("\n".join(lines))
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--mergekit", help="mergekit-yaml of an environment with mergekit")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument(
        "--folder", type=Path, default=Path(tempfile.gettempdir(), "recall_benchmark")
    )
    args = parser.parse_args()
    paths = make_models(args.folder)
    models = "".join(f"- {{model: {path}, parameters: {{weight: 1.0}}}}\n" for path in paths)
    linear = args.folder / "linear.yml"
    linear.write_text(f"merge_method: linear\nmodels:\n{models}dtype: bfloat16\n")
    recall = shutil.which("recall", path=str(Path(sys.executable).parent)) or "recall"
    out, copy = args.folder / "out", args.folder / "copy"
    commands = {
        "recall merge, linear": [recall, "merge", str(linear), str(out)],
        "recall quick, 16 x 128 tokens": [
            recall,
            "quick",
            *map(str, paths),
            "--typical",
            str(args.folder / "typical.jsonl"),
            "--out",
            str(out),
        ],
        "start-up: import jax, find devices": [
            sys.executable,
            "-c",
            "import jax; jax.devices()",
        ],
        "cp of the output": ["cp", str(paths[0] / "model.safetensors"), str(copy)],
        "dd of the output, fsync": [
            "dd",
            f"if={paths[0] / 'model.safetensors'}",
            f"of={copy}",
            "bs=16M",
            "conv=fsync",
        ],
    }
    if args.mergekit:
        kit = args.folder / "mergekit"
        commands["mergekit linear"] = [args.mergekit, str(linear), str(kit), "--lazy-unpickle"]
    results = interleaved(commands, args.runs, [out, copy, args.folder / "mergekit"])
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
    size = (paths[0] / "model.safetensors").stat().st_size
    title = f"merge of {NUM_MODELS} checkpoints of {size / 1e6:.0f} MB, {args.runs} runs, median"
    report(title, rows, environment("jax", "numpy", "recall-jax"))


if __name__ == "__main__":
    main()
