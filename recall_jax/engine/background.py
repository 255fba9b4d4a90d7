"""Run the streamed engine's input and output in threads: a prefetcher and a background queue."""

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
    """Yield `function(item)` for each item in order, computed one item ahead in another thread."""
    with ThreadPoolExecutor(1, "prefetch") as pool:
        coming: deque[Future[_Result]] = deque()
        for item in items:
            coming.append(pool.submit(function, item))
            if len(coming) > 1:
                yield coming.popleft().result()  # not held by a name here: the caller may free it
        while coming:
            yield coming.popleft().result()


class BackgroundQueue:
    """Run submitted work in order in one thread, as a context manager.

    After an error no further work is done, and the error is raised by the next call, or on leaving
    the block.
    """

    def __init__(self, backlog: int) -> None:
        """Start with an empty queue.

        Work of a total size of at most `backlog` waits; submitting more blocks until older work is
        done.
        """
        self._pool = ThreadPoolExecutor(1, "behind")
        self._backlog = backlog
        self._waiting: deque[tuple[Future[Any], int]] = deque()
        self._size = 0  # of the waiting work
        self._failed = False

    def submit(self, work: Callable[..., Any], *arguments: Any, size: int = 1) -> None:
        """Queue the call `work(*arguments)`, which counts `size` while it waits.

        Raises whatever earlier work has raised.
        """
        self.raise_errors()
        while self._waiting and self._size + size > self._backlog:
            self._wait_for_oldest()
        self._waiting.append((self._pool.submit(self._do, work, *arguments), size))
        self._size += size

    def raise_errors(self) -> None:
        """Raise the error of work that has already ended, if it failed."""
        while self._waiting and self._waiting[0][0].done():
            self._wait_for_oldest()

    def wait(self) -> None:
        """Wait for all work; raises whatever any of it raises."""
        while self._waiting:
            self._wait_for_oldest()

    def close(self) -> None:
        """Wait for the running work, and discard what has not begun."""
        self._pool.shutdown(cancel_futures=True)

    def _wait_for_oldest(self) -> None:
        work, size = self._waiting.popleft()
        self._size -= size
        work.result()

    def _do(self, work: Callable[..., Any], *arguments: Any) -> None:
        if self._failed:  # work behind an error is skipped
            return
        try:
            work(*arguments)
        except BaseException:
            self._failed = True
            raise

    def __enter__(self) -> Self:
        """Return the queue; its thread starts with the first work."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Wait for all work; after an exception in the block, only for the running work."""
        try:
            if kind is None:
                self.wait()
        finally:
            self.close()
