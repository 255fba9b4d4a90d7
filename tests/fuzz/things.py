"""Every file that is read, how it is damaged for a test, and what then reads it."""

import contextlib
import gzip
import io
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.serialization
import msgpack
import numpy as np
from mutations import damaged_bytes, damaged_header, damaged_json, damaged_yaml
from toys import Toys

from recall_jax.checkpoint.orbax import save_orbax
from recall_jax.checkpoint.pytorch_bin import PytorchFile
from recall_jax.checkpoint.writer import checksums_of
from recall_jax.cli import main
from recall_jax.engine.journal import resume_merge_journal as merging
from recall_jax.engine.pod.gather import gather
from recall_jax.errors import InputError
from recall_jax.evaluation.journal import resume_evaluation_journal as evaluating
from recall_jax.evaluation.layouts import read_layout
from recall_jax.evaluation.task import find_task, task_text
from recall_jax.experiments.ablation.recipe import read_ablation
from recall_jax.experiments.continual.journal import open_journal
from recall_jax.experiments.continual.recipe import read_protocol
from recall_jax.files.results import Results, resume_results
from recall_jax.inputs.samples import read_pool
from recall_jax.inputs.tokens import load_tokenizer
from recall_jax.jobs.stages import load_representations
from recall_jax.jobs.states import read_states
from recall_jax.jobs.trees.files import open_tree, read_leaves
from recall_jax.jobs.trees.places import place_leaves
from recall_jax.report.record import load_report
from recall_jax.training.examples import read_examples

MOST_OUTPUT = 100_000  # characters

Damage = Callable[[bytes, random.Random], bytes]
Use = Callable[[], Any]


@dataclass(frozen=True)
class Thing:
    """A file that is read, how it is damaged, and what then reads it."""

    file: Path
    damage: Damage
    uses: list[Use]
    at_length: list[Use] = field(default_factory=list)  # where there is time


def command(*words: object) -> Use:
    """A command line, run here; its status and what it says are held to the house's rules."""

    def run() -> None:
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            status = main._run([str(word) for word in words])
        said = err.getvalue()
        assert status in (0, 1, 2), said
        assert "a bug in recall" not in said
        *warnings, last = said.splitlines() if said else [""]
        assert all(line.startswith("warning: ") for line in warnings), said
        assert last.startswith("recall: " if status else "warning: " if last else ""), said
        for text in (out.getvalue(), said):
            assert all(line.isprintable() for line in text.split("\n")), text
            assert len(text) < MOST_OUTPUT, text

    return run


def reading(read: Callable[..., Any], *arguments: Any, **options: Any) -> Use:
    """A reader, which may refuse what it finds in one line."""

    def run() -> None:
        try:
            read(*arguments, **options)
        except InputError as error:
            assert len(str(error)) < MOST_OUTPUT, error

    return run


def converting(model: object, out: Path) -> Use:
    """A whole command that reads, writes and publishes."""
    convert = command("convert", model, out, "--to", "huggingface", "--quiet")

    def run() -> None:
        convert()
        shutil.rmtree(out, ignore_errors=True)

    return run


def model_of(toys: Toys, folder: Path) -> Path:
    return Path(shutil.copytree(toys.llama[0], folder / "model"))


def header(toys: Toys, folder: Path) -> Thing:
    model = Path(shutil.copytree(toys.qwen2[0], folder / "model"))
    uses = [command(word, model) for word in ("inspect", "verify")]
    at_length = [converting(model, folder / "out")]
    return Thing(model / "model.safetensors", damaged_header, uses, at_length)


def index(toys: Toys, folder: Path) -> Thing:
    model = model_of(toys, folder)
    uses = [command(word, model) for word in ("inspect", "verify")]
    at_length = [converting(model, folder / "out")]
    return Thing(model / "model.safetensors.index.json", damaged_json, uses, at_length)


