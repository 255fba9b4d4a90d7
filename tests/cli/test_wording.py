"""Messages speak of options where the command has them, and of keys where its recipe has."""

import json
import re

import pytest
import typer
from toys import write_rows

from recall_jax.cli.main import app
from recall_jax.cli.wording import OUT_OF_MEMORY, speak_for, worded
from recall_jax.errors import InputError
from recall_jax.jobs import convert as conversion

GROUP = typer.main.get_command(app)
COMMANDS = [[name] for name in GROUP.commands if name != "bench"] + [["bench", "similarity"]]
READS = {"merge": "samples", "ablate": "samples evaluate", "continual": "samples finetune evaluate"}


def told(command: str, text: str) -> str:
    speak_for(GROUP, command.split())
    return worded(text)


@pytest.mark.parametrize(
    ("command", "text", "expected"),
    [
        ("quick", "name its field with samples.field", "name its field with --field"),
        ("merge", "name its field with samples.field", "name its field with samples.field"),
        ("finetune", "name its field with samples.field", "name its field with --field"),
        ("finetune", "finetune.warmup 3.0: a share", "--warmup 3.0: a share"),
        ("finetune", "finetune.lora.r 0", "--lora-rank 0"),
        ("continual", "finetune.warmup 3.0: a share", "finetune.warmup 3.0: a share"),
        ("weights", "options: parameters.sigma should be", "options: --sigma should be"),
        ("evaluate", "name DIR as evaluate.data_root", "name DIR as --data-root"),
        ("ablate", "name DIR as evaluate.data_root", "name DIR as evaluate.data_root"),
        ("quick", "fewer (--memory, samples.count)", "fewer (--memory, --count)"),
        ("merge", "fewer (--memory, samples.count)", "fewer (--memory, samples.count)"),
        ("continual", "fewer (--memory, samples.count)", "fewer (samples.count)"),
        ("extract", "fewer (--memory, samples.count)", "fewer (--memory)"),
        ("demo", "fewer (--memory, samples.count): what", "fewer: what"),
        # files are no settings
        ("quick", "no file /data/samples.count", "no file /data/samples.count"),
        ("quick", "samples.field.jsonl is empty", "samples.field.jsonl is empty"),
        ("quick", "samples.jsonl is empty", "samples.jsonl is empty"),
        ("quick", "two ways (as said, or not)", "two ways (as said, or not)"),
    ],
)
def test_a_setting_is_called_as_the_command_has_it(command, text, expected):
    assert told(command, text) == expected


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_where_memory_ends_a_command_names_what_it_has(words):
    command = GROUP
    for word in words:
        command = command.commands[word]
    has = {name for parameter in command.params for name in parameter.opts}
    line = told(" ".join(words), OUT_OF_MEMORY)
    named = set(re.findall(r"--[a-z-]+", line))
    assert named <= has
    assert named >= has & {"--memory", "--batch-size", "--max-tokens", "--count"}
    keys = {key.split(".")[0] for key in re.findall(r"[a-z]+\.[a-z_]+", line)}
    assert keys == set(READS.get(words[0], "").split())
    assert "()" not in line and "  " not in line


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 123 bytes."),
        RuntimeError("INTERNAL: Failed to allocate 123 bytes for a constant"),
        RuntimeError("std::bad_alloc"),
        OSError(12, "Cannot allocate memory"),
    ],
    ids=str,
)
def test_memory_that_does_not_suffice_is_one_line(error, recall, toys, monkeypatch):
    def fail(*_):
        raise error

    monkeypatch.setattr(conversion, "describe_checkpoint", fail)
    done = recall("inspect", toys.llama[0])
    line = "recall: out of memory: take less at a time, or a machine with more\n"
    assert (done.status, done.err) == (2, line)


# What is wrong, to a command of options, and to one of a recipe: each in its own words.
WRONG = {
    "field": ({}, "name its field with {}", "field"),
    "unit": ({"unit": "layers.9"}, "{} 'layers.9' is not a unit of this model", "unit"),
    "sigma": ({"sigma": -1}, "{} should be", "sigma"),
}


@pytest.mark.parametrize("case", WRONG)
def test_quick_says_options_and_merge_says_keys(case, recall, toys, tmp_path):
    changes, words, name = WRONG[case]
    rows = write_rows(tmp_path / "rows.jsonl", ["ab", "cd e", "f g"] * 8)
    if case == "field":
        rows.write_text('{"words": "ab"}\n')
    sigma = {key: value for key, value in changes.items() if key == "sigma"}
    unit = {key: value for key, value in changes.items() if key == "unit"}
    values = {
        "merge_method": "recall",
        "models": [{"model": model} for model in toys.llama],
        "samples": {"data": str(rows), **unit},
        "parameters": sigma,
    }
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(values))
    options = [word for key, value in (sigma | unit).items() for word in (f"--{key}", value)]
    quick = recall("quick", *toys.llama, "--data", rows, "--out", tmp_path / "out", *options)
    merge = recall("merge", recipe, tmp_path / "out")
    assert (quick.status, merge.status) == (2, 2)
    section = "parameters" if name == "sigma" else "samples"
    assert re.search(words.format(f"--{name}"), quick.err), quick.err
    assert re.search(words.format(rf"{section}\.{name}"), merge.err), merge.err


def test_warnings_are_worded_as_well(recall, toys, monkeypatch):
    from recall_jax.cli import console

    def describe(*_):
        console.warn(["cut by finetune.max_tokens"])
        raise InputError("try samples.count")

    monkeypatch.setattr(conversion, "describe_checkpoint", describe)
    done = recall("inspect", toys.llama[0])
    assert done.err == "warning: cut by finetune.max_tokens\nrecall: try samples.count\n"
    monkeypatch.setattr("recall_jax.jobs.stages.select", lambda *_, **options: describe(None))
    done = recall("select", toys.llama[0], "--data", toys.data, "--out", "none.jsonl")
    assert done.err == "warning: cut by --max-tokens\nrecall: try --count\n"
