"""Write what a merge leaves besides the weights: report, page, recipe, and the model's files."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from recall_jax.checkpoint.companions import copy_companions
from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.checkpoint.folder import Checkpoint, older_folders
from recall_jax.engine.findings import report_entries
from recall_jax.engine.merge import Prepared
from recall_jax.engine.sources import Inputs
from recall_jax.errors import storage_faults
from recall_jax.inputs.data import write_jsonl
from recall_jax.inputs.settings import TYPICAL
from recall_jax.inputs.vocabularies import tokenizer_differences
from recall_jax.methods.registry import METHODS
from recall_jax.parallel.machine import device, versions
from recall_jax.recipes.recipe import Recipe
from recall_jax.report.card import model_card
from recall_jax.report.html import render_html
from recall_jax.report.record import write_report
from recall_jax.similarity.diagnostics import similarity_warnings

if TYPE_CHECKING:
    from recall_jax.inputs.samples import Tokenized

REPORT = "recall_report.json"
PAGE = "recall_report.html"
RECIPE = "recall_recipe.yml"


def make_report(
    recipe: Recipe, prepared: Prepared, models: Sequence[str], units: Sequence[str]
) -> dict[str, Any]:
    """Return the report of a finished walk, without the time and memory that the run took."""
    samples, previous, found = prepared.samples, prepared.previous_report, prepared.rule.findings()
    typical = samples and samples.typical
    warnings = typical.warnings() if typical else []
    warnings += similarity_warnings(found.similarity, list(units), prepared.reference)
    settings = recipe.model_dump(
        mode="json", exclude={"merge_method", "models", "base_model", "parameters"}
    )
    rows = previous.get("typical_samples", [])
    if samples:
        rows = samples.samples.indices.tolist()
    elif prepared.per_model_samples:
        rows = prepared.per_model_samples[-1].indices.tolist()
    return {
        "format": 1,
        "method": recipe.merge_method,
        "equation": METHODS[recipe.merge_method].equation,
        "models": list(models),
        "base_model": recipe.base_model,
        "reference": prepared.reference,
        "units": list(units),
        "typical_samples": rows,
        **report_entries(found),
        "typical": typical.summary() if typical else previous.get("typical"),
        "warnings": warnings,
        "settings": {
            **recipe.parameters.model_dump(mode="json"),
            **settings,
            "compute_dtype": prepared.compute_dtype,
        },
        "versions": versions(),
        "device": device(),
        "selection_passes": samples.passes if samples else 0,
    }


def write_outcome(
    folder: Path,
    out_name: str,
    recipe: Recipe,
    read: Sequence[Checkpoint],
    prepared: Prepared,
    report: dict[str, Any],
) -> None:
    """Write everything in OUT but the weights and their checksums; `recipe` is resolved.

    Warnings about the tokenizers of the models `read`, and about the files of the last, the newest,
    are added to the report. Raises InputError if a file cannot be copied or written, StorageError
    if the disk fails.
    """
    out_dtype = recipe.out_dtype or recipe.dtype
    newest = read[-1]
    for difference in tokenizer_differences(newest, read):
        report["warnings"] += difference.warnings()
    report["warnings"] += copy_companions(
        newest.folder,
        folder,
        config=newest.config,
        tokenizers=newest.tokenizer_folders,
        older=older_folders(read),
        dtype=DTYPES[out_dtype] if out_dtype else None,
    )
    texts: Sequence[str] = ()
    typical = _rows_of_each(prepared.per_model_samples)
    if prepared.samples:
        samples = prepared.samples.samples
        texts, typical = samples.texts, samples.typical_rows()
    page, card = render_html(report, texts), model_card(report, out_name)
    with storage_faults(f"write {folder}"):
        if typical:
            write_jsonl(folder / TYPICAL, typical)
        (folder / RECIPE).write_text(recipe.to_yaml(), encoding="utf-8")
        write_report(folder / REPORT, report)
        (folder / PAGE).write_text(page, encoding="utf-8")
        (folder / "README.md").write_text(card, encoding="utf-8")


def _rows_of_each(model_samples: "Sequence[Tokenized]") -> list[dict[str, Any]]:
    """Return the typical rows of each model, the oldest first."""
    return [
        {**row, "model": k} for k, rows in enumerate(model_samples) for row in rows.typical_rows()
    ]


def resolved(
    recipe: Recipe,
    inputs: Inputs[Checkpoint],
    compute_dtype: str | None,
) -> Recipe:
    """Return the recipe with every local path absolute, so that it runs from anywhere."""
    names = [model.full_name for model in inputs.models]
    full_names = dict(zip((entry.model for entry in recipe.models), names, strict=True))
    samples = recipe.samples
    if samples is not None:
        paths = {key: _absolute(getattr(samples, key)) for key in ("data", "typical", "prompts")}
        samples = samples.model_copy(update=paths)
    update: dict[str, Any] = {
        "models": tuple(
            entry.model_copy(update={"model": name, "data": _absolute(entry.data)})
            for entry, name in zip(recipe.models, names, strict=True)
        ),
        "base_model": None if inputs.base is None else inputs.base.full_name,
        "base_data": _absolute(recipe.base_data),
        "parameters": recipe.parameters.renamed(full_names),
        "samples": samples,
        "weights": _absolute(recipe.weights),
        "compute_dtype": compute_dtype,
    }
    return recipe.model_copy(update=update)


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())