def config(toys: Toys, folder: Path) -> Thing:
    model = model_of(toys, folder)
    recipe = {
        "merge_method": "recall",
        "models": [{"model": m} for m in (toys.llama[1], str(model))],
    }
    (folder / "r.yml").write_text(json.dumps(recipe | {"samples": {"data": toys.data}}))
    plan = command("plan", folder / "r.yml", "--devices", "v5e-16")
    uses = [*(command(word, model) for word in ("inspect", "verify")), plan]
    at_length = [converting(model, folder / "out")]
    return Thing(model / "config.json", damaged_json, uses, at_length)


def adapter_config(toys: Toys, folder: Path) -> Thing:
    adapter = Path(shutil.copytree(toys.adapter, folder / "adapter"))
    whole = f"{toys.llama[0]}+{adapter}"
    uses, at_length = (
        [command("inspect", whole), command("verify", adapter)],
        [converting(whole, folder / "out")],
    )
    return Thing(adapter / "adapter_config.json", damaged_json, uses, at_length)


def recipe(toys: Toys, folder: Path) -> Thing:
    path = folder / "recipe.yml"
    first, second = toys.llama
    path.write_text(
        f"merge_method: recall\nmodels:\n- &a {{model: {first}}}\n- {{<<: *a, model: {second}}}\n"
        f"samples: {{data: {toys.data}, count: 4, pool: 8, max_tokens: 9, batch_size: 2}}\n"
        "parameters: {sigma: median, temperature: 0.5, similarity: {rbf: 1, cosine: 2}}\n"
        "dtype: float32\nout_dtype: bfloat16\nignore_config: [trick]\n"
    )
    return Thing(path, damaged_yaml, [command("plan", path, "--devices", "v5e-16")])


def rows(suffix: str) -> Callable[[Toys, Path], Thing]:
    def make(toys: Toys, folder: Path) -> Thing:
        import pyarrow
        import pyarrow.parquet

        path = folder / f"rows.{suffix}"
        some: list[dict[str, Any]] = [
            {"text": "a b", "n": 1},
            {"prompt": "a", "completion": "b"},
            {"messages": [{"role": "user", "content": "a"}]},
            {"conversations": [{"from": "human", "value": "a"}]},
            {"instruction": "a", "input": "b", "output": "c"},
        ]
        lines = [json.dumps(row) for row in some]
        if suffix == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(some[:1] * 5), path)
        elif suffix == "csv":
            path.write_text('text,n\n"a ""b",1\nc,2\n')
        elif suffix == "jsonl.gz":
            path.write_bytes(gzip.compress("\n".join(lines * 20).encode()))
        else:
            path.write_text("\n".join(lines) if suffix == "jsonl" else f"[{','.join(lines)}]")
        damage = {"json": damaged_json, "jsonl": damaged_lines}.get(suffix, damaged_bytes)
        tokenizer = load_tokenizer([Path(toys.llama[0])], "llama")
        pool = reading(read_pool, path, tokenizer, max_tokens=9, pool=2, seed=0)
        examples = reading(read_examples, path, tokenizer, end_of_text=1, max_tokens=9)
        return Thing(path, damage, [pool, examples])

    return make


def damaged_lines(content: bytes, draw: random.Random) -> bytes:
    lines = content.split(b"\n")
    place = draw.randrange(len(lines))
    lines[place] = damaged_json(lines[place], draw)
    return b"\n".join(lines)


QUESTION = {"id": "q", "question": "who", "answers": [{"text": "a", "answer_start": 0}]}
PUBLISHED: dict[str, Any] = {
    "squad": {"data": [{"title": "t", "paragraphs": [{"context": "a b", "qas": [QUESTION]}]}]},
    "race": {
        "id": "r",
        "article": "a",
        "questions": ["q"],
        "options": [["x", "y"]],
        "answers": ["A"],
    },
    "medmcqa": {"question": "q", "opa": "x", "opb": "y", "cop": 1},
}


