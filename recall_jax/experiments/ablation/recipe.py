"""The recipe of an ablation: a RECALL recipe, the tasks to ask, and what to vary."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, Strict, field_validator, model_validator

from recall_jax.errors import InputError, shown
from recall_jax.evaluation.task import Name, Text
from recall_jax.experiments.ablation.axes import AXES, label
from recall_jax.files.schema import Schema, read_yaml
from recall_jax.recipes.recipe import Recipe, make_recipe

Count = Annotated[int, Strict(), Field(ge=1)]
_CLUSTERED = ("count", "unit", "source")  # what choosing samples depends on


class Tasks(Schema):
    """Evaluation tasks: those that some of the models were fine-tuned on, and others."""

    seen: Annotated[tuple[Text, ...], Field(min_length=1)]
    unseen: Annotated[tuple[Text, ...], Field(min_length=1)]


class Evaluation(Schema):
    """How models are evaluated, as by `recall evaluate`."""

    limit: Count | None = None
    batch_size: Count = 8
    data_root: Text | None = None


class Ablation(Recipe):
    """A recipe of method `recall`, with what an ablation adds to it.

    `ablate` has the values to try of each axis, None for those that it has by default. `domains`
    are files of rows for the analyses of the units, by default those of the tasks, and `base` the
    model that is looked at there beside the newest and the merged one.
    """

    tasks: Tasks | Annotated[tuple[Text, ...], Field(min_length=1)]
    evaluate: Evaluation = Evaluation()
    ablate: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | None] = dict.fromkeys(AXES)
    domains: Annotated[dict[Name, Text], Field(min_length=2)] | None = None
    base: Text | None = None

    @field_validator("ablate", mode="before")
    @classmethod
    def _axes(cls, value: Any) -> Any:
        """One name, a list of names, or names with the values to try, one or several."""
        if value is None:
            return dict.fromkeys(AXES)
        if isinstance(value, str):
            value = [value]
        if isinstance(value, list | tuple):
            value = {str(name): None for name in value}
        if not isinstance(value, dict):
            raise ValueError("give names of axes, or a mapping such as {count: [5, 20]}")
        for name in value:
            if name not in AXES:
                raise ValueError(f"no axis {shown(name)}: choose from {', '.join(AXES)}")
        return {
            name: each if each is None or isinstance(each, list | tuple) else (each,)
            for name, each in value.items()
        }

    @model_validator(mode="after")
    def _of_recall(self) -> "Ablation":
        if self.merge_method != "recall":
            raise ValueError(f"an ablation is of merge_method recall, not {self.merge_method}")
        if self.weights is not None:
            raise ValueError("weights would settle what is to be varied: remove them")
        return self

    @property
    def recipe(self) -> Recipe:
        """The merge recipe alone."""
        values = self.model_dump(exclude_none=True)
        return make_recipe({name: values[name] for name in Recipe.model_fields if name in values})

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """The tasks whose mean is told, by the group's name."""
        if isinstance(self.tasks, Tasks):
            seen, unseen = self.tasks.seen, self.tasks.unseen
            return {"all": (*seen, *unseen), "seen": seen, "unseen": unseen}
        return {"all": self.tasks}


@dataclass(frozen=True)
class Variant:
    """A merge of an ablation. The recipe's `own` one is the same on all axes."""

    axis: str
    value: Any
    recipe: Recipe
    own: bool

    @property
    def name(self) -> str:
        """What the variant is known by."""
        return OWN if self.own else f"{self.axis} {label(self.value)}"


OWN = "own"


def read_ablation(path: Path) -> Ablation:
    """The ablation in a YAML file, or InputError naming the file, the key and the fault."""
    return read_yaml(Ablation, path)


def variants(
    ablation: Ablation, check: Callable[[Recipe], None]
) -> tuple[dict[str, list[Variant]], list[str]]:
    """The variants of each axis, the recipe's own value among them; and what is left out, and why.

    `check` raises InputError for a merge that cannot be. A value of the default ones that does not
    fit is left out; one that the recipe names raises InputError.
    """
    recipe = ablation.recipe
    found: dict[str, list[Variant]] = {}
    left_out: list[str] = []
    for name, asked in ablation.ablate.items():
        try:
            _check_axis(name, recipe)
        except InputError as error:
            if asked is not None:
                raise
            left_out.append(str(error))
            continue
        found[name] = []
        for value in _with_own(asked or AXES[name].values, AXES[name].own(recipe)):
            try:
                varied = AXES[name].vary(recipe, value)
                check(varied)
            except InputError as error:
                if asked is not None:
                    raise InputError(f"ablate.{name}, {label(value)}: {error}") from error
                left_out.append(f"{name} {label(value)}: {error}")
            else:
                own = value == AXES[name].own(recipe)
                found[name].append(Variant(name, value, varied, own))
    return found, left_out


def _check_axis(name: str, recipe: Recipe) -> None:
    assert recipe.samples is not None
    if name in _CLUSTERED and recipe.samples.typical is not None:
        raise InputError(
            f"ablate.{name}: samples.typical are taken as given: give samples.data to choose from"
        )


def _with_own(values: Sequence[Any], own: Any) -> list[Any]:
    """The values, each once, and the recipe's own: in its place among numbers, else first."""
    distinct = [value for index, value in enumerate(values) if value not in values[:index]]
    if own in distinct:
        return distinct
    both = [own, *distinct]
    return sorted(both) if all(isinstance(value, int | float) for value in both) else both
