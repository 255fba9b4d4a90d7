"""What `compare_commits.py` runs of a commit: inputs, recipes, and command lines."""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml

TESTS = Path(__file__).parent

# Folders below the one that all commands run in.
QWEN2 = [f"toys/qwen2/{k}" for k in range(3)]
LLAMA = [f"toys/llama/{k}" for k in range(2)]
OTHERS = {family: [f"toys/{family}/{k}" for k in range(2)] for family in ("mistral", "qwen3")}
ADAPTER = "toys/llama/0+toys/llama/adapter"
DEMO = {name: f"demo/checkpoints/{name}" for name in ("base", "reverse", "sort", "shift")}
ROWS = "toys/data.jsonl"
OF_THE_DEMO = re.compile(r"recall_jax/(experiments/)?demo/")  # it moved

# What a recipe names beside the models, by method; one that is in no set needs nothing.
BASED = {
    *("task_arithmetic", "ties", "dare_linear", "dare_ties", "magmax", "opcm", "recall_distill"),
}
WITH_SAMPLES = {"recall", "lm_cocktail"}
WITH_SAMPLES_OF_EACH = {"regmean", "regmean_plusplus", "recall_distill"}
SAMPLES = {"count": 8, "max_tokens": 24}
PARAMETERS: dict[str, dict[str, Any]] = {
    "linear": {"weight": [1.0, 0.25]},
    "task_arithmetic": {"weight": 1.0, "lambda": 0.4},
    "ties": {"weight": 1.0, "density": 0.3},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5, "rescale": "density"},
    "recall_distill": {"steps": 3},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "pairwise": {"reference": "pairwise", "temperature": 0.25},
    "mixed": {"sigma": "dim", "alignment": "center", "similarity": {"rbf": 1, "linear_cka": 2}},
    "procrustes": {"alignment": "procrustes", "similarity": "cosine", "merged_units": "last"},
    "threshold": {"sigma": 0.5, "reference": 0, "threshold": 0.7},
}


def make_inputs(folder: Path, code: Path) -> None:
    """Write the models, rows and tasks that all commits read; `code` is of any, for its demo."""
    import torch
    from toys import SIZES, make_toys, save_relatives
    from transformers import MistralConfig, MistralForCausalLM, Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    toys = folder / "toys"
    make_toys(toys)
    sliding = MistralConfig(**SIZES, sliding_window=8)
    save_relatives(MistralForCausalLM, sliding, torch.bfloat16, toys / "mistral", 2, "1GB")
    tied = Qwen3Config(**SIZES, head_dim=8, tie_word_embeddings=True)
    save_relatives(Qwen3ForCausalLM, tied, torch.float16, toys / "qwen3", 2, "1GB")
    for path in toys.glob("*/*/config.json"):  # all are to know the end of a text
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": 1}, indent=1))
    for part in ("checkpoints", "data"):
        (shipped,) = code.glob(f"recall_jax/**/demo/{part}")
        shutil.copytree(shipped, folder / "demo" / part)
    shutil.copytree(TESTS / "evaluation" / "data", folder / "tasks")


