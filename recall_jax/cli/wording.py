"""Translate the settings in messages to the options of the command that is running.

Messages name settings as recipes do: `samples.count`, `finetune.warmup`. If the command has an
option for one, the option is named instead. A message may end with a list of alternatives: "take
less (--memory, samples.count)". The list is reduced to those that the command has, as options or as
keys of its recipe.
"""

import re
from collections.abc import Sequence
from typing import Any

# The parts of the recipe that a command reads.
_RECIPES = {
    "merge": {"samples", "parameters"},
    "ablate": {"samples", "parameters", "evaluate"},
    "continual": {"samples", "parameters", "finetune", "evaluate"},
}
_OTHER_NAMES = {"--lora-r": "--lora-rank", "--lora-use-rslora": "--rslora"}
# Lists the settings that reduce memory.
OUT_OF_MEMORY = (
    "out of memory: take less at a time (--memory, --block-size, samples.batch_size, "
    "finetune.batch_size, evaluate.batch_size, samples.max_tokens, finetune.max_tokens, "
    "samples.count, samples.pool), or a machine with more"
)

_KEY = r"(?<![\w./-])(?:samples|parameters|finetune|evaluate)(?:\.[a-z_]+)+(?![\w./-]*\w)"
_ITEM = rf"(?:{_KEY}|--[a-z-]+)"
_LISTS = re.compile(rf" \(({_ITEM}(?:, {_ITEM})*)\)")
_KEYS = re.compile(_KEY)

_line: tuple[Any, Sequence[str]] | None = None


def speak_for(command: Any, arguments: Sequence[str]) -> None:
    """Word messages for the command at the beginning of the arguments from now on.

    `command` is the group that typer makes of all commands.
    """
    global _line
    _line = (command, arguments)


def worded(text: str) -> str:
    """Return a message with its settings named as options of the current command."""
    if _line is None or not (_KEYS.search(text) or _LISTS.search(text)):
        return text
    command, arguments = _line
    for word in arguments:
        if word not in getattr(command, "commands", {}):
            break
        command = command.commands[word]
    options = {name for parameter in command.params for name in parameter.opts}
    parts = _RECIPES.get(command.name, set())

    def option_name(key: str) -> str:
        name = "--" + key.split(".", 1)[1].replace(".", "-").replace("_", "-")
        name = _OTHER_NAMES.get(name, name)
        return name if name in options else key

    def has(name: str) -> bool:
        return name in options or name.split(".")[0] in parts

    def listed(found: re.Match[str]) -> str:
        names = dict.fromkeys(
            name if name.startswith("--") else option_name(name) for name in found[1].split(", ")
        )
        kept = ", ".join(filter(has, names))
        return f" ({kept})" if kept else ""

    return _KEYS.sub(lambda found: option_name(found[0]), _LISTS.sub(listed, text))
