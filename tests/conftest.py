"""Strict jax on eight fake CPU devices, before anything imports it."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUMPY_DTYPE_PROMOTION"] = "strict"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import jax
import pytest
from hypothesis import settings

MOST_MAPS = 20_000

settings.register_profile("recall", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("recall")


@pytest.fixture(autouse=True, scope="module")
def few_programs() -> Iterator[None]:
    """Let compiled programs go in time: each holds memory maps, and a process may have 65,530."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and len(maps.read_bytes().splitlines()) > MOST_MAPS:
        jax.clear_caches()
        gc.collect()
