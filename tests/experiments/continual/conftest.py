import pytest
from toys import recall

from recall_jax.evaluation.strings import draw_distinct
from recall_jax.experiments.demo.material import CHECKPOINTS
from recall_jax.inputs.data import write_jsonl

__all__ = ["recall"]


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