def published(layout: str) -> Callable[[Toys, Path], Thing]:
    def make(toys: Toys, folder: Path) -> Thing:
        path = folder / "published.json"
        path.write_text(json.dumps(PUBLISHED[layout]))
        return Thing(path, damaged_json, [reading(read_layout, path, layout)])

    return make


def tokenizer(name: str) -> Callable[[Toys, Path], Thing]:
    def make(toys: Toys, folder: Path) -> Thing:
        model = model_of(toys, folder)

        def read(kind: str) -> None:
            found = load_tokenizer([model], kind)
            for special in (True, False):
                found.decode(found.encode("a b \x00é", 5, special))

        return Thing(model / name, damaged_json, [reading(read, "llama")])

    return make


def checksums(toys: Toys, folder: Path) -> Thing:
    model = model_of(toys, folder)
    merged = folder / "merged"
    command("convert", model, merged, "--to", "huggingface", "--quiet")()
    return Thing(merged / "checksums.json", damaged_json, [command("verify", merged)])


def weights(toys: Toys, folder: Path) -> Thing:
    path = folder / "weights.json"
    units = ["embed", "layers.0", "head"]
    path.write_text(
        json.dumps({"format": 2, "models": ["a", "b"], "units": units, "weights": [[0.5] * 3] * 2})
    )
    return Thing(path, damaged_json, [reading(load_report, path)])


def task(toys: Toys, folder: Path) -> Thing:
    path = folder / "task.yml"
    path.write_text(task_text("squad_v2"))
    return Thing(path, damaged_yaml, [reading(find_task, str(path))])


def protocol(toys: Toys, folder: Path) -> Thing:
    path = folder / "protocol.yml"
    path.write_text(
        "base_model: a\ntasks: [{name: x, data: x.jsonl, task: x.yml}]\nseeds: [0, 1]\n"
        "finetune: {method: lora, lora: {rank: 4}}\nstrategies: [sequential, {m: {like: recall}}]\n"
    )
    return Thing(path, damaged_yaml, [reading(read_protocol, path)])


def ablation(toys: Toys, folder: Path) -> Thing:
    path = folder / "ablation.yml"
    path.write_text(Path(__file__).parents[2].joinpath("configs", "ablation.yml").read_text())
    return Thing(path, damaged_yaml, [reading(read_ablation, path)])


LEAVES = {"embed/k": np.arange(6.0, dtype=np.float32), "layers/0/k": np.ones((2, 3), np.float16)}


def leaves_of(name: str) -> None:
    """Read a tree whole, and find its units."""
    found = open_tree(name)
    place_leaves(found.specs, None, name)
    for leaf, array in read_leaves(found, list(found.specs), {}).items():
        spec = found.specs[leaf]
        assert (array.dtype, array.shape) == (spec.dtype, spec.shape)


def tree_of_leaves(name: str, write: Callable[[Path], None], damage: Damage = damaged_bytes) -> Any:
    def make(toys: Toys, folder: Path) -> Thing:
        path = folder / name
        write(path)
        return Thing(path, damage, [reading(leaves_of, str(path))])

    return make


def write_stream(path: Path) -> None:
    packed = {name: flax.serialization.to_bytes(leaf) for name, leaf in LEAVES.items()}
    path.write_bytes(
        b"".join(msgpack.packb((name.split("/"), leaf)) for name, leaf in packed.items())
    )


def write_map(path: Path) -> None:
    nested = {"embed": {"k": LEAVES["embed/k"]}, "layers": {"0": {"k": LEAVES["layers/0/k"]}}}
    path.write_bytes(flax.serialization.msgpack_serialize(nested))


def orbax_metadata(toys: Toys, folder: Path) -> Thing:
    nested = {"embed": {"k": LEAVES["embed/k"]}, "layers": {"0": {"k": LEAVES["layers/0/k"]}}}
    save_orbax(folder, nested)
    path = folder / "tree" / "state" / "_METADATA"
    return Thing(path, damaged_json, [reading(leaves_of, str(folder))])


