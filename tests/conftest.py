"""Strict jax on fake CPU devices, before anything imports it; programs compiled in haste."""

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
# Its threads spin while they wait: on busy cores a decomposition took 8 times as long with two.
os.environ["OPENBLAS_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from haste import hasten, optimise, show_devices
from hypothesis import settings
from toys import cache

from recall_jax.cli.programs_folder import programs_folder

__all__ = ["cache"]

MOST_MAPS = 20_000

settings.register_profile("recall", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("recall")


def pytest_configure(config: pytest.Config) -> None:
    """Give all workers of a run, and the processes they start, one home of compiled programs."""
    if not hasattr(config, "workerinput"):  # a worker of xdist inherits it
        home = tempfile.TemporaryDirectory(prefix="recall-tests-")
        config.add_cleanup(home.cleanup)
        os.environ["XDG_CACHE_HOME"] = home.name
    jax.config.update("jax_compilation_cache_dir", str(programs_folder()))
    hasten()


def pytest_collection_finish() -> None:
    """Spare the garbage collector what was imported, and what jax traces, which is hardly ever
    garbage: it took a twelfth of the time."""
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Optimise programs hardly at all, as compiling is most of the time; those of tests that are
    marked `optimised` are compiled as users have them. Likewise one device is seen, as each takes
    time to feed, and eight by tests that are marked `eight_devices`."""
    show_devices(8 if item.get_closest_marker("eight_devices") else 1)
    optimise(item.get_closest_marker("optimised") is not None)


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Let compiled programs go in time: each holds memory maps, and a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