def make_recipes(code: Path, methods: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return those that a commit ships, on less where they take long, and some of every method."""
    made = {}
    for path in sorted((code / "configs").glob("**/*.yml")):
        if path.parent.name != "paper":  # these want models of 7 billion parameters from the hub
            name = "-".join(path.relative_to(code / "configs").with_suffix("").parts)
            made[name] = _made_small(yaml.safe_load(OF_THE_DEMO.sub("demo/", path.read_text())))
    for method in methods:
        made[f"{method}-qwen2"] = _recipe(method, QWEN2)
        made[f"{method}-llama"] = _recipe(method, [*LLAMA, ADAPTER], out_dtype="bfloat16")
    for family, models in OTHERS.items():
        made[f"recall-{family}"] = _recipe("recall", models)
    for name, parameters in VARIANTS.items():
        made[f"recall-{name}"] = _recipe("recall", QWEN2, parameters=parameters)
    generated = SAMPLES | {"source": "generated", "unit": "all"}
    made["recall-generated"] = _recipe("recall", DEMO.values(), samples=generated)
    tree = {"embed": "embed/**", "layers": "layers/**", "axis": 0}
    tokens = SAMPLES | {"data": ROWS, "tokenizer": QWEN2[0]}
    for kind in ("npz", "orbax"):
        models = [f"out/{kind}/{k}" for k in range(3)]
        made[f"{kind}-ties"] = _recipe("ties", models, tree=tree)
        forward = {"samples": tokens, "forward": "commit_cases:apply"}
        made[f"{kind}-recall"] = _recipe("recall", models, tree=tree, **forward)
    return made


def _recipe(method: str, models: Iterable[str], **others: Any) -> dict[str, Any]:
    """A recipe for any models; of a method that is relative to a base, the first is the base."""
    names = list(models)
    made: dict[str, Any] = {"merge_method": method, "parameters": PARAMETERS.get(method, {})}
    if method in BASED:
        made["base_model"] = names.pop(0)
    rows = {}
    if method in WITH_SAMPLES:
        made["samples"] = SAMPLES | {"data": ROWS}
    if method in WITH_SAMPLES_OF_EACH:
        made["samples"], rows = dict(SAMPLES), {"data": ROWS}
    return made | {"models": [{"model": name} | rows for name in names]} | others


def _made_small(values: dict[str, Any]) -> dict[str, Any]:
    if "ablate" in values:
        values["evaluate"] = {"limit": 4, "batch_size": 20}
        values["ablate"] = {axis: tried[-2:] for axis, tried in values["ablate"].items()}
    if "orders" in values:
        tasks = values["tasks"][:2]
        for task, rows in zip(tasks, ("reverse", "sort"), strict=True):
            task["data"] = f"demo/data/{rows}.jsonl"
        values |= {"base_model": DEMO["base"], "tasks": tasks, "seeds": [0]}
        values |= {"orders": [[task["name"] for task in tasks]]}
        values |= {"samples": {"count": 3, "max_tokens": 32}}
        values |= {"evaluate": {"limit": 3, "batch_size": 4}}
        small = {"steps": 2, "batch_size": 4, "max_tokens": 32, "save_every": 0}
        values["finetune"] = {"learning_rate": 1e-3, "warmup": 0.0} | small
    return values


def make_cases(recipes: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return the command lines of each case, which write into the folder `out` alone.

    One with --distributed is run by two processes at once, {} being their number.
    """
    qwen2, two = " ".join(QWEN2), f"{DEMO['base']} {DEMO['shift']}"
    chosen = f"--data {ROWS} --count 8"
    learn = f"finetune {DEMO['base']} --data demo/data/sort.jsonl --steps 4 --batch-size 4"
    learn += " --learning-rate 1e-3 --max-tokens 24"
    ewc = f"{learn} --method ewc --ewc-strength 100"
    cases = {
        "demo": ["demo --out out/demo"],
        "stages": [
            f"select {QWEN2[2]} {chosen} --out out/typical.jsonl",
            f"extract {qwen2} --typical out/typical.jsonl --out out/reps.npz",
            "weights --reps out/reps.npz --out out/weights.json --similarity rbf=0.5,cosine=0.5",
            "merge recipes/recall-qwen2.yml out/weighed --weights out/weights.json",
            "merge recipes/recall-qwen2.yml out/given --typical out/typical.jsonl",
            f"quick {qwen2} {chosen} --shard-size 30KB --out out/quick",
            "verify out/quick",
        ],
        "similarity": [
            f"similarity {qwen2} --data {ROWS} --measure all --out out/toys",
            f"similarity {two} --data demo/data/sort.jsonl --pool 40 --out out/demo",
        ],
        "finetune": [
            f"{learn} --out out/full --validation-share 0.05 --evaluate-every 2 --save-fisher",
            f"{learn} --out out/lora --method lora --lora-rank 4 --accumulate 2",
            f"convert {DEMO['base']}+out/lora out/folded",
            f"{ewc} --out out/ewc --ewc-fisher out/full/ewc/fisher.safetensors",
            f"{ewc} --out out/old --ewc-data demo/data/shift.jsonl --ewc-samples 8",
            f"{learn} --out out/mesh --mesh data=2,fsdp=2 --remat",
        ],
        "evaluate": [
            f"evaluate {two} --tasks strings_reverse,text_topics --limit 8 --out out/demo",
            f"evaluate {two} --tasks sst2,squad_v2,race,medmcqa,iwslt2017_en_fr --limit 3 "
            "--data-root tasks --out out/published",
            "rows iwslt2017_en_fr --data-root tasks --limit 9 --out out/rows.jsonl",
        ],
        "convert": [
            f"convert {ADAPTER} out/folded --dtype float16 --shard-size 30KB",
            f"convert {LLAMA[0]} out/untied --untie",
            *(f"convert {QWEN2[1]} out/{to} --to {to}" for to in ("npz", "orbax")),
            *(f"convert out/{to} out/from-{to}" for to in ("npz", "orbax")),
            *(f"inspect {name} --json" for name in (ADAPTER, "out/npz", "toys/llama/adapter")),
            "plan recipes/recall.yml --devices v5e-16 --json",
        ],
        "mesh": [
            f"merge recipes/{name}.yml out/{name} --mesh data=2,fsdp=2"
            for name in ("recall-qwen2", "ties-llama", "regmean-qwen2", "opcm-llama", "linear")
        ],
        "processes": [
            "merge recipes/recall-qwen2.yml out/recall --distributed --mesh data=2,fsdp=2",
            "merge recipes/ties-llama.yml out/ties --distributed --mesh fsdp=2,tensor=2",
            "merge recipes/dare_ties-qwen2.yml out/part-{} --distributed --parts --mesh fsdp=4",
            "gather out/part-0 out/part-1 --out out/gathered",
            "merge recipes/linear.yml out/orbax --distributed --mesh fsdp=4 --to orbax",
        ],
    }
    for kind in ("npz", "orbax"):
        cases[kind] = [f"convert {QWEN2[k]} out/{kind}/{k} --to {kind}" for k in range(3)]
        cases[kind] += [
            f"merge recipes/{kind}-ties.yml out/ties",
            f"merge recipes/{kind}-recall.yml out/recall",
            f"merge recipes/{kind}-recall.yml out/mesh --mesh fsdp=2",
        ]
    cases["in-memory"] = [*cases["npz"][:3], "IN MEMORY"]
    for name, values in recipes.items():
        if "tree" not in values:
            command = "ablate" if "ablate" in values else "continual"
            words = f"{command} recipes/{name}.yml --out"
            if not values.keys() & {"ablate", "orders"}:
                words = f"merge recipes/{name}.yml"
            cases[f"recipe {name}"] = [f"{words} out/made"]
    return cases


def apply(params: Any, batch: Any) -> list[Any]:
    """A forward for trees, which knows little of what a model does, but needs every layer."""
    import jax.numpy as jnp

    def read(leaf: Any) -> Any:
        return jnp.asarray(leaf, jnp.float32)

    layers, states = params["layers"], [read(params["embed"]["embedding"])[batch["input_ids"]]]
    for i in range(layers["input_layernorm"]["scale"].shape[0]):
        inner = states[-1] @ read(layers["mlp"]["up_proj"]["kernel"][i])
        states.append(states[-1] + jnp.tanh(inner) @ read(layers["mlp"]["down_proj"]["kernel"][i]))
    return [*states, states[-1] * read(params["head"]["norm"]["scale"])]


def merge_in_memory(models: Path, out: Path) -> None:
    """Call the public functions on trees that `recall convert` has written as npz."""
    from compared_files import read_npz
    from flax.traverse_util import flatten_dict, unflatten_dict

    import recall_jax as rj

    trees = [unflatten_dict(read_npz(path), sep="/") for path in sorted(models.glob("*/tree.npz"))]
    draw = np.random.default_rng(0)
    batches = [
        {"input_ids": draw.integers(0, 97, (6, 12)), "attention_mask": np.arange(12) < length}
        for length in draw.integers(2, 12, (4, 6, 1))
    ]

    def unit_of(path: Any) -> Any:
        return ("stacked", 0, "layers.0") if path[0].key == "layers" else path[0].key

    options: dict[str, dict[str, Any]] = {
        "plain": {"count": 5},
        "pairwise": {"reference": "pairwise", "temperature": 0.5, "typical": [0, 3, 17]},
        "mixed": {"similarity": {"rbf": 1, "cosine": 1}, "alignment": "center", "sigma": "dim"},
    }
    made = {}
    for name, chosen in options.items():
        made[name], report = rj.recall_merge(trees, apply, batches, unit_of=unit_of, **chosen)
        (out / f"{name}.json").write_text(json.dumps(report))
    reps = np.stack([rj.extract(apply, tree, batches) for tree in trees])
    similarity, sigma = rj.rbf_similarity(reps)
    weights = np.asarray(rj.layer_weights(similarity, temperature=0.7))
    made["weighed"] = rj.merge_trees(trees, weights, unit_of=unit_of)
    made["numbers"] = {"reps": reps, "similarity": similarity, "sigma": sigma, "weights": weights}
    for name, tree in made.items():
        np.savez(out / f"{name}.npz", **flatten_dict(tree, sep="/"))


if __name__ == "__main__":
    merge_in_memory(Path(sys.argv[1]), Path(sys.argv[2]))
