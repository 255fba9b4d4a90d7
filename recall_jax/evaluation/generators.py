"""List the generators of rows for tasks without files: held-out rows of the offline suites."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from recall_jax.evaluation.library_text import draw_passages
from recall_jax.evaluation.strings import draw_distinct

Generator = Callable[[str, int, int], list[Any]]
"""A function (task, count, seed) -> `count` rows, deterministic."""

GENERATORS: Mapping[str, Generator] = {
    "strings": partial(draw_distinct, held_out=True),
    "text": partial(draw_passages, held_out=True),
}
