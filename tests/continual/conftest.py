import jax
import pytest
from toys import cache, recall

from recall_jax.demo.material import CHECKPOINTS
from recall_jax.evaluation.strings import draw_distinct
from recall_jax.representations.data import write_jsonl

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


@pytest.fixture(scope="session")
def protocol(tmp_path_factory):
    """Values of a recipe on the demo's base: three tasks of a few rows, and one unseen."""
    folder = tmp_path_factory.mktemp("rows")
    tasks = []
    for name in ("reverse", "sort", "shift"):
        write_jsonl(folder / f"{name}.jsonl", draw_distinct(name, 24, 0))
        data = str(folder / f"{name}.jsonl")
        tasks.append({"name": name, "data": data, "task": f"strings_{name}"})
    return {
        "base_model": str(CHECKPOINTS / "base"),
        "tasks": tasks,
        "unseen": ["strings_swap"],
        "finetune": {"steps": 2, "warmup": 0.0, "batch_size": 4, "max_tokens": 32, "save_every": 0},
        "samples": {"count": 3, "max_tokens": 32},
        "evaluate": {"limit": 4, "batch_size": 4},
        "strategies": ["sequential", "average", "recall", "magmax", "joint"],
    }
