"""What a run tells of itself while it runs: how far it is, and where its time goes."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol


class Progress(Protocol):
    """Whoever watches a run."""

    def __call__(
        self, doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
    ) -> None:
        """Hear what is being done, steps done and in all, bytes read and written so far.

        `note` is shown where no bytes are.
        """


def silent(
    doing: str, done: int, total: int, *, read: int = 0, written: int = 0, note: str = ""
) -> None:
    """Progress that nobody watches."""


@dataclass
class Clock:
    """Seconds spent in each stage; stages may overlap, each in a thread of its own."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the block's seconds to stage `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent
