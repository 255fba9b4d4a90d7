"""What the package ships for the demo, and where it lies.

`checkpoints/<model>` are model folders in Hugging Face format; `data/<task>.jsonl` are the rows a
fine-tune was trained on, `data/test/<task>.jsonl` held-out rows of every task.
"""

from pathlib import Path

TASKS = ("reverse", "sort", "shift", "swap", "rotate")
"""Tasks on strings that the demo is about."""
BASE = "base"
FINE_TUNED = ("reverse", "sort", "shift")
"""Tasks with a fine-tune of their own, which has the task's name; the newest is the last."""
UNSEEN = tuple(task for task in TASKS if task not in FINE_TUNED)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DATA = Path(__file__).parent / "data"


def training_file(task: str, data: Path = DATA) -> Path:
    """Rows that the fine-tune of `task` was trained on."""
    return data / f"{task}.jsonl"


def held_out_file(task: str, data: Path = DATA) -> Path:
    """Held-out rows of `task`."""
    return data / "test" / f"{task}.jsonl"
