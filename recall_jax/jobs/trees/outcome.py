"""Write the files that accompany a merged tree, and resolve the paths of its recipe."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.companions import CONFIG_NAME, copy_companions
from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.engine.configs import config_warnings
from recall_jax.errors import storage_faults
from recall_jax.files.json_objects import read_json_object
from recall_jax.inputs.data import write_jsonl
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import TYPICAL
from recall_jax.inputs.vocabularies import compare_vocabularies
from recall_jax.jobs.outcome import PAGE, RECIPE, REPORT
from recall_jax.jobs.trees.files import TreeFile
from recall_jax.jobs.trees.samples import TreeSamples
from recall_jax.recipes.recipe import Recipe
from recall_jax.report.card import model_card
from recall_jax.report.html import render_html
from recall_jax.report.record import write_report


def write_tree_outcome(
    folder: Path,
    out_name: str,
    recipe: Recipe,
    samples: TreeSamples | None,
    report: dict[str, Any],
) -> None:
    """Write everything in OUT except the tree and its checksums; `recipe` is resolved.

    If the newest model was converted from Hugging Face's format, its config, tokenizer and other
    files are copied. Warnings about these, and about differing configs and tokenizers, are added to
    the report.
    """
    named = [*([recipe.base_model] if recipe.base_model else []), *(e.model for e in recipe.models)]
    for difference in compare_vocabularies(named[-1], {name: [Path(name)] for name in named}):
        report["warnings"] += difference.warnings()
    configs = [(name, Path(name, CONFIG_NAME)) for name in named]
    if configs[-1][1].is_file():
        found = [(name, read_json_object(path)) for name, path in configs if path.is_file()]
        report["warnings"] += config_warnings(found)
    report["warnings"] += _copy_companions(named, folder, recipe.out_dtype or recipe.dtype)
    texts = samples.texts if isinstance(samples, Tokenized) else ()
    page, card = render_html(report, texts), model_card(report, out_name)
    with storage_faults(f"write {folder}"):
        if isinstance(samples, Tokenized):
            write_jsonl(folder / TYPICAL, samples.typical_rows())
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        write_report(folder / REPORT, report)
        (folder / PAGE).write_text(page, encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


def resolved_trees(recipe: Recipe) -> Recipe:
    """Return the recipe with all paths absolute; a forward is still named by its module."""
    full_names = {entry.model: str(Path(entry.model).resolve()) for entry in recipe.models}
    samples = recipe.samples
    if samples is not None:
        keys = ("data", "typical", "tokenizer")
        samples = samples.model_copy(update={key: _absolute(getattr(samples, key)) for key in keys})
    return recipe.model_copy(
        update={
            "models": tuple(
                entry.model_copy(update={"model": _absolute(entry.model)})
                for entry in recipe.models
            ),
            "base_model": _absolute(recipe.base_model),
            "parameters": recipe.parameters.renamed(full_names),
            "samples": samples,
            "weights": _absolute(recipe.weights),
        }
    )


def _copy_companions(named: Sequence[str], folder: Path, out_dtype: str | None) -> list[str]:
    *older, newest = map(Path, named)
    if not (newest / CONFIG_NAME).is_file():
        return []
    return copy_companions(
        newest, folder, older=older[::-1], dtype=DTYPES[out_dtype] if out_dtype else None
    )


def input_paths(recipe: Recipe, trees: Sequence[TreeFile]) -> list[Path]:
    """Return all files and folders that the recipe reads."""
    samples = recipe.samples
    named = [recipe.weights]
    if samples is not None:
        named += [samples.data, samples.typical, samples.tokenizer]
    return [*(tree.path for tree in trees), *(Path(name) for name in named if name)]


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())
