"""Rows as chains of parts, each counted or not, and as token ids of which some count.

A prompt does not count and its completion does; of messages the assistant's turns do; a plain text
does, whole.
"""

from itertools import accumulate, chain
from typing import Any, NamedTuple

from recall_jax.errors import InputError
from recall_jax.representations.data import Row, row_text
from recall_jax.representations.tokens import UNLIMITED, Tokenizer

Part = tuple[str, bool]  # a text, and whether it counts


class Parts(NamedTuple):
    """The parts of a row; `apart` tells of a chat whether its turns are known, else all counts."""

    parts: list[Part]
    is_chat: bool
    apart: bool


def row_parts(row: Row, where: str, tokenizer: Tokenizer, field: str | None) -> Parts:
    """The parts of a row of data, at `where`; `field` names the one that holds its text.

    Raises InputError for a row without a text, and where the chat template refuses its messages.
    """
    text = row_text(row, where, field)
    if isinstance(text, list):
        try:
            turns = _turns(text, tokenizer)
            return Parts(turns or [(tokenizer.chat_text(text), True)], True, bool(turns))
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    if field is None and "text" not in row:
        return Parts([(row["prompt"], False), (row["completion"], True)], False, True)
    return Parts([(text, True)], False, True)


def tokenize_parts(
    row: Parts, tokenizer: Tokenizer, where: str, end_of_text: int | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the joined parts, and 1 on those that count.

    The token id `end_of_text`, where given, ends all but chats, and counts. Where a token would
    reach over the border of two parts they are tokenised apart, as a model that generates sees the
    prompt. Raises InputError for a row that tokenises to nothing.
    """
    parts, is_chat = row.parts, row.is_chat
    if is_chat:
        end_of_text = None

    def encode(text: str, first: bool = True) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            message = f"{where} holds half a surrogate pair, which is no text: repair it"
            raise InputError(message) from error
        # A chat template writes the special tokens itself.
        ids = tokenizer.encode(text, UNLIMITED, first and not is_chat)
        return ids[:-1] if len(ids) > 1 and ids[-1] == end_of_text else ids

    texts = [text for text, _ in parts]
    ids = encode("".join(texts))
    if not ids or not "".join(texts):
        raise InputError(f"{where} tokenises to nothing: remove it or give it text")
    beginnings = [encode(text) for text in list(accumulate(texts))[:-1]]
    ends = [*map(len, beginnings), len(ids)]
    if any(ids[: len(beginning)] != beginning for beginning in beginnings):
        pieces = [encode(text, first=index == 0) for index, text in enumerate(texts)]
        ids, ends = list(chain(*pieces)), list(accumulate(map(len, pieces)))
    counted, start = [], 0
    for (_, counts), end in zip(parts, ends, strict=True):
        counted += [int(counts)] * (end - start)
        start = end
    ending = [] if end_of_text is None else [end_of_text]
    return ids + ending, counted + [1] * len(ending)


def _turns(messages: list[Any], tokenizer: Tokenizer) -> list[Part]:
    """The template's text with the assistant's turns counted; nothing if it cannot be cut.

    A turn is what the text up to and with it has more than the prompt for it, the text before it
    with the template's beginning of an answer. Each such text has to begin the whole text: a
    template may change what it wrote before, as some do with earlier reasoning.
    """
    whole, parts, end = tokenizer.chat_text(messages), [], 0
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or message.get("role") != "assistant":
            continue
        if index == 0:  # templates do not write the beginning of an answer to nothing
            return []
        prompt = tokenizer.chat_text(messages[:index], add_generation_prompt=True)
        answered = tokenizer.chat_text(messages[: index + 1])
        if not (whole.startswith(answered) and answered.startswith(prompt) and len(prompt) >= end):
            return []
        parts += [(whole[end : len(prompt)], False), (whole[len(prompt) : len(answered)], True)]
        end = len(answered)
    return [*parts, (whole[end:], False)] if parts else []
