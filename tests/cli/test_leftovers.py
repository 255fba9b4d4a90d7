"""Whatever a command makes of its work, beside OUT there lies what lay there before, and no more.

Every command that writes an OUT is refused, breaks or is stopped after its last byte was written,
and some are refused late for what only their own work can show.
"""

import errno
import json
import os
import re
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from toys import tree, write_rows

from recall_jax.checkpoint.writer import checksums_of
from recall_jax.engine import linear_inputs
from recall_jax.errors import InputError
from recall_jax.evaluation.strings import draw_distinct
from recall_jax.experiments.demo.material import CHECKPOINTS
from recall_jax.files import output
from recall_jax.inputs.data import write_jsonl
from recall_jax.methods import refine


@dataclass(frozen=True)
class Given:
    """What the commands read."""

    folder: Path
    models: list[str]
    data: str

    def recipe(self, name: str, values: dict) -> Path:
        path = self.folder / f"{name}.yml"
        path.write_text(yaml.safe_dump(values))
        return path


@pytest.fixture(scope="module")
def given(toys, tmp_path_factory) -> Given:
    folder = tmp_path_factory.mktemp("given")
    (folder / "sst2").mkdir()
    (folder / "sst2" / "train.tsv").write_text("sentence\tlabel\ngood\t1\n")
    given = Given(folder, toys.llama, toys.data)
    for k, model in enumerate(toys.llama):
        part = folder / f"part{k}"
        part.mkdir()
        shutil.copy(Path(model, "config.json"), part / f"{k}.json")
        content = {"format": 1, "algorithm": "crc32", "run": "0", "process": k, "processes": 2}
        content |= {"total_size": 0, "weight_map": {}, "files": checksums_of(part, {})}
        (part / "part.json").write_text(json.dumps(content))
    return given


def merged(method: str, **values):
    def words(given: Given) -> list:
        entries = [{"model": model} for model in given.models]
        recipe = {"merge_method": method, "models": entries} | values
        if "samples" in values:
            recipe["samples"] = {"data": given.data} | values["samples"]
        return ["merge", given.recipe(method, recipe)]

    return words


def merged_trees(given: Given) -> list:
    from recall_jax.jobs.convert import convert

    trees = [given.folder / f"tree{k}" for k in range(2)]
    for model, place in zip(given.models, trees, strict=True):
        convert(model, place, "npz", force=True)
    entries = [{"model": str(place)} for place in trees]
    return ["merge", given.recipe("trees", {"merge_method": "average", "models": entries})]


def weights(given: Given) -> list:
    reps = given.folder / "reps.npz"
    if not reps.exists():
        from recall_jax.inputs.settings import make_samples
        from recall_jax.jobs.stages import extract, save_representations

        samples = make_samples({"data": given.data, "pool": 5})
        save_representations(reps, extract(given.models, samples))
    return ["weights", "--reps", reps, "--out"]


def continual(given: Given) -> list:
    tasks = []
    for name in ("reverse", "sort"):
        path = given.folder / f"{name}.jsonl"
        write_jsonl(path, draw_distinct(name, 8, 0))
        tasks.append({"name": name, "data": str(path), "task": f"strings_{name}"})
    values = {
        "base_model": str(CHECKPOINTS / "base"),
        "tasks": tasks,
        "finetune": {"steps": 1, "warmup": 0.0, "batch_size": 4, "max_tokens": 32},
        "evaluate": {"limit": 2, "batch_size": 2},
        "strategies": ["sequential"],
    }
    return ["continual", given.recipe("continual", values), "--out"]


def ablate(given: Given) -> list:
    values = {
        "merge_method": "recall",
        "models": [{"model": str(CHECKPOINTS / name)} for name in ("base", "reverse")],
        "samples": {"data": str(given.folder / "reverse.jsonl"), "count": 4},
        "tasks": {"seen": ["strings_reverse"], "unseen": ["strings_sort"]},
        "evaluate": {"limit": 2},
        "ablate": {"temperature": [0.5]},
    }
    write_jsonl(given.folder / "reverse.jsonl", draw_distinct("reverse", 8, 0))
    return ["ablate", given.recipe("ablation", values), "--out"]


