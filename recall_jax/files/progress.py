"""Report how far a run has come, and how long each of its stages took."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
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


@dataclass(frozen=True)
class Reporter:
    """Reports on a run: its steps, as a `Progress`; the time of its stages; lines of its plan."""

    progress: Progress = silent
    clock: Clock = field(default_factory=Clock)
    announce: Callable[[str], None] = lambda line: None

    def __call__(
        self, doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
    ) -> None:
        """Report a step."""
        self.progress(doing, done, total, read=read, written=written, note=note)

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Add the block's seconds to stage `name`."""
        return self.clock.stage(name)
