"""Write the folder of a study: matrices as npz and CSV, pictures, the record and the page."""

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.errors import storage_faults
from recall_jax.files.json_objects import write_json_object
from recall_jax.report.matrix_map import standalone
from recall_jax.report.similarity_page import draw_map, render_study
from recall_jax.similarity.study import MeasureResult, Study

PAGE, RECORD, MATRICES = "index.html", "similarity.json", "similarity.npz"


def write_study(folder: Path, study: Study, record: Mapping[str, Any]) -> None:
    """Write all files of a study into `folder`; `record` is the content of similarity.json.

    similarity.npz has a matrix (A, A) for each measure, by its label; the names of the models,
    `models` (K,); and for each of the A sides the index of its model, `side_model` (A,), and its
    unit, `side_unit` (A,).
    """
    page = render_study(study, record)
    with storage_faults(f"write {folder}"):
        _write_matrices(folder / MATRICES, study)
        for result in study.results:
            _write_csv(folder / f"{result.choice.slug}.csv", study, result)
            picture = standalone(draw_map(study, result))
            (folder / f"{result.choice.slug}.svg").write_text(picture, encoding="utf-8")
        write_json_object(folder / RECORD, record)
        (folder / PAGE).write_text(page, encoding="utf-8")


def _write_matrices(path: Path, study: Study) -> None:
    arrays = {result.choice.label: result.matrix for result in study.results}
    with path.open("wb") as file:
        np.savez(
            file,
            allow_pickle=False,
            models=np.asarray([model.name for model in study.models]),
            side_model=np.asarray([model for model, _ in study.sides]),
            side_unit=np.asarray([unit for _, unit in study.sides]),
            rows=study.rows,
            **arrays,
        )


def _write_csv(path: Path, study: Study, result: MeasureResult) -> None:
    """Write the matrix as CSV, with `model:unit` for every row and column."""
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file)
        writer.writerow(["", *study.labels])
        for label, row in zip(study.labels, result.matrix.tolist(), strict=True):
            writer.writerow([label, *row])
