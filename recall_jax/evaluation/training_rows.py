"""Make training rows of a task: the prompts of the evaluation, with the right answers."""

from collections.abc import Sequence

from recall_jax.errors import InputError, shown
from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.task import Generated, Generation, Task
from recall_jax.inputs.row_files import Row


def with_split(task: Task, split: str) -> Task:
    """Return the task with another split; InputError if it has none, or it is the evaluated one."""
    if isinstance(task.source, Generated):
        raise InputError(
            f"{task.task} has no splits, and its rows are held out: recall suite makes rows to "
            "learn from"
        )
    if split not in task.source.splits:
        known = ", ".join(task.source.splits)
        raise InputError(f"{task.task} has no split {shown(split)}: choose from {known}")
    if split == task.split:
        raise InputError(
            f"{task.task} is evaluated on split {shown(split)}: learn from another one"
        )
    return task.model_copy(update={"split": split})


def training_rows(task: Task, examples: Sequence[Example]) -> list[Row]:
    """Return rows for fine-tuning: `prompt` and `completion`, or `text` for a task without answers.

    The completion is the right choice, the first reference, or `no_answer` if there is none. A
    space is inserted before it unless there is white space already.
    """
    return [_row(task, example) for example in examples]


def _row(task: Task, example: Example) -> Row:
    if example.choices:
        answer = example.choices[example.answer]
    elif example.references:
        answer = example.references[0]
    elif task.references is None:
        return {"text": example.prompt}
    else:
        assert isinstance(task.scoring, Generation)
        answer = task.scoring.no_answer or ""
    spaced = example.prompt[-1:].isspace() or answer[:1].isspace()
    return {"prompt": example.prompt, "completion": answer if spaced else f" {answer}"}
