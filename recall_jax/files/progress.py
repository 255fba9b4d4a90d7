"""Report how far a run has come, and how long each of its stages took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Describe a function that displays the progress of a run."""

    def __call__(
        self, doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
    ) -> None:
        """Display the current task, and its steps and bytes so far.

        `done` of `total` steps are complete; `note` is displayed if there are no bytes to show.
        """


def silent(
    doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
) -> None:
    """Display nothing."""


@dataclass
class Clock:
    """Sum up the seconds spent in each stage; stages may overlap, each in another thread."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the duration of the block to the stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
