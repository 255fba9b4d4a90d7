"""List the merge methods by name; to add one, write its module here and import it."""

from typing import Any

from recall_jax.methods import (
    average,
    dare,
    linear,
    lm_cocktail,
    magmax,
    opcm,
    recall,
    recall_distill,
    regmean,
    task_arithmetic,
    ties,
)
from recall_jax.methods.method import Method

METHODS: dict[str, Method[Any, Any]] = {
    "recall": recall.METHOD,
    "linear": linear.METHOD,
    "average": average.METHOD,
    "task_arithmetic": task_arithmetic.METHOD,
    "ties": ties.METHOD,
    "dare_linear": dare.LINEAR,
    "dare_ties": dare.TIES,
    "magmax": magmax.METHOD,
    "opcm": opcm.METHOD,
    "regmean": regmean.METHOD,
    "regmean_plusplus": regmean.PLUSPLUS,
    "lm_cocktail": lm_cocktail.METHOD,
    "recall_distill": recall_distill.METHOD,
}
