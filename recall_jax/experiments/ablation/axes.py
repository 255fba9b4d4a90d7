"""Define the choices of a RECALL recipe that can be varied, with the values tried by default."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from recall_jax.inputs.settings import FIELD_KEYS
from recall_jax.recipes.recipe import Recipe, make_recipe


@dataclass(frozen=True)
class AblationAxis:
    """Describe a choice: its description, its key in a section of the recipe, values to try."""

    about: str
    section: Literal["samples", "parameters"]
    key: str
    values: tuple[Any, ...]

    def value_in(self, recipe: Recipe) -> Any:
        """Return the recipe's value."""
        return getattr(getattr(recipe, self.section), self.key)

    def vary(self, recipe: Recipe, value: Any) -> Recipe:
        """Return the recipe with another value; InputError if it is invalid there."""
        values = recipe.model_dump(exclude_none=True)
        section = values[self.section] | {self.key: value}
        if self.key == "source" and value != "data":
            section = {
                k: v for k, v in section.items() if k not in ("data", "typical", *FIELD_KEYS)
            }
        return make_recipe(values | {self.section: section})


AXES: Mapping[str, AblationAxis] = {
    "count": AblationAxis("Number of typical samples", "samples", "count", (2, 5, 10, 20, 50, 100)),
    "unit": AblationAxis(
        "Unit whose states are clustered",
        "samples",
        "unit",
        ("embed", "layers.0", "last", "head", "all"),
    ),
    "source": AblationAxis(
        "Source of the samples", "samples", "source", ("data", "generated", "random")
    ),
    "sigma": AblationAxis(
        "Bandwidth of the similarity", "parameters", "sigma", ("median", "dim", 0.1, 1.0, 10.0)
    ),
    "temperature": AblationAxis(
        "Temperature of the weights", "parameters", "temperature", (0.03, 0.1, 0.3, 1.0, 3.0)
    ),
    "reference": AblationAxis(
        "Model that the others are compared with",
        "parameters",
        "reference",
        ("newest", 0, "pairwise"),
    ),
    "merged_units": AblationAxis(
        "Units that are merged; others are the newest model's",
        "parameters",
        "merged_units",
        ("all", "first", "middle", "last"),
    ),
    "threshold": AblationAxis(
        "Similarity below which a unit is the newest model's",
        "parameters",
        "threshold",
        (None, 0.25, 0.5, 0.75, 0.9),
    ),
    "similarity": AblationAxis(
        "Measure of similarity",
        "parameters",
        "similarity",
        (
            "rbf",
            "cosine",
            "linear_cka",
            {"rbf": 0.5, "cosine": 0.5},
            {"rbf": 0.5, "linear_cka": 0.5},
        ),
    ),
    "alignment": AblationAxis(
        "Alignment of the models' states",
        "parameters",
        "alignment",
        ("none", "center", "procrustes"),
    ),
}
"""The axes by their names in a recipe's `ablate`."""


def label(value: Any) -> str:
    """Format a value for tables and pictures."""
    if isinstance(value, Mapping):
        return " + ".join(f"{weight:g} {name}" for name, weight in value.items())
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
