"""Split rows into parts, and into token ids, that a loss or score counts or not.

A completion counts and its prompt does not; in a chat the assistant's turns count; all of a plain
text counts.
"""

from itertools import accumulate, chain
from typing import NamedTuple

from recall_jax.errors import InputError
from recall_jax.inputs.row_files import Row
from recall_jax.inputs.shapes import USUAL, Chat, Fields, Pair, row_content
from recall_jax.inputs.tokens import UNLIMITED, Tokenizer, most_characters
from recall_jax.inputs.turns import assistant_turns

RowPart = tuple[str, bool]  # a text, and whether it counts


class Parts(NamedTuple):
    """Hold the parts of a row, and whether a chat template wrote them."""

    parts: list[RowPart]
    is_chat: bool


def row_parts(row: Row, where: str, tokenizer: Tokenizer, fields: Fields = USUAL) -> Parts:
    """Return the parts of a row of data; `fields` names the fields that hold its text.

    Raises InputError, which begins with `where`, for a row without a text, and if the chat template
    refuses its messages or does not separate the assistant's turns from the others.
    """
    content = row_content(row, where, fields)
    if isinstance(content, Pair):
        return Parts([(content.prompt, False), (content.completion, True)], False)
    if isinstance(content, str):
        return Parts([(content, True)], False)
    try:
        return Parts(_chat_parts(content, tokenizer), True)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def tokenize_parts(
    row: Parts,
    tokenizer: Tokenizer,
    where: str,
    end_of_text: int | None = None,
    max_tokens: int = UNLIMITED,
) -> tuple[list[int], list[int]]:
    """Return the token ids of the joined parts, at most `max_tokens`, and 1 for each that counts.

    The token `end_of_text`, if given, is appended to all but chats, and counts. Where a token would
    cross the border of two parts they are tokenised separately, because a model that generates sees
    only the prompt. Raises InputError for a row that tokenises to nothing.
    """
    parts, is_chat = _beginning(row.parts, most_characters(max_tokens)), row.is_chat
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
    return (ids + ending)[:max_tokens], (counted + [1] * len(ending))[:max_tokens]


def _beginning(parts: list[RowPart], most: int) -> list[RowPart]:
    """Truncate the parts to `most` characters in total."""
    kept = []
    for text, counts in parts:
        kept.append((text[:most], counts))
        most -= len(kept[-1][0])
    return kept


def _chat_parts(chat: Chat, tokenizer: Tokenizer) -> list[RowPart]:
    """Return the chat template's text; the assistant's turns count, except those of the prompt."""
    text = tokenizer.chat_text(chat.messages)
    parts, end = [], 0
    for turn in assistant_turns(chat.messages, text, tokenizer, chat.given):
        parts += [(text[end : turn.start], False), (text[turn.start : turn.end], True)]
        end = turn.end
    return [*parts, (text[end:], False)]
