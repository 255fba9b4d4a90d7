import jax
import pytest
from toys import cache, recall

__all__ = ["cache", "recall"]


@pytest.fixture(scope="module", autouse=True)
def compile_once(cache):
    """Programs are compiled for the first of several runs alone, as by the command."""
    options = {
        "jax_compilation_cache_dir": str(cache / "recall_jax" / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in options}
    for name, value in options.items():
        jax.config.update(name, value)
    yield
    for name, value in before.items():
        jax.config.update(name, value)
