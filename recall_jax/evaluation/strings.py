"""Tasks on short strings of letters; every answer can be checked exactly.

A prompt reads `reverse kdbfa=` and its completion `afbdk`; of `tree` and `nest` it is a structure
in brackets. One string in ten is held out, known by its checksum alone: whatever the task and the
seed, nothing trained on is ever tested.
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
    """One exercise, as `samples.data` of a recipe and the evaluation take it."""

    prompt: str
    completion: str


def reverse(text: str) -> str:
    """The letters from last to first."""
    return text[::-1]


def sort(text: str) -> str:
    """The letters in alphabetical order."""
    return "".join(sorted(text))


def shift(text: str) -> str:
    """Every letter replaced by the next of the alphabet, z by a."""
    return text.translate(str.maketrans(ALPHABET, ALPHABET[1:] + ALPHABET[0]))


def swap(text: str) -> str:
    """First and second letter exchanged, third and fourth, and so on; an odd last one stays."""
    return "".join(text[start : start + 2][::-1] for start in range(0, len(text), 2))


def rotate(text: str) -> str:
    """The first letter moved to the end."""
    return text[1:] + text[:1]


def tree(text: str) -> str:
    """A balanced binary tree over the letters: `abcde` is `((ab)(c(de)))`."""
    if len(text) < 2:
        return text
    middle = len(text) // 2
    return f"({tree(text[:middle])}{tree(text[middle:])})"


def nest(text: str) -> str:
    """Every letter in the bracket of the nearest smaller one before it.

    `kdbfa` is `(k)(d)(b(f))(a)`: a letter closes the open brackets that begin with one not smaller.
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
    """The row that asks for `task` of `text`."""
    return {"prompt": f"{task} {text}=", "completion": TASKS[task](text)}


def is_held_out_string(text: str) -> bool:
    """Whether `text` is for tests only."""
    return zlib.crc32(text.encode()) % _HELD_OUT_IN == 0


def draw_exercises(
    tasks: Sequence[str],
    seed: int,
    *,
    held_out: bool = False,
    lengths: Sequence[int] = LENGTHS,
) -> Iterator[StringRow]:
    """Endless exercises on strings of one split; task, length and letters are drawn uniformly.

    The same rows for the same arguments; a row can come twice.
    """
    rng = random.Random(seed)
    while True:
        text = "".join(rng.choices(ALPHABET, k=rng.choice(lengths)))
        if is_held_out_string(text) == held_out:
            yield exercise(rng.choice(tasks), text)


def draw_distinct(task: str, count: int, seed: int, *, held_out: bool = False) -> list[StringRow]:
    """`count` exercises of `task`, no two alike; InputError for an unknown one."""
    if task not in TASKS:
        raise InputError(f"no task {task!r} on strings: choose from {', '.join(TASKS)}")
    rows: dict[str, StringRow] = {}
    for row in draw_exercises((task,), seed, held_out=held_out):
        rows[row["prompt"]] = row
        if len(rows) == count:
            break
    return list(rows.values())
