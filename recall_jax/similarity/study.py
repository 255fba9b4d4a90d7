"""Compare every layer of several models with every other, by several measures.

A side is one unit of one model. The sides of a study are in the order of the models and, within a
model, of the forward pass; every matrix (A, A) has a row and a column for each.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from recall_jax.checkpoint.units import HEAD
from recall_jax.errors import InputError
from recall_jax.files.progress import Progress, silent
from recall_jax.similarity.choice import MeasureChoice
from recall_jax.similarity.depth import (
    Ends,
    Trend,
    falls_at_both_ends,
    falls_with_depth,
    matching_depths,
)
from recall_jax.similarity.matrix import similarity_matrix

FORMAT = 1


@dataclass(frozen=True)
class ModelStates:
    """Hold a model's states (U, n, E) of n samples, and the names of the units.

    `all_units` says that no unit of the model is left out.
    """

    name: str
    units: tuple[str, ...]
    states: np.ndarray
    all_units: bool = True

    @property
    def body(self) -> tuple[str, ...]:
        """Return the units without the head, which only norms the last layer's output."""
        return self.units[:-1] if self.units[-1] == HEAD and len(self.units) > 1 else self.units


@dataclass(frozen=True)
class SameDepth:
    """Hold similarities of two models by depth.

    `units` of model `row` were compared with their `matches` in model `column`.
    """

    row: int
    column: int
    units: tuple[str, ...]
    matches: tuple[str, ...]
    values: np.ndarray

    @property
    def alike(self) -> bool:
        """Return whether both models have the same units, so that depth means the same in both."""
        return self.units == self.matches


@dataclass(frozen=True)
class MeasureResult:
    """Hold one measure between all sides: the matrix (A, A), and the seconds it took."""

    choice: MeasureChoice
    matrix: np.ndarray
    seconds: float

    @property
    def distance(self) -> bool:
        """Return whether the measure is a distance: zero for equal sides, and growing."""
        return self.choice.measure.distance

    @property
    def scale(self) -> float:
        """Return the largest finite absolute value."""
        return float(np.abs(self.matrix[np.isfinite(self.matrix)]).max(initial=0.0))


@dataclass(frozen=True)
class Study:
    """Hold K models compared on the data rows (n,) by each of the given measures."""

    models: tuple[ModelStates, ...]
    rows: np.ndarray
    results: tuple[MeasureResult, ...]
    warnings: tuple[str, ...] = ()

    @property
    def sides(self) -> list[tuple[int, str]]:
        """Return the model index and unit of every row and column of a matrix."""
        return [(k, unit) for k, model in enumerate(self.models) for unit in model.units]

    @property
    def labels(self) -> list[str]:
        """Return the sides as `model:unit`."""
        return [f"{self.models[k].name}:{unit}" for k, unit in self.sides]

    @property
    def pairs(self) -> Iterator[tuple[int, int]]:
        """Yield every pair of different models once, the later model first."""
        return ((row, column) for row in range(len(self.models)) for column in range(row))

    def block(self, result: MeasureResult, row: int, column: int) -> np.ndarray:
        """Return the values (U1, U2) between the units of models `row` and `column`."""
        starts = np.cumsum([0, *(len(model.units) for model in self.models)])
        return result.matrix[starts[row] : starts[row + 1], starts[column] : starts[column + 1]]

    def adjacent(self, result: MeasureResult, model: int) -> np.ndarray:
        """Return each unit of a model compared with the next (U - 1,), without the head."""
        steps = len(self.models[model].body) - 1
        return np.diagonal(self.block(result, model, model), offset=1)[:steps]

    def same_depth(
        self, result: MeasureResult, row: int, column: int, *, heads: bool = False
    ) -> SameDepth:
        """Compare two models unit by unit, without the heads unless `heads`."""
        units, others = (
            self.models[k].units if heads else self.models[k].body for k in (row, column)
        )
        places = matching_depths(units, others)
        values = self.block(result, row, column)[np.arange(len(units)), places]
        return SameDepth(row, column, units, tuple(others[place] for place in places), values)

    def ends(self, result: MeasureResult, model: int) -> Ends | None:
        """Test RECALL's first observation; None if layers are left out, or there are too few."""
        if not self.models[model].all_units:
            return None
        steps = self.adjacent(result, model)
        return falls_at_both_ends(steps, distance=result.distance, scale=result.scale)

    def trend(self, result: MeasureResult, row: int, column: int) -> Trend | None:
        """Test RECALL's second observation; None if the units differ, or are too few."""
        found = self.same_depth(result, row, column)
        if not found.alike:
            return None
        return falls_with_depth(found.values, distance=result.distance, scale=result.scale)


