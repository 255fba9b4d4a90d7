"""Make examples of a task's rows: the prompts for a model, and the right answers."""

import re
from dataclasses import dataclass

from recall_jax.errors import InputError, shown
from recall_jax.evaluation.metrics import UNANSWERABLE
from recall_jax.evaluation.prompts import evaluate_expression, render_template
from recall_jax.evaluation.rows import TaskRows
from recall_jax.evaluation.task import Generation, Task
from recall_jax.inputs.row_files import Row

_WORD = re.compile(r"\w")


@dataclass(frozen=True)
class Example:
    """Hold a prompt with its `choices` and the index of the right one, or its `references`.

    Has neither if the prompt is itself the text whose perplexity is measured. `row` is the number
    of the row in its split.
    """

    row: int
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    references: tuple[str, ...] = ()


def make_examples(task: Task, rows: TaskRows) -> list[Example]:
    """Make an example of each row.

    Raises InputError, which names the row, if a template or an expression of the task fails on it
    or has no valid result.
    """
    return [
        _example(task, row, number, where)
        for row, number, where in zip(rows.rows, rows.numbers, rows.places, strict=True)
    ]


def _example(task: Task, row: Row, number: int, where: str) -> Example:
    prompt = render_template(task.prompt, row, where, "prompt")
    if task.references is not None:
        return Example(number, prompt, references=_references(task, row, where))
    if task.choices is None:
        return Example(number, prompt)
    choices = tuple(render_template(choice, row, where, "choices") for choice in task.choices)
    if isinstance(task.scoring, Generation) and not all(map(_WORD.search, choices)):
        raise InputError(
            f"{where}: choices: one of {', '.join(map(repr, choices))} has no word that an answer "
            "could begin with: score by likelihood"
        )
    assert task.answer is not None
    answer = evaluate_expression(task.answer, row, where, "answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"{where}: answer: {shown(answer)} is no index from 0 to {len(choices) - 1}: take a "
            "split with labels"
        )
    return Example(number, prompt, choices, answer)


def _references(task: Task, row: Row, where: str) -> tuple[str, ...]:
    assert task.references is not None and task.metrics is not None
    value = evaluate_expression(task.references, row, where, "references")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{where}: references: {shown(value)} is no text and no list of texts")
    if not texts and (strict := [name for name in task.metrics if name not in UNANSWERABLE]):
        raise InputError(f"{where}: references: there is none, but {strict[0]} needs one")
    return tuple(texts)
