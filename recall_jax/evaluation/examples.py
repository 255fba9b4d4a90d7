"""Examples: a task's rows as the prompts that a model sees and the answers that are right."""

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
    """One prompt. Of a multiple choice, the `choices` and which is right; or the `references`.

    It has neither where the prompt itself is the text to be foretold.
    """

    row: int
    prompt: str
    choices: tuple[str, ...] = ()
    answer: int = -1
    references: tuple[str, ...] = ()


def make_examples(task: Task, rows: TaskRows) -> list[Example]:
    """An example of each row; InputError, with its place, for one that lacks what it takes."""
    return [
        _example(task, row, number, place)
        for row, number, place in zip(rows.rows, rows.numbers, rows.places, strict=True)
    ]


def _example(task: Task, row: Row, number: int, place: str) -> Example:
    prompt = render_template(task.prompt, row, place, "prompt")
    if task.references is not None:
        return Example(number, prompt, references=_references(task, row, place))
    if task.choices is None:
        return Example(number, prompt)
    choices = tuple(render_template(choice, row, place, "choices") for choice in task.choices)
    if isinstance(task.scoring, Generation) and not all(map(_WORD.search, choices)):
        raise InputError(
            f"{place}: choices: one of {', '.join(map(repr, choices))} has no word that an answer "
            "could begin with: score by likelihood"
        )
    assert task.answer is not None
    answer = evaluate_expression(task.answer, row, place, "answer")
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise InputError(
            f"{place}: answer: {shown(answer)} is no index from 0 to {len(choices) - 1}: take a "
            "split with labels"
        )
    return Example(number, prompt, choices, answer)


def _references(task: Task, row: Row, place: str) -> tuple[str, ...]:
    assert task.references is not None and task.metrics is not None
    value = evaluate_expression(task.references, row, place, "references")
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{place}: references: {shown(value)} is no text and no list of texts")
    if not texts and (strict := [name for name in task.metrics if name not in UNANSWERABLE]):
        raise InputError(f"{place}: references: there is none, but {strict[0]} needs one")
    return tuple(texts)
