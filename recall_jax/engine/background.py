"""Threads of the streamed engine: one works ahead of its user, one behind."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


def prefetch(
    function: Callable[[_Item], _Result], items: Iterable[_Item]
) -> Generator[_Result, None, None]:
    """`function` of each item in order, computed one item ahead in a thread of its own."""
    with ThreadPoolExecutor(1, "prefetch") as pool:
        coming: deque[Future[_Result]] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()  # no name keeps what its user lets go
        while coming:
            yield coming.popleft().result()


class BackgroundQueue:
    """Context manager over a thread that does what it is given, one after the other.

    Its first error ends it, and reaches whoever hands over the next work or leaves the block.
    """

    def __init__(self, backlog: int) -> None:
        """At most `backlog` of work, by its size, waits; handing over more waits for the oldest."""
        self._pool = ThreadPoolExecutor(1, "behind")
        self._backlog = backlog
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._size = 0  # of what waits
        self._failed = False

    def submit(self, work: Callable[..., Any], *arguments: Any, size: int = 1) -> None:
        """Hand over `work(*arguments)`; raises what earlier work raised."""
        self.raise_errors()
        while self._waiting and self._size + size > self._backlog:
            self._wait_for_oldest()
        self._waiting.append((self._pool.submit(self._do, work, *arguments), size))
        self._size += size

    def raise_errors(self) -> None:
        """Raise what work that is done by now has raised."""
        while self._waiting and self._waiting[0][0].done():
            self._wait_for_oldest()

    def wait(self) -> None:
        """For all work; raises what any of it raised."""
        while self._waiting:
            self._wait_for_oldest()

    def close(self) -> None:
        """Wait for what is running; what has not begun is left undone."""
        self._pool.shutdown(cancel_futures=True)

    def _wait_for_oldest(self) -> None:
        work, size = self._waiting.popleft()
        self._size -= size
        work.result()

    def _do(self, work: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:  # what waited behind an error is not to be done
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        """The thread starts with the first work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for all work; if the block failed, only for what is running."""
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()