def compare_all(
    models: Sequence[ModelStates],
    rows: np.ndarray,
    measures: Sequence[MeasureChoice],
    *,
    block_size: int | None = None,
    leave_out: bool = False,
    progress: Progress = silent,
) -> Study:
    """Compare every unit of every model with every other, by each measure in one matrix.

    `rows` (n,) are the numbers of the data rows. `block_size` samples are processed at a time, by
    default as many as fit. Raises InputError that names the measure if one does not accept these
    sides; with `leave_out`, the study has a warning instead.
    """
    sides = [unit for model in models for unit in model.states]
    results: list[MeasureResult] = []
    warnings = list(_constant(models))
    for done, choice in enumerate(measures):
        progress(choice.label, done, len(measures))
        began = time.perf_counter()
        try:
            _check_widths(choice, models)
            options = dict(choice.options)
            found = similarity_matrix(sides, measure=choice.name, block_size=block_size, **options)
        except InputError as error:
            if not leave_out:
                raise InputError(f"measure {choice.label}: {error}") from error
            warnings.append(f"left out {choice.label}: {error}")
            continue
        matrix = np.asarray(found)
        results.append(MeasureResult(choice, matrix, time.perf_counter() - began))
        if undefined := np.count_nonzero(~np.isfinite(matrix)):
            warnings.append(f"{choice.label}: {undefined} of {matrix.size} values are not finite")
    return Study(tuple(models), rows, tuple(results), tuple(warnings))


def study_record(study: Study) -> dict[str, Any]:
    """Return the content of `similarity.json`: all but the matrices; values not finite are null."""
    return {
        "format": FORMAT,
        "models": [
            {
                "name": model.name,
                "units": list(model.units),
                "width": model.states.shape[2],
                "all_units": model.all_units,
            }
            for model in study.models
        ],
        "sides": study.labels,
        "rows": study.rows.tolist(),
        "measures": [_measure_record(study, result) for result in study.results],
        "warnings": list(study.warnings),
    }


def _measure_record(study: Study, result: MeasureResult) -> dict[str, Any]:
    """Return the record of one measure: its curves over depth, and the two observations."""
    choice, models, pairs = result.choice, range(len(study.models)), list(study.pairs)
    curves = [study.same_depth(result, *pair) for pair in pairs]
    ends = [study.ends(result, model) for model in models]
    trends = [study.trend(result, *pair) for pair in pairs]
    return {
        "measure": choice.label,
        "name": choice.name,
        "options": dict(choice.options),
        "distance": result.distance,
        "symmetric": choice.measure.symmetric,
        "file": choice.slug,
        "seconds": result.seconds,
        "adjacent": [[_plain(value) for value in study.adjacent(result, k)] for k in models],
        "same_depth": [
            {
                "models": [curve.row, curve.column],
                "units": list(curve.units),
                "matches": list(curve.matches),
                "values": [_plain(value) for value in curve.values],
            }
            for curve in curves
        ],
        "observations": {
            "falls_at_both_ends": [
                {"model": model, **_found(end)} for model, end in zip(models, ends, strict=True)
            ],
            "falls_with_depth": [
                {"models": list(pair), **_found(trend)}
                for pair, trend in zip(pairs, trends, strict=True)
            ],
        },
    }


def _found(observation: Ends | Trend | None) -> Mapping[str, Any]:
    return {"seen": None} if observation is None else asdict(observation)


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _check_widths(choice: MeasureChoice, models: Sequence[ModelStates]) -> None:
    """Raise InputError if a measure that needs sides of one width is given several."""
    first = models[0]
    for model in models:
        mine, its = first.states.shape[2], model.states.shape[2]
        if mine != its and choice.measure.parts.same_width:
            raise InputError(
                f"it compares sides of one width, and {first.name} has {mine}, {model.name} {its}"
            )


def _constant(models: Sequence[ModelStates]) -> Iterator[str]:
    """Yield a warning for each model with units that have the same state for every sample."""
    for model in models:
        same = (model.states == model.states[:, :1]).all(axis=(1, 2))
        if units := [unit for unit, is_same in zip(model.units, same, strict=True) if is_same]:
            yield (
                f"{model.name} has the same state for every row in {', '.join(units)}: "
                "measures are meaningless there"
            )