def evaluate(given: Given) -> list:
    task = ["--tasks", "strings_reverse", "--limit", "2"]
    return ["evaluate", CHECKPOINTS / "base", *task, "--out"]


QUICK = {
    "merge of trees": merged_trees,
    "select": lambda given: ["select", given.models[0], "--data", given.data, "--out"],
    "extract": lambda given: ["extract", *given.models, "--data", given.data, "--out"],
    "weights": weights,
    "similarity": lambda given: ["similarity", *weights(given)[1:]],
    "rows": lambda given: ["rows", "sst2", "--data-root", given.folder, "--out"],
    "convert": lambda given: ["convert", given.models[0]],
    "convert to orbax": lambda given: ["convert", given.models[0], "--to", "orbax"],
    "convert to npz": lambda given: ["convert", given.models[0], "--to", "npz"],
    "gather": lambda given: ["gather", given.folder / "part0", given.folder / "part1", "--out"],
    "suite": lambda given: ["suite", "strings", "--out"],
    "bench": lambda given: ["bench", "similarity", "--quick", "--samples", "32", "--out"],
    "demo": lambda given: ["demo", "--out"],
}
LONG = {
    "average": merged("average"),
    "recall": merged("recall", samples={"count": 4}),
    "quick": lambda given: ["quick", *given.models, "--data", given.data, "--out"],
    "finetune": lambda given: [
        *("finetune", given.models[0], "--data", given.data, "--steps", "2", "--warmup", "0"),
        *("--save-every", "1", "--out"),
    ],
    "evaluate": evaluate,
    "continual": continual,
    "ablate": ablate,
}
FAULTS = {
    "refused": InputError("refused late"),
    "full disk": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    "ours": RuntimeError("a fault of ours"),
    "memory": MemoryError(),
    "hung up": getattr(signal, "SIGHUP", signal.SIGTERM),
}
STATUSES = dict(zip(FAULTS, (2, 2, 1, 2, 129), strict=True))
SAID = ("refused late", "No space left", "a fault of ours", "out of memory", "hung up")
WORDS = dict(zip(FAULTS, SAID, strict=True))


SLOW = {"bench", "demo", "suite", "recall", "quick", "continual", "ablate"}


def some(commands: dict) -> list:
    """Each quick command with one of the faults, those of all taken in turn; all in the soak."""
    names = list(FAULTS)
    return [
        pytest.param(
            command,
            fault,
            marks=[pytest.mark.soak] if command in SLOW or (number - place) % len(names) else [],
        )
        for place, command in enumerate(commands)
        for number, fault in enumerate(names)
    ]


@pytest.fixture
def break_at_the_end(recall, given, tmp_path, monkeypatch):
    """Run a command whose last step is a fault; what it said, and what is beside OUT."""

    def run(words, fault):
        arguments = words(given)

        def fail(folder):
            error = FAULTS[fault]
            if isinstance(error, int):
                os.kill(os.getpid(), error)
            else:
                raise error

        monkeypatch.setattr(output, "sync_tree", fail)
        (tmp_path / "theirs").write_text("1")
        done = recall(*arguments, tmp_path / "new" / "out")
        assert done.status == STATUSES[fault], done
        assert re.fullmatch(r"recall: [^\n]+\n", done.err), done.err
        assert WORDS[fault] in done.err
        assert (tmp_path / "theirs").read_text() == "1"
        return done.err, sorted(os.listdir(tmp_path))

    return run


@pytest.mark.parametrize(("command", "fault"), some(QUICK))
def test_nothing_is_left_of_what_is_made_at_once(command, fault, break_at_the_end):
    line, left = break_at_the_end(QUICK[command], fault)
    assert left == ["theirs"]
    assert "--resume" not in line


@pytest.mark.parametrize(("command", "fault"), some(LONG))
def test_of_a_long_work_nothing_is_left_that_is_not_told_of(
    command, fault, break_at_the_end, tmp_path
):
    line, left = break_at_the_end(LONG[command], fault)
    # A continual run has measured its base by then, and what comes later is no more refused.
    kept = command == "continual" or fault != "refused"
    assert ("what is done is kept" in line, "with --resume" in line) == (kept, kept)
    assert left == (["new", "theirs"] if kept else ["theirs"])
    if kept:
        assert os.listdir(tmp_path / "new") == [".out.recall-work"]


