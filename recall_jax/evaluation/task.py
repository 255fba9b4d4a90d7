"""Define the schema of tasks: the source of rows, their prompts, and the scoring of answers.

A task is a YAML file. Those that come with the package are in `tasks/`.
"""

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic import (
    Strict as NoCoercion,
)

from recall_jax.errors import InputError, shown
from recall_jax.evaluation.prompts import check_expression, check_template
from recall_jax.files.schema import Schema, parse_yaml, read_yaml

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")]
Text = Annotated[str, Field(min_length=1)]


def _stay_below(pattern: str) -> str:
    """Return `pattern` if it is a glob pattern that stays below its folder, else ValueError."""
    path = PurePath(pattern)
    if path.anchor or ".." in path.parts:
        raise ValueError(f"{shown(pattern)} leads out of the task's folder: put the files there")
    deep = [part for part in path.parts if "**" in part]
    if not path.parts or "\0" in pattern or len(deep) > 1 or set(deep) - {"**"}:
        raise ValueError(
            f"{shown(pattern)} is no pattern of files: use ** once, as a complete part of the path"
        )
    return pattern


Template = Annotated[Text, AfterValidator(check_template)]
Expression = Annotated[Text, AfterValidator(check_expression)]
Count = Annotated[int, NoCoercion(), Field(ge=1)]
Seed = Annotated[int, NoCoercion(), Field(ge=0, lt=2**32)]
Metric = Literal["exact_match", "squad_exact_match", "squad_f1", "bleu"]


class FileSet(Schema):
    """Select files by a glob pattern below the task's folder, and name their layout."""

    files: Annotated[Text, AfterValidator(_stay_below)]
    layout: Literal["rows", "tsv", "squad", "iwslt", "race", "medmcqa"] = "rows"


class Hub(Schema):
    """Name a data set on the Hugging Face hub by arguments of `datasets.load_dataset`."""

    path: Text
    name: Text | None = None
    data_dir: Text | None = None
    revision: Text | None = None


class Published(Schema):
    """Take rows of a published data set; a split is read from its first file set that exists."""

    splits: dict[str, Annotated[tuple[FileSet, ...], Field(min_length=1)]]
    hub: Hub | None = None


class Generated(Schema):
    """Take rows from a generator of this package."""

    generator: Text
    task: Text
    count: Annotated[Count, Field(le=1_000_000)]
    seed: Seed = 0


class Likelihood(Schema):
    """Choose by the highest log-likelihood, divided by tokens, by bytes, or not at all."""

    by: Literal["likelihood"]
    normalise: Literal["token", "byte", "none"] = "token"


class Generation(Schema):
    """Decode greedily after the prompt, up to the first of the `stop` strings.

    Text that equals `no_answer` once normalised counts as an empty answer.
    """

    by: Literal["generation"]
    max_new_tokens: Annotated[Count, Field(lt=2**31)]
    stop: tuple[Text, ...] = ()
    no_answer: Text | None = None


class Perplexity(Schema):
    """Measure how well a model predicts every token of `prompt`."""

    by: Literal["perplexity"]


def _kind_of_source(value: Any) -> str:
    is_generated = "generator" in value if isinstance(value, dict) else isinstance(value, Generated)
    return "generated" if is_generated else "published"


class Task(Schema):
    """Describe a task: the source of its rows, templates for a row, and the scoring.

    A task with `choices` is scored by accuracy, one with `references` by its `metrics`. With
    neither, `prompt` is a text, scored by perplexity. `prompt` and `choices` are templates of the
    row's fields; `answer`, the index of the right choice, and `references`, a text or a list of
    texts, are expressions.
    """

    task: Name
    about: str = ""
    source: Annotated[
        Annotated[Published, Tag("published")] | Annotated[Generated, Tag("generated")],
        Discriminator(_kind_of_source),
    ]
    split: Text = "test"
    prompt: Template
    choices: Annotated[tuple[Template, ...], Field(min_length=2)] | None = None
    answer: Expression | None = None
    references: Expression | None = None
    metrics: Annotated[tuple[Metric, ...], Field(min_length=1)] | None = None
    scoring: Annotated[Likelihood | Generation | Perplexity, Field(discriminator="by")]

    @model_validator(mode="after")
    def _complete(self) -> "Task":
        if isinstance(self.scoring, Perplexity):
            if any((self.choices, self.answer, self.references, self.metrics)):
                raise ValueError("scoring by perplexity takes the prompt alone, and no answers")
        elif (self.choices is None) == (self.references is None):
            raise ValueError("give either choices (with answer) or references (with metrics)")
        if (self.choices is None) != (self.answer is None):
            raise ValueError("choices and answer belong together")
        if (self.references is None) != (self.metrics is None):
            raise ValueError("references and metrics belong together")
        if self.choices is None and isinstance(self.scoring, Likelihood):
            raise ValueError("scoring by likelihood needs choices")
        if isinstance(self.source, Published) and self.split not in self.source.splits:
            known = ", ".join(self.source.splits)
            raise ValueError(
                f"split {shown(self.split)} is not in source.splits, which has {known}"
            )
        return self


def task_names() -> list[str]:
    """Return the names of the tasks that come with the package."""
    folder = files("recall_jax.evaluation").joinpath("tasks")
    return sorted(path.name.removesuffix(".yml") for path in folder.iterdir())


def task_text(name: str) -> str:
    """Return the YAML of a task that comes with the package."""
    path = files("recall_jax.evaluation").joinpath("tasks", f"{name}.yml")
    return path.read_text(encoding="utf-8")


def find_task(name_or_path: str) -> Task:
    """Return a task of the package by name, or of a YAML file by path; InputError if not found."""
    if name_or_path in task_names():
        return parse_yaml(Task, task_text(name_or_path), f"the task {name_or_path}")
    if Path(name_or_path).suffix in (".yml", ".yaml"):
        return read_yaml(Task, Path(name_or_path))
    known = ", ".join(task_names())
    raise InputError(f"no task {shown(name_or_path)}: choose from {known}, or give a file (.yml)")


def find_tasks(names_or_paths: Sequence[str]) -> list[Task]:
    """Return several tasks by name or path; InputError if there is none, or two have one name."""
    tasks = [find_task(each) for each in names_or_paths]
    names = [task.task for task in tasks]
    if not tasks:
        raise InputError(f"name at least one task: {', '.join(task_names())}")
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"two tasks are called {twice[0]}: give one of them another name")
    return tasks