def pickled(**options: bool) -> Callable[[Toys, Path], Thing]:
    def make(toys: Toys, folder: Path) -> Thing:
        import torch

        path, whole = folder / "pytorch_model.bin", torch.arange(12.0).reshape(3, 4)
        torch.save({"a.weight": whole, "b": whole.T, "c": torch.ones(2).half()}, path, **options)

        def read() -> None:
            file = PytorchFile(path)
            for name, spec in file.specs.items():
                assert file.read(name).shape == spec.shape

        return Thing(path, damaged_bytes, [reading(read)])

    return make


def representations(toys: Toys, folder: Path) -> Thing:
    path = folder / "reps.npz"
    reps = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype(np.float32)
    np.savez_compressed(path, reps=reps, units=np.asarray(["embed", "layers.0", "head"]))
    uses = [reading(load_representations, path), reading(read_states, path)]
    return Thing(path, damaged_bytes, uses)


def part(toys: Toys, folder: Path) -> Thing:
    model = Path(shutil.copytree(toys.qwen2[0], folder / "part"))
    files = checksums_of(model, {})
    content = {"format": 1, "algorithm": "crc32", "run": "a", "process": 0, "processes": 1}
    content |= {"total_size": 9, "weight_map": {"a": "model.safetensors"}, "files": files}
    (model / "part.json").write_text(json.dumps(content))
    joined = folder / "joined"

    def join() -> None:
        try:
            gather([model], joined)
        finally:
            shutil.rmtree(joined, ignore_errors=True)

    return Thing(model / "part.json", damaged_json, [command("verify", model), reading(join)])


def journal(toys: Toys, folder: Path) -> Thing:
    path, identity = folder / "journal.jsonl", {"inputs": {}, "program": {}, "evaluated": {}}
    kept = Results(path, identity)
    kept.keep("a", {"x": [0.5, None]})
    kept.keep("b", {"x": [1.5]})
    whole = path.read_bytes()

    def resumed(resume: Callable[..., Any], *arguments: Any) -> Use:
        def run() -> None:
            found = resume(path, identity, *arguments)
            if isinstance(found, Results):
                assert found.values.items() <= kept.values.items()
            path.write_bytes(whole)  # it may have been mended

        return reading(run)

    uses = [resumed(resume_results, "work"), resumed(open_journal), resumed(evaluating)]

    def damage(content: bytes, draw: random.Random) -> bytes:
        return damaged_lines(content.rstrip(b"\n"), draw) + b"\n"

    return Thing(path, damage, [*uses, resumed(merging, ["a", "b"])])


THINGS: dict[str, Callable[[Toys, Path], Thing]] = {
    "safetensors header": header,
    "index": index,
    "config": config,
    "adapter config": adapter_config,
    "recipe": recipe,
    **{
        f"rows of {suffix}": rows(suffix)
        for suffix in ("jsonl", "json", "csv", "jsonl.gz", "parquet")
    },
}
OTHERS: dict[str, Callable[[Toys, Path], Thing]] = {
    **{f"published rows, {layout}": published(layout) for layout in PUBLISHED},
    "tokenizer": tokenizer("tokenizer.json"),
    "tokenizer config": tokenizer("tokenizer_config.json"),
    "checksums": checksums,
    "weights": weights,
    "task": task,
    "protocol": protocol,
    "ablation": ablation,
    "npz": tree_of_leaves("x.npz", lambda path: np.savez(path, **LEAVES)),
    "compressed npz": tree_of_leaves("x.npz", lambda path: np.savez_compressed(path, **LEAVES)),
    "msgpack": tree_of_leaves("x.msgpack", write_map),
    "msgpack stream": tree_of_leaves("x.streaming", write_stream),
    "orbax metadata": orbax_metadata,
    "pickle": pickled(),
    "old pickle": pickled(_use_new_zipfile_serialization=False),
    "representations": representations,
    "part": part,
    "journal": journal,
}