# ------------------------------------------------------------------ what only the work can show


def bad_row(given: Given) -> str:
    rows = ["abc", "de f", ""]
    return str(write_rows(given.folder / "bad.jsonl", rows))


LATE = {
    "a row without text": (
        lambda given: ["select", given.models[0], "--data", bad_row(given), "--out"],
        "row 2 .from 0. tokenises to nothing",
    ),
    "a unit that is none": (
        lambda given: [*QUICK["select"](given)[:-1], "--unit", "layers.9", "--out"],
        "is not a unit of this model",
    ),
    "layers that are none": (
        lambda given: [*QUICK["similarity"](given)[:-1], "--layers", "9", "--out"],
        "has no unit",
    ),
    "too little memory to extract": (
        lambda given: [*QUICK["extract"](given)[:-1], "--memory", "1MB", "--out"],
        "of memory and may take",
    ),
    "too little memory to choose": (
        lambda given: [*LONG["quick"](given)[:-1], "--memory", "1MB", "--out"],
        "of memory and may take",
    ),
    "a rate that ends the training": (
        lambda given: [*LONG["finetune"](given)[:-3], "--learning-rate", "1e38", "--out"],
        "is nan at step 2",
    ),
    "rows that are damaged": (
        lambda given: ["rows", "sst2", "--data-root", damaged(given), "--out"],
        "train.tsv",
    ),
    "a part that is damaged": (
        lambda given: ["gather", given.folder / "part0", damaged_part(given), "--out"],
        "is damaged",
    ),
}


def damaged(given: Given) -> Path:
    (given.folder / "damaged" / "sst2").mkdir(parents=True, exist_ok=True)
    (given.folder / "damaged" / "sst2" / "train.tsv").write_bytes(b"sentence\tlabel\n\xff\t1\n")
    return given.folder / "damaged"


def damaged_part(given: Given) -> Path:
    part = given.folder / "broken"
    shutil.copytree(given.folder / "part1", part, dirs_exist_ok=True)
    text = (part / "1.json").read_text()
    (part / "1.json").write_text(text[:-2] + " }")
    return part


@pytest.mark.parametrize("case", LATE)
def test_a_late_refusal_leaves_nothing(case, recall, given, tmp_path):
    words, match = LATE[case]
    done = recall(*words(given), tmp_path / "new" / "out")
    assert done.status == 2, done
    assert re.fullmatch(r"recall: [^\n]+\n", done.err), done.err
    assert re.search(match, done.err), done.err
    assert "--resume" not in done.err
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("method", ["regmean", "regmean_plusplus", "recall_distill"])
def test_a_merge_refused_for_memory_has_chosen_nothing(
    method, recall, given, tmp_path, monkeypatch
):
    monkeypatch.setattr(refine, "refining_bytes", lambda *sizes: 1 << 60)
    monkeypatch.setattr(linear_inputs, "gram_bytes", lambda *sizes: 1 << 60)

    def never(*arguments, **options):
        pytest.fail("a model chooses")

    monkeypatch.setattr("recall_jax.engine.per_model_samples.find_typical", never)
    entries = [{"model": model, "data": given.data} for model in given.models]
    values = {"merge_method": method, "models": entries, "samples": {"count": 4}}
    if method == "recall_distill":
        values |= {"base_model": given.models[0], "base_data": given.data, "models": entries * 2}
    done = recall("merge", given.recipe("memory", values), tmp_path / "out")
    assert done.status == 2, done
    assert "and may take" in done.err and "--resume" not in done.err
    assert os.listdir(tmp_path) == []


def test_an_interrupted_demo_promises_no_resume(recall, tmp_path, monkeypatch):
    def stopped(recipe, out, **options):
        with output.work_folder(out) as work:
            work.journal.write_text("one\n")
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("recall_jax.experiments.demo.run.merge", stopped)
    done = recall("demo", "--out", tmp_path / "out")
    assert (done.status, done.err) == (143, "recall: terminated\n")
    assert tree(tmp_path) == {}
