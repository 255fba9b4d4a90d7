"""Interpret a row of data as a text, a prompt with its completion, or a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from recall_jax.errors import InputError, escaped, shown

Message = dict[str, Any]


@dataclass(frozen=True)
class Fields:
    """Name the fields to read: that of the text or messages, or those of prompt and completion."""

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def names_pair(self) -> bool:
        """Return whether the names are those of a prompt and its completion."""
        return self.prompt is not None or self.completion is not None

    @property
    def named(self) -> tuple[str, ...]:
        """Return the named fields, which a row must have."""
        if self.text is not None:
            return (self.text,)
        if self.names_pair:
            return (self.prompt or "prompt", self.completion or "completion")
        return ()


USUAL = Fields()


class Pair(NamedTuple):
    """Hold a prompt, and the completion that follows it without a separator."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """Hold messages for a chat template; the first `given` are the prompt of the others."""

    messages: list[Message]
    given: int = 0


# The first of these that a row has all fields of is used.
_SHAPES = (
    ("text",),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
)
_INPUT = "input"  # the optional context of an Alpaca instruction
_SHOWN = 20  # fields of a row listed in a message
# As published: https://github.com/tatsu-lab/stanford_alpaca
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{instruction}\n\n### Response:"
)
_ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "{instruction}\n\n### Input:\n{input}\n\n### Response:"
)
# The speakers of ShareGPT's conversations, by the roles that chat templates use.
_SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "system": "system",
    "tool": "tool",
    "function": "tool",
    "function_response": "tool",
    "observation": "tool",
}


def row_content(row: Mapping[str, Any], where: str, fields: Fields = USUAL) -> str | Pair | Chat:
    """Return the content of a row from the given `fields`, else from the first shape that fits.

    The shapes: `text`; `prompt` and `completion`, texts or lists of messages; `messages`;
    ShareGPT's `conversations`; Alpaca's `instruction`, `input` and `output`, in its published
    prompt. Raises InputError, which begins with `where`, if none of them fits or a field holds no
    text.
    """
    names = _shape(row, fields)
    if missing := [name for name in names if name not in row]:
        raise InputError(f"{where} has no field {shown(missing[0])} (it has {_names(row)})")
    if not names:
        raise InputError(
            f"{where} has neither text, nor prompt and completion, messages, conversations or "
            f"instruction and output (it has {_names(row) or 'no fields'}): name its field with "
            "samples.field"
        )
    if names == ("instruction", "output") and not fields.named:
        return _alpaca(row, where)
    if len(names) == 1:
        (name,) = names
        is_text = name == "text" or (fields.named and not isinstance(row[name], list))
        return _text(row, name, where) if is_text else Chat(_messages(row, name, where))
    prompt, completion = names
    if isinstance(row[prompt], list) and isinstance(row[completion], list):
        given = _messages(row, prompt, where)
        return Chat([*given, *_messages(row, completion, where)], len(given))
    return Pair(_text(row, prompt, where), _text(row, completion, where))


def used_columns(names: Sequence[str], fields: Fields = USUAL) -> Sequence[str]:
    """Return those of a file's fields that `row_content` reads."""
    used = _shape(names, fields)
    if not used or not set(used) <= set(names):
        return names  # for the error message
    return [name for name in names if name in (*used, _INPUT)]


def _shape(names: Mapping[str, Any] | Sequence[str], fields: Fields) -> tuple[str, ...]:
    if fields.named:
        return fields.named
    return next((shape for shape in _SHAPES if all(name in names for name in shape)), ())


def _alpaca(row: Mapping[str, Any], where: str) -> Pair:
    instruction, output = _text(row, "instruction", where), _text(row, "output", where)
    about = _text(row, _INPUT, where) if row.get(_INPUT) is not None else ""
    form = _ALPACA_WITH_INPUT if about else _ALPACA
    return Pair(form.format(instruction=instruction, input=about), output)


def _text(row: Mapping[str, Any], field: str, where: str) -> str:
    value = row[field]
    if not isinstance(value, str):
        raise InputError(f"{where}: field {shown(field)} holds {type(value).__name__}, not text")
    return value


def _messages(row: Mapping[str, Any], field: str, where: str) -> list[Message]:
    if not isinstance(row[field], list):
        raise InputError(f"{where}: {field} is no list of messages")
    return [
        _message(message, f"{where}: message {index} of {field}")
        for index, message in enumerate(row[field])
    ]


def _message(message: Any, where: str) -> Message:
    """Return a message as chat templates take it; ShareGPT's has `from` and `value`."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is no object with role and content")
    if "role" in message or "from" not in message:
        return message
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS or "value" not in message:
        raise InputError(
            f"{where}: from is {shown(speaker)}, and must be, with a value, one of "
            f"{', '.join(_SPEAKERS)}"
        )
    return {"role": _SPEAKERS[speaker], "content": message["value"]}


def _names(row: Mapping[str, Any]) -> str:
    return escaped(", ".join([*map(str, islice(row, _SHOWN)), *["…"][: len(row) > _SHOWN]]))
