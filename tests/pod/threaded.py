"""Processes that are threads: for what they tell each other, without the seconds of starting."""

import threading
from concurrent.futures import ThreadPoolExecutor

from recall_jax.errors import InputError
from recall_jax.parallel.processes import Processes


class Store:
    """What several threads share as processes share the coordination service."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self.lock = threading.Lock()

    def put(self, key, text):
        with self.lock:
            return self.texts.setdefault(key, text) is text

    def get(self, key):
        return self.texts.get(key)

    def under(self, folder):
        with self.lock:
            found = list(self.texts.items())
        start = f"{folder}/"
        return {key.removeprefix(start): text for key, text in found if key.startswith(start)}


def together(count, work):
    """`work(processes)` of each process, in a thread of its own."""
    store = Store()
    failed = threading.Event()

    def check():
        if failed.is_set():
            raise InputError("another process has ended")

    def run(index):
        try:
            return work(Processes(index, count, store, check))
        except BaseException:
            failed.set()
            raise

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))
