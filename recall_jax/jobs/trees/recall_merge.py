"""Merge parameter trees in memory by RECALL, with any forward function."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from recall_jax.checkpoint.units import unit_names
from recall_jax.engine.findings import report_entries
from recall_jax.errors import InputError
from recall_jax.jobs.trees.merge_trees import UnitOf, merge_trees
from recall_jax.methods.recall import compare_representations
from recall_jax.methods.weights import MergedUnits, Weighing
from recall_jax.representations.extract import ApplyFn, Backend, MaskOf, extract, num_rows
from recall_jax.representations.typical import select_typical
from recall_jax.similarity.compare import (
    Comparison,
    Reference,
    Sigma,
    check_reference,
    parse_similarity,
)
from recall_jax.similarity.diagnostics import similarity_warnings


def recall_merge(
    trees: Sequence[Any],
    apply_fn: ApplyFn,
    batches: Iterable[Any],
    *,
    unit_of: UnitOf,
    reference: Reference = -1,
    typical: Sequence[int] | np.ndarray | None = None,
    count: int = 20,
    seed: int = 0,
    sigma: Sigma = "median",
    temperature: float = 1.0,
    merged_units: MergedUnits = "all",
    threshold: float | None = None,
    similarity: str | dict[str, float] = "rbf",
    alignment: str = "none",
    mask: MaskOf | None = None,
    backend: Backend = "jit",
) -> tuple[Any, dict[str, Any]]:
    """Merge K parameter trees by RECALL (arXiv 2510.20479), and return (merged tree, report).

    `apply_fn(params, batch)` returns U arrays, as for `extract`; `unit_of` is as for `merge_trees`.
    `typical` are the rows of `batches` to compare the models on; by default k-means selects `count`
    rows by the reference's penultimate unit, the last block of a transformer. The report has the
    keys of `recall_report.json` that apply. Raises InputError for invalid arguments, or trees,
    units or batches that do not match.
    """
    comparison = Comparison(parse_similarity(similarity), sigma, reference, alignment)
    if len(trees) < 2:
        raise InputError("only one tree: RECALL merges at least two")
    check_reference(reference, len(trees))
    anchor = len(trees) - 1 if reference == "pairwise" else reference % len(trees)
    batches = list(batches)

    def representations(tree: Any, chosen: Sequence[Any]) -> np.ndarray:
        return extract(apply_fn, tree, chosen, mask=mask, backend=backend)

    of_anchor = representations(trees[anchor], batches)  # (U, n, E)
    if len(of_anchor) < 2:
        raise InputError("apply_fn returned one unit: RECALL compares at least two, embed and head")
    units = unit_names(len(of_anchor) - 2)
    if typical is None:
        selection = select_typical(of_anchor[-2], count, seed=seed)
        rows, warnings = selection.rows, selection.warnings()
    else:
        selection, rows, warnings = None, _check_rows(typical, of_anchor.shape[1]), []
    chosen, positions = _batches_with(batches, rows)
    reps = np.stack(
        [
            of_anchor[:, rows] if k == anchor else representations(tree, chosen)[:, positions]
            for k, tree in enumerate(trees)
        ]
    )
    weighing = Weighing(temperature, merged_units, threshold)
    found = compare_representations(reps, comparison, weighing, units=list(units))
    index = None if reference == "pairwise" else anchor
    merged = merge_trees(trees, found.weights, unit_of=unit_of, reference=anchor)
    report = {
        "format": 1,
        "method": "recall",
        "models": [f"tree {k}" for k in range(len(trees))],
        "reference": index,
        "units": list(units),
        "typical_samples": rows.tolist(),
        **report_entries(found),
        "typical": selection and selection.summary(),
        "warnings": warnings + similarity_warnings(found.similarity, units, index),
        "settings": {
            "sigma": sigma if isinstance(sigma, str) else float(sigma),
            "temperature": float(temperature),
            "merged_units": merged_units,
            "threshold": threshold,
            "similarity": similarity,
            "alignment": alignment,
            "samples": {"count": count, "seed": seed},
        },
    }
    return merged, report


def _check_rows(rows: Sequence[int] | np.ndarray, num_samples: int) -> np.ndarray:
    """Return the rows ascending and distinct, as in the report; InputError if they are invalid."""
    if len(rows) and not np.issubdtype(np.asarray(rows).dtype, np.integer):
        raise InputError("typical must be row numbers, integers from 0")
    distinct = np.unique(np.asarray(rows, np.int64))
    if len(distinct) == 0 or distinct[0] < 0 or distinct[-1] >= num_samples:
        raise InputError(f"typical names rows outside the {num_samples} rows of the batches")
    return distinct


def _batches_with(batches: Sequence[Any], rows: np.ndarray) -> tuple[list[Any], np.ndarray]:
    """Return the batches that hold any of `rows`, and the positions of the rows in them."""
    chosen, positions = [], []
    start = skipped = 0
    for batch in batches:
        end = start + num_rows(batch)
        inside = rows[(rows >= start) & (rows < end)]
        if len(inside):
            chosen.append(batch)
            positions.append(inside - skipped)
        else:
            skipped += end - start
        start = end
    return chosen, np.concatenate(positions)
