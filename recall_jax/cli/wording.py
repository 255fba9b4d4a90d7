"""Settings in messages, called as the command at hand has them.

The rooms below call a setting as recipes do: `samples.count`, `finetune.warmup`. Where the command
has an option of that name, its user is told of that. A message that ends in ways out of different
settings has them in a list: "take less (--memory, samples.count)". Of the list stay those that the
command has at all, as options or as keys of its recipe.
"""

import re
from collections.abc import Sequence
from typing import Any

import typer

# The parts of the recipe that a command reads.
_RECIPES = {
    "merge": {"samples", "parameters"},
    "ablate": {"samples", "parameters", "evaluate"},
    "continual": {"samples", "parameters", "finetune", "evaluate"},
}
_OTHER_NAMES = {"--lora-r": "--lora-rank", "--lora-use-rslora": "--rslora"}
# What takes less of it, where memory does not suffice.
OUT_OF_MEMORY = (
    "out of memory: take less at a time (--memory, --block-size, samples.batch_size, "
    "finetune.batch_size, evaluate.batch_size, samples.max_tokens, finetune.max_tokens, "
    "samples.count, samples.pool), or a machine with more"
)

_KEY = r"(?<![\w./-])(?:samples|parameters|finetune|evaluate)(?:\.[a-z_]+)+(?![\w./-]*\w)"
_ITEM = rf"(?:{_KEY}|--[a-z-]+)"
_LISTS = re.compile(rf" \(({_ITEM}(?:, {_ITEM})*)\)")
_KEYS = re.compile(_KEY)

_line: tuple[typer.Typer, Sequence[str]] = (typer.Typer(), ())


def speak_for(app: typer.Typer, arguments: Sequence[str]) -> None:
    """From now on, word messages for the command that the arguments begin with."""
    global _line
    _line = (app, arguments)


def worded(text: str) -> str:
    """A message for the user of the command at hand."""
    app, arguments = _line
    if not (_KEYS.search(text) or _LISTS.search(text)):
        return text
    command: Any = typer.main.get_command(app)
    for word in arguments:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts}
    parts = _RECIPES.get(command.name, set())

    def called(key: str) -> str:
        name = "--" + key.split(".", 1)[1].replace(".", "-").replace("_", "-")
        name = _OTHER_NAMES.get(name, name)
        return name if name in options else key

    def has(name: str) -> bool:
        return name in options or name.split(".")[0] in parts

    def listed(found: re.Match[str]) -> str:
        names = dict.fromkeys(
            name if name.startswith("--") else called(name) for name in found[1].split(", ")
        )
        kept = ", ".join(filter(has, names))
        return f" ({kept})" if kept else ""

    return _KEYS.sub(lambda found: called(found[0]), _LISTS.sub(listed, text))
