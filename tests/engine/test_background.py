"""Threads that work ahead and behind: in order, bounded, and one error ends all."""

import threading
import time

import pytest

from recall_jax.engine.background import BackgroundQueue, prefetch


def test_ahead_keeps_the_order_and_is_one_item_prefetch():
    started = []

    def double(item):
        started.append(item)
        return 2 * item

    results = prefetch(double, range(5))
    assert next(results) == 0
    for _ in range(100):
        if len(started) == 2:
            break
        time.sleep(0.01)
    assert started == [0, 1]
    assert list(results) == [2, 4, 6, 8]
    assert list(prefetch(double, [])) == []


def test_an_error_ahead_comes_where_its_item_is_due():
    results = prefetch(lambda item: 1 // item, [1, 0, 1])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_work_is_done_in_order_in_one_thread():
    done = []
    with BackgroundQueue(backlog=2) as queue:
        for item in range(10):
            queue.submit(lambda item: done.append((item, threading.get_ident())), item)
    assert [item for item, _ in done] == list(range(10))
    assert len({thread for _, thread in done}) == 1


def test_the_backlog_is_bounded():
    gate, begun = threading.Event(), []

    def work(item):
        begun.append(item)
        gate.wait()

    with BackgroundQueue(backlog=2) as queue:
        queue.submit(work, 0)
        queue.submit(work, 1)
        handing = threading.Thread(target=queue.submit, args=(work, 2))
        handing.start()
        handing.join(0.1)
        assert handing.is_alive()
        gate.set()
        handing.join(5)
    assert begun == [0, 1, 2]


def test_after_an_error_nothing_more_is_done_and_it_is_raised_once():
    done = []

    def work(item):
        if item == 1:
            raise OSError("disk")
        done.append(item)

    with pytest.raises(OSError, match="disk"), BackgroundQueue(backlog=3) as queue:
        for item in range(50):
            queue.submit(work, item)
    assert done == [0]


def test_the_blocks_own_error_wins_and_drops_what_waits():
    gate, done = threading.Event(), []
    with pytest.raises(KeyError), BackgroundQueue(backlog=9) as queue:
        queue.submit(gate.wait)
        queue.submit(done.append, 1)
        gate.set()
        raise KeyError
    assert done in ([], [1])  # it may have begun before the block failed
