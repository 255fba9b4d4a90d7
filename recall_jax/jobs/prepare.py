"""Prepare the rule of a recipe's method, or of the weights file that replaces it."""

from pathlib import Path

from recall_jax.engine.journal import MergeJournal
from recall_jax.engine.merge import Entry, Merge, Prepared, Walk
from recall_jax.engine.sources import Inputs
from recall_jax.files.progress import Reporter
from recall_jax.methods.parameters import Parameters
from recall_jax.methods.registry import METHODS
from recall_jax.methods.weights_file import prepare_from_weights
from recall_jax.recipes.recipe import ModelEntry, Recipe
from recall_jax.report.record import load_report


def prepare(recipe: Recipe, walk: Walk, journal: MergeJournal, progress: Reporter) -> Prepared:
    """Give the method what it needs, and return the rule that it prepares.

    Raises InputError and UnfinishedError as the method does.
    """
    method = METHODS[recipe.merge_method]
    base: Entry[Parameters] | None = None
    if recipe.base_model is not None:
        base = ModelEntry(model=recipe.base_model, data=recipe.base_data)
    merge = Merge(
        parameters=recipe.parameters,
        entries=Inputs[Entry[Parameters]](recipe.models, base),
        samples=recipe.samples,
        walk=walk,
        journal=journal,
        progress=progress,
        ignore_tokenizers=recipe.ignore_tokenizers,
    )
    if recipe.weights is not None:
        path = Path(recipe.weights)
        return prepare_from_weights(method, merge, load_report(path), str(path))
    return method.prepare(merge)
