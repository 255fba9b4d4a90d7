"""Locate the assistant's turns in the text that a chat template writes.

If the template marks them, with `{% generation %}`, the marks are used. Else turns are located by
rendering the messages before a turn, with the beginning of an answer, and those up to it. Some
templates change earlier turns once others follow, such as Qwen3's, which drops their reasoning:
then the text that changes when the content is replaced is the turn.
"""

from typing import Any, NamedTuple

from recall_jax.errors import InputError
from recall_jax.inputs.tokens import Tokenizer

_OTHER = "\U0010a17e"  # replaces a content: a private-use character on the last plane


class Turn(NamedTuple):
    """Hold the start and end of a span of text, in characters."""

    start: int
    end: int


def assistant_turns(
    messages: list[Any], text: str, tokenizer: Tokenizer, given: int = 0
) -> list[Turn]:
    """Return the assistant's turns in `text`, which the chat template renders from `messages`.

    Turns among the first `given` messages are left out. A turn includes the token that ends it, and
    everything that the model writes before the content, such as reasoning and tool calls. Raises
    InputError if a turn cannot be located.
    """
    marked = tokenizer.marked_answers(messages)
    if marked is not None:
        before = tokenizer.marked_answers(messages[:given]) if given else ()
        turns = [Turn(start, end) for start, end in marked[len(before or ()) :] if start < end]
        if not turns and any(map(_is_answer, messages[given:])):
            raise InputError(
                "the chat template marks none of the assistant's turns with {% generation %}"
            )
        return turns
    turns, begin = [], 0
    for index, message in enumerate(messages):
        if index < given or not _is_answer(message):
            continue
        turn = _locate(messages, index, text, begin, tokenizer)
        if turn is None or not begin <= turn.start <= turn.end:
            raise InputError(
                f"the chat template writes the assistant's turn, message {index} (from 0), so that "
                "it cannot be separated from the others: mark it there with {% generation %}, or "
                "give prompt and completion"
            )
        turns.append(turn)
        begin = turn.end
    return turns


def _is_answer(message: Any) -> bool:
    return isinstance(message, dict) and message.get("role") == "assistant"


def _locate(
    messages: list[Any], index: int, text: str, begin: int, tokenizer: Tokenizer
) -> Turn | None:
    """Return the turn of message `index`, which begins at `begin` or later, or None."""
    answered = tokenizer.chat_text(messages[: index + 1])
    # Templates cannot render the beginning of an answer without messages.
    prompt = tokenizer.chat_text(messages[:index], add_generation_prompt=True) if index else None
    follows = prompt is not None and answered.startswith(prompt)
    if prompt is not None and follows and text.startswith(answered):
        return Turn(len(prompt), len(answered))
    content = _moving(messages, index, text, tokenizer)
    single = _moving(messages[: index + 1], index, answered, tokenizer)
    if content is None or single is None:
        return None
    ending = answered[single.end :]
    end = content.end + (len(ending) if text.startswith(ending, content.end) else 0)
    if prompt is None:
        return Turn(content.start, end)
    if text.startswith(prompt):
        return Turn(len(prompt), end)
    opening = prompt.removeprefix(tokenizer.chat_text(messages[:index]))
    place = text.rfind(opening, begin, content.start) if 0 < len(opening) < len(prompt) else -1
    if place >= 0:
        return Turn(place + len(opening), end)
    # Without such a beginning, as in Mistral's: the text before the content in the answer.
    lead = answered[len(prompt) : single.start] if follows else ""
    return Turn(content.start - len(lead) * text.endswith(lead, begin, content.start), end)


def _moving(messages: list[Any], index: int, text: str, tokenizer: Tokenizer) -> Turn | None:
    """Return the span of `text` that changes when a message's content is replaced, or None."""
    content: Any = _OTHER
    if isinstance(messages[index].get("content"), list):
        content = [{"type": "text", "text": _OTHER}]
    changed = [*messages]
    changed[index] = {**messages[index], "content": content}
    before, found, after = tokenizer.chat_text(changed).partition(_OTHER)
    if not found or _OTHER in after or _OTHER in text or not text.endswith(after):
        return None
    pairs = enumerate(zip(text, before, strict=False))
    start = next((place for place, (mine, its) in pairs if mine != its), len(before))
    return Turn(start, max(start, len(text) - len(after)))
