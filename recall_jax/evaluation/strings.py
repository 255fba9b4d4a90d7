"""Make exercises on short strings of letters, whose answers can be checked exactly.

A prompt is `reverse kdbfa=` and its completion `afbdk`; the answers of `tree` and `nest` are
structures in brackets. One string in ten is held out, chosen by its checksum: whatever the task and
the seed, no string is used both to train and to test.
"""

import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import ascii_lowercase
from typing import TypedDict

from recall_jax.errors import InputError

ALPHABET = ascii_lowercase
LENGTHS = range(4, 9)
_HELD_OUT_IN = 10


class StringRow(TypedDict):
    """Hold an exercise, in the form of a recipe's `samples.data` and of the evaluation."""

    prompt: str
    completion: str


def reverse(text: str) -> str:
    """Reverse the letters."""
    return text[::-1]


def sort(text: str) -> str:
    """Sort the letters alphabetically."""
    return "".join(sorted(text))


def shift(text: str) -> str:
    """Replace every letter by the next of the alphabet, z by a."""
    return text.translate(str.maketrans(ALPHABET, ALPHABET[1:] + ALPHABET[0]))


def swap(text: str) -> str:
    """Exchange the first and second letter, the third and fourth, and so on."""
    return "".join(text[start : start + 2][::-1] for start in range(0, len(text), 2))


def rotate(text: str) -> str:
    """Move the first letter to the end."""
    return text[1:] + text[:1]


def tree(text: str) -> str:
    """Return a balanced binary tree over the letters: `((ab)(c(de)))` for `abcde`."""
    if len(text) < 2:
        return text
    middle = len(text) // 2
    return f"({tree(text[:middle])}{tree(text[middle:])})"


def nest(text: str) -> str:
    """Nest every letter in the bracket of the nearest smaller letter before it.

    `kdbfa` becomes `(k)(d)(b(f))(a)`: a letter closes the open brackets of letters not smaller.
    """
    answer, opened = "", ""
    for letter in text:
        while opened and opened[-1] >= letter:
            answer, opened = answer + ")", opened[:-1]
        answer, opened = answer + "(" + letter, opened + letter
    return answer + ")" * len(opened)


TASKS: Mapping[str, Callable[[str], str]] = {
    task.__name__: task for task in (reverse, sort, shift, swap, rotate, tree, nest)
}


def exercise(task: str, text: str) -> StringRow:
    """Return the row that asks to apply `task` to `text`."""
    return {"prompt": f"{task} {text}=", "completion": TASKS[task](text)}


def is_held_out_string(text: str) -> bool:
    """Return whether a string is held out from training."""
    return zlib.crc32(text.encode()) % _HELD_OUT_IN == 0


def draw_exercises(
    tasks: Sequence[str],
    seed: int,
    *,
    held_out: bool = False,
    lengths: Sequence[int] = LENGTHS,
) -> Iterator[StringRow]:
    """Yield exercises on strings of one split without end, deterministic for the same arguments.

    Task, length and letters are drawn uniformly; a row may be repeated.
    """
    rng = random.Random(seed)
    while True:
        text = "".join(rng.choices(ALPHABET, k=rng.choice(lengths)))
        if is_held_out_string(text) == held_out:
            yield exercise(rng.choice(tasks), text)


def draw_distinct(task: str, count: int, seed: int, *, held_out: bool = False) -> list[StringRow]:
    """Draw `count` distinct exercises of `task`; InputError for an unknown task."""
    if task not in TASKS:
        raise InputError(f"no task {task!r} on strings: choose from {', '.join(TASKS)}")
    rows: dict[str, StringRow] = {}
    for row in draw_exercises((task,), seed, held_out=held_out):
        rows[row["prompt"]] = row
        if len(rows) == count:
            break
    return list(rows.values())
