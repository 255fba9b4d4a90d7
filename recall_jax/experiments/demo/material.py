"""Locate the models and data that the package ships for the demo.

`checkpoints/<model>` are model folders in Hugging Face format; `data/<task>.jsonl` are the rows
that a fine-tune was trained on, `data/test/<task>.jsonl` held-out rows of every task.
"""

from pathlib import Path

TASKS = ("reverse", "sort", "shift", "swap", "rotate")
"""The string tasks of the demo."""
BASE = "base"
FINE_TUNED = ("reverse", "sort", "shift")
"""Tasks with a fine-tune, which has the task's name; the last is the newest."""
UNSEEN = tuple(task for task in TASKS if task not in FINE_TUNED)

CHECKPOINTS = Path(__file__).parent / "checkpoints"
DATA = Path(__file__).parent / "data"


def training_file(task: str, data: Path = DATA) -> Path:
    """Return the file of rows that the fine-tune of `task` was trained on."""
    return data / f"{task}.jsonl"


def held_out_file(task: str, data: Path = DATA) -> Path:
    """Return the file of held-out rows of `task`."""
    return data / "test" / f"{task}.jsonl"
