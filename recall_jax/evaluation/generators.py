"""Generators of rows, for tasks that need no files."""

from collections.abc import Callable, Mapping

from recall_jax.representations.data import Row

Generator = Callable[[str, int, int], list[Row]]
"""From (task, count, seed) to `count` rows, the same for the same arguments."""

GENERATORS: Mapping[str, Generator] = {}
