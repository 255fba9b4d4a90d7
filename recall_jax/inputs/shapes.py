"""What a row says: a text, a prompt with its completion, or a chat, in the shapes that data has."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from recall_jax.errors import InputError, escaped, shown

Message = dict[str, Any]


@dataclass(frozen=True)
class Fields:
    """The names of the fields of a row, where they are not the usual ones.

    Either of the one with its text or messages, or of its prompt and completion.
    """

    text: str | None = None
    prompt: str | None = None
    completion: str | None = None

    @property
    def names_pair(self) -> bool:
        """Whether the names are of a prompt and its completion."""
        return self.prompt is not None or self.completion is not None

    @property
    def named(self) -> tuple[str, ...]:
        """The fields that a row must have by these names."""
        if self.text is not None:
            return (self.text,)
        if self.names_pair:
            return (self.prompt or "prompt", self.completion or "completion")
        return ()


USUAL = Fields()


class Pair(NamedTuple):
    """A prompt, and the completion that follows it as it stands."""

    prompt: str
    completion: str


class Chat(NamedTuple):
    """Messages for a chat template, of which the first `given` are the prompt of the others."""

    messages: list[Message]
    given: int = 0


# The first of which a row has all fields.
_SHAPES = (
    ("text",),
    ("prompt", "completion"),
    ("messages",),
    ("conversations",),
    ("instruction", "output"),
)
_INPUT = "input"  # what an Alpaca instruction is about, where it is about something
_SHOWN = 20  # fields of a row in a message
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
# Who speaks in ShareGPT's conversations, as chat templates call them.
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
    """What a row says, in the `fields` named, else in the first of these shapes that it has.

    `text`; `prompt` and `completion`, texts or lists of messages; `messages`; ShareGPT's
    `conversations`; Alpaca's `instruction`, `input` and `output`, in its published prompt. Raises
    InputError, which begins with `where`, for a row without any of them or with no text there.
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
    """Of the fields that a file's rows have, those that `row_content` looks at."""
    used = _shape(names, fields)
    if not used or not set(used) <= set(names):
        return names  # of which an error is to tell
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
    """A message as chat templates take it; of ShareGPT's it is `value` that `from` says."""
    if not isinstance(message, dict):
        raise InputError(f"{where} is no object with role and content")
    if "role" in message or "from" not in message:
        return message
    speaker = message["from"]
    if not isinstance(speaker, str) or speaker not in _SPEAKERS or "value" not in message:
        raise InputError(
            f"{where}: from {shown(speaker)} with a value is needed from one of "
            f"{', '.join(_SPEAKERS)}"
        )
    return {"role": _SPEAKERS[speaker], "content": message["value"]}


def _names(row: Mapping[str, Any]) -> str:
    return escaped(", ".join([*map(str, islice(row, _SHOWN)), *["…"][: len(row) > _SHOWN]]))
