"""Define the recipe of an ablation: a RECALL recipe, evaluation tasks, and what to vary."""

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
_CLUSTERED = ("count", "unit", "source")  # axes that affect how samples are chosen


class Tasks(Schema):
    """Group evaluation tasks into those that some of the models were fine-tuned on, and others."""

    seen: Annotated[tuple[Text, ...], Field(min_length=1)]
    unseen: Annotated[tuple[Text, ...], Field(min_length=1)]


class Evaluation(Schema):
    """Set options of `recall evaluate`."""

    limit: Count | None = None
    batch_size: Count = 8
    data_root: Text | None = None


class Ablation(Recipe):
    """Extend a recipe of method `recall` with keys for an ablation.

    `ablate` has the values to try on each axis, None for the default ones. `domains` are files of
    rows for the analyses of the units, by default rows of the tasks; these analyses compare the
    newest and the merged model with `base`, by default the first model.
    """

    tasks: Tasks | Annotated[tuple[Text, ...], Field(min_length=1)]
    evaluate: Evaluation = Evaluation()
    ablate: dict[str, Annotated[tuple[Any, ...], Field(min_length=1)] | None] = dict.fromkeys(AXES)
    domains: Annotated[dict[Name, Text], Field(min_length=2)] | None = None
    base: Text | None = None

    @field_validator("ablate", mode="before")
    @classmethod
    def _axes(cls, value: Any) -> Any:
        """Accept a name, a list of names, or a mapping of names to one or several values."""
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
    def _check_method(self) -> "Ablation":
        if self.merge_method != "recall":
            raise ValueError(f"an ablation needs merge_method recall, not {self.merge_method}")
        if self.weights is not None:
            raise ValueError("weights would fix what is to be varied: remove them")
        return self

    @property
    def recipe(self) -> Recipe:
        """Return the merge recipe, without the keys for the ablation."""
        values = self.model_dump(exclude_none=True)
        return make_recipe({name: values[name] for name in Recipe.model_fields if name in values})

    @property
    def groups(self) -> dict[str, tuple[str, ...]]:
        """Return the groups of tasks whose mean is reported, by name."""
        if isinstance(self.tasks, Tasks):
            seen, unseen = self.tasks.seen, self.tasks.unseen
            return {"all": (*seen, *unseen), "seen": seen, "unseen": unseen}
        return {"all": self.tasks}


@dataclass(frozen=True)
class Variant:
    """Describe a merge of an ablation; `in_recipe` says that the value is the recipe's.

    That merge is the same on all axes.
    """

    axis: str
    value: Any
    recipe: Recipe
    in_recipe: bool

    @property
    def name(self) -> str:
        """Return the name of the run."""
        return RECIPE_RUN if self.in_recipe else f"{self.axis} {label(self.value)}"


RECIPE_RUN = "own"
"""The name of the run of the recipe's merge."""


def read_ablation(path: Path) -> Ablation:
    """Read an ablation from a YAML file; InputError names the file, the key and the fault."""
    return read_yaml(Ablation, path)


def variants(
    ablation: Ablation, check: Callable[[Recipe], None]
) -> tuple[dict[str, list[Variant]], list[str]]:
    """Return the variants of each axis, including the recipe's value, and what is left out and why.

    `check` raises InputError for an impossible merge. Such a value is left out if it is a default,
    and raises InputError if the recipe names it.
    """
    recipe = ablation.recipe
    found: dict[str, list[Variant]] = {}
    left_out: list[str] = []
    for name, named in ablation.ablate.items():
        try:
            _check_axis(name, recipe)
        except InputError as error:
            if named is not None:
                raise
            left_out.append(str(error))
            continue
        found[name] = []
        recipe_value = AXES[name].value_in(recipe)
        for value in _including(recipe_value, named or AXES[name].values):
            try:
                varied = AXES[name].vary(recipe, value)
                check(varied)
            except InputError as error:
                if named is not None:
                    raise InputError(f"ablate.{name}, {label(value)}: {error}") from error
                left_out.append(f"{name} {label(value)}: {error}")
            else:
                found[name].append(Variant(name, value, varied, value == recipe_value))
    return found, left_out


def _check_axis(name: str, recipe: Recipe) -> None:
    assert recipe.samples is not None
    if name in _CLUSTERED and recipe.samples.typical is not None:
        raise InputError(
            f"ablate.{name}: samples.typical are taken as given: give samples.data to choose from"
        )


def _including(recipe_value: Any, values: Sequence[Any]) -> list[Any]:
    """Return the distinct values and the recipe's: sorted numbers, or else the recipe's first."""
    distinct = [value for index, value in enumerate(values) if value not in values[:index]]
    if recipe_value in distinct:
        return distinct
    both = [recipe_value, *distinct]
    return sorted(both) if all(isinstance(value, int | float) for value in both) else both
