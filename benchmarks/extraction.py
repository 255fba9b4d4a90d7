"""Pooled hidden states of every unit: this project against transformers on torch, on one CPU.

    .venv/bin/python benchmarks/extraction.py [--layers 16] [--rows 8] [--tokens 256] [--batch 8]

Each side runs in a process of its own, on the same random float32 weights' shapes (Llama, hidden
size 2048: 16 layers are a billion parameters), the same token ids and batches. Memory is the peak
of anonymous memory beyond what the process held once its weights were there.
"""

import argparse
import json
import sys
import threading
import time

import numpy as np
from measure import anonymous_bytes, environment, report, run_process

CONFIG = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
}


class PeakMemory:
    """Peak of this process's anonymous memory while the block runs."""

    def __enter__(self) -> "PeakMemory":
        self.start = self.peak = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(0.01):
            self.peak = max(self.peak, anonymous_bytes())

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


def batches(args: argparse.Namespace) -> list[np.ndarray]:
    ids = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (args.rows, args.tokens))
    return [ids[i : i + args.batch].astype(np.int32) for i in range(0, args.rows, args.batch)]


def measure(extract, num_tokens: int) -> None:
    """Print seconds of the first pass, tokens a second of the second, and memory."""
    with PeakMemory() as memory:
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            extract()
            seconds.append(time.perf_counter() - start)
    result = {
        "tokens_per_second": round(num_tokens / seconds[1], 1),
        "first_pass_seconds": round(seconds[0], 2),
        "weights_mb": round(memory.start / 1e6),
        "peak_beyond_weights_mb": round((memory.peak - memory.start) / 1e6),
    }
    sys.stdout.write(json.dumps(result) + "\n")


def with_jax(args: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    import recall_jax as rj
    from recall_jax.models.config import read_architecture
    from recall_jax.models.forward import forward, init_params
    from recall_jax.representations.pooling import masked_mean

    arch = read_architecture(CONFIG | {"num_hidden_layers": args.layers})
    tree = jax.block_until_ready(init_params(arch, jax.random.key(0, impl="rbg")))

    def apply_fn(params, batch):
        mask = batch["attention_mask"]
        pooled, _ = forward(
            arch, params, batch["input_ids"], mask, observe=lambda hidden: masked_mean(hidden, mask)
        )
        return pooled

    data = [{"input_ids": ids, "attention_mask": np.ones_like(ids)} for ids in batches(args)]
    jnp.zeros(1).block_until_ready()
    measure(lambda: rj.extract(apply_fn, tree, data), args.rows * args.tokens)


def with_torch(args: argparse.Namespace) -> None:
    import torch
    from transformers import LlamaConfig, LlamaModel

    config = {k: v for k, v in CONFIG.items() if k != "model_type"}
    model = LlamaModel(LlamaConfig(**config, num_hidden_layers=args.layers)).eval()
    data = [torch.tensor(ids, dtype=torch.long) for ids in batches(args)]

    @torch.no_grad()
    def extract() -> None:
        pooled = []
        for ids in data:
            mask = torch.ones_like(ids)
            hidden = model(ids, attention_mask=mask, output_hidden_states=True).hidden_states
            pooled.append(torch.stack([states.mean(dim=1) for states in hidden]))
        torch.cat(pooled, dim=1).numpy()

    measure(extract, args.rows * args.tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("layers", 16), ("rows", 8), ("tokens", 256), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return with_jax(args) if args.worker == "jax" else with_torch(args)
    rows = []
    for worker in ("torch", "jax"):
        run = run_process([sys.executable, *sys.argv, "--worker", worker])
        rows.append({"what": worker, **json.loads(run.output.strip().splitlines()[-1])})
    shape = f"{args.layers} layers, {args.rows} rows of {args.tokens} tokens in {args.batch}s"
    report(f"extraction, float32, {shape}", rows, environment("jax", "torch", "transformers"))
    return None


if __name__ == "__main__":
    main()
