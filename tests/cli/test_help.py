"""Help: at once, without heavy packages, and with an example that could be run."""

import json
import resource
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from toys import environment

import recall_jax
from recall_jax.cli.main import app


def leaves(group, *path):
    """Every command by its words, those of the groups included."""
    found = {}
    for name, command in group.commands.items():
        words = (*path, name)
        found |= leaves(command, *words) if hasattr(command, "commands") else {words: command}
    return found


COMMANDS = leaves(typer.main.get_command(app))
HEAVY = {"jax", "jaxlib", "flax", "transformers", "torch", "tokenizers", "peft", "numpy"}


def run(*arguments, cache):
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(cache), timeout=60
    )


def test_help_answers_at_once(cache):
    recall = Path(sys.executable).with_name("recall")
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([recall, "--help"], capture_output=True, text=True, timeout=60)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        # time on a processor: what the wall says too, on a machine with nothing else to do
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0 and done.stderr == ""
    assert min(spent) < 1.0
    for command, *_ in COMMANDS:
        assert command in done.stdout


@pytest.mark.parametrize("code", [
    "import recall_jax",
    "import recall_jax; recall_jax.InputError, dir(recall_jax), recall_jax.__version__",
    "from recall_jax.cli.main import main",
])  # fmt: skip
def test_importing_loads_nothing_heavy(code, cache):
    ask = "import json, sys; print(json.dumps(sorted(name.split('.')[0] for name in sys.modules)))"
    done = run("-c", f"{code}; {ask}", cache=cache)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(json.loads(done.stdout)) == set()


def test_help_loads_nothing_heavy(cache):
    code = """
import json, sys
from recall_jax.cli.main import main
for line in (["--help"], *([*command.split(), "--help"] for command in sys.argv[1:])):
    try:
        main(line)
    except SystemExit as end:
        assert not end.code, line
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = run("-c", code, *map(" ".join, COMMANDS), cache=cache)
    assert done.returncode == 0, done.stderr
    assert HEAVY & set(json.loads(done.stdout.splitlines()[-1])) == set()


def test_a_merge_that_runs_no_model_loads_only_what_it_needs(toys, tmp_path, cache):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps({"merge_method": "average", "models": [{"model": toys.llama[0]}]}))
    code = """
import json, sys
from recall_jax.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    assert not end.code
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""
    done = run("-c", code, "merge", str(recipe), str(tmp_path / "out"), "--quiet", cache=cache)
    assert done.returncode == 0, done.stderr
    loaded = set(json.loads(done.stdout.splitlines()[-1]))
    forward = {"flax", "chex", "optax", "tokenizers", "transformers", "torch", "sklearn"}
    assert not loaded & (forward | {"rich", "pyarrow", "huggingface_hub", "orbax"})
    assert "jax" in loaded


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command, recall):
    done = recall(*command, "--help")
    assert done.status == 0 and done.err == ""
    assert done.out.startswith(f"Usage: recall {' '.join(command)} ")
    examples = [line for line in done.out.splitlines() if "Example:" in line]
    assert len(examples) == 1, "an example, on a line of its own"
    words = shlex.split(examples[0].partition("Example:")[2])
    parsed = COMMANDS[command]
    assert tuple(words[: len(command) + 1]) == ("recall", *command)
    # which the command's own parser takes
    parsed.make_context("recall", words[len(command) + 1 :], resilient_parsing=False)
    for parameter in parsed.params:
        assert getattr(parameter, "help", None), f"{parameter.name} has no help"
    options = {name for p in parsed.params for name in p.opts}
    assert {"--quiet", "--debug"} <= options


def test_recall_alone_shows_its_help(recall):
    done = recall()
    assert len((done.out or done.err).splitlines()) > 10
    assert "Usage: recall" in done.out + done.err


def test_every_public_name_is_there():
    for name in recall_jax.__all__:
        assert getattr(recall_jax, name).__doc__
        assert name in dir(recall_jax)
    with pytest.raises(AttributeError, match="nothing"):
        recall_jax.nothing  # noqa: B018
