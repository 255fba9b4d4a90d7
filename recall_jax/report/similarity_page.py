"""Render the page of a similarity study: all pairs of models, by all measures, over depth."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
from markupsafe import Markup

from recall_jax.report import svg, wording
from recall_jax.report.matrix_map import MapBlock, hover_data, matrix_map
from recall_jax.report.page import NARROW, WIDE, Figure, Table, render_page, unit_tick
from recall_jax.report.scales import nice_range
from recall_jax.similarity.measure import Measure
from recall_jax.similarity.study import MeasureResult, ModelStates, Study

_DEPTH = "unit, from input to output"
_STEP = "step from the unit before to this one"
_ROUNDING = 1e-4
_FEW = 6  # number of pairs that are drawn in one figure


@dataclass(frozen=True)
class PaperObservation:
    """Hold the verdict on one of the paper's two observations by one measure, and its numbers."""

    verdict: str
    numbers: Table


@dataclass(frozen=True)
class MeasureSection:
    """Hold what the page shows about one measure."""

    label: str
    slug: str
    meaning: str
    range: str
    distance: bool
    symmetric: bool
    map: Markup
    reading: str
    adjacent: Sequence[Figure]
    same_depth: Sequence[Figure]
    ends: PaperObservation
    trend: PaperObservation | None


def render_study(study: Study, record: Mapping[str, Any]) -> str:
    """Render the page for a study and its record, in the form of `similarity.json`."""
    return render_page(
        "similarity.html.jinja",
        study=study,
        record=record,
        names=[wording.short_name(model.name, 40) for model in study.models],
        sections=[_section(study, result) for result in study.results],
        num_pairs=len(list(study.pairs)),
    )


def draw_map(study: Study, result: MeasureResult) -> Markup:
    """Draw the complete matrix of one measure as a heat map."""
    finite = result.matrix[np.isfinite(result.matrix)]
    return matrix_map(
        result.matrix,
        _blocks(study.models),
        title=f"{result.choice.label} between all units of all models",
        value_title=f"{result.choice.label}{', bright is near' if result.distance else ''}",
        value_range=_round_range(result, finite.tolist() or [0.0, 1.0]),
        reverse=result.distance,
    )


def first_line(measure: Measure) -> str:
    """Return the first line of a measure's docstring, its definition."""
    return (inspect.getdoc(measure.function) or "").partition("\n")[0]


def _section(study: Study, result: MeasureResult) -> MeasureSection:
    low, high = (
        f"{bound:.4g}".replace("inf", "∞").replace("-", "−")
        for bound in result.choice.measure.bounds
    )
    labels = [f"{k + 1} {wording.short_name(study.models[k].name)} {u}" for k, u in study.sides]
    return MeasureSection(
        label=result.choice.label,
        slug=result.choice.slug,
        meaning=first_line(result.choice.measure),
        # The bounds are those of the default options.
        range="" if result.choice.options else f"from {low} to {high}",
        distance=result.distance,
        symmetric=result.choice.measure.symmetric,
        map=draw_map(study, result),
        reading=hover_data(result.matrix, _blocks(study.models), labels),
        adjacent=_adjacent(study, result),
        same_depth=_same_depth(study, result),
        ends=_ends(study, result),
        trend=_trend(study, result) if len(study.models) > 1 else None,
    )


def _blocks(models: Sequence[ModelStates]) -> list[MapBlock]:
    """Return the blocks of the map; a model with a single unit is labelled by its name."""
    return [
        MapBlock(model.name, [unit_tick(unit) for unit in model.units])
        if len(model.units) > 1
        else MapBlock(model.name, [wording.short_name(model.name, 24)])
        for model in models
    ]


@dataclass(frozen=True)
class _Curve:
    """Hold a line over units; lines with the same `figure` and units are drawn together."""

    units: tuple[str, ...]
    label: str
    name: str
    values: np.ndarray
    figure: int = 0


def _adjacent(study: Study, result: MeasureResult) -> list[Figure]:
    """Draw a curve for each model, in a separate figure for each set of units."""
    curves = [
        _Curve(
            model.body, f"{k + 1}", wording.short_name(model.name, 24), study.adjacent(result, k)
        )
        for k, model in enumerate(study.models)
    ]
    figures = []
    for lines in _grouped(curves):
        units = lines[0].units
        steps = [f"{first} and {second}" for first, second in pairwise(units)]
        axis = svg.Axis(_STEP, steps, [unit_tick(unit) for unit in units[1:]])
        figures.append(_figure(result, "Adjacent units", axis, lines))
    return figures


def _same_depth(study: Study, result: MeasureResult) -> list[Figure]:
    """Draw a curve for each pair of models, in one figure if they are few, else by row."""
    pairs = list(study.pairs)
    curves = []
    for row, column in pairs:
        found = study.same_depth(result, row, column)
        units = tuple(
            unit if unit == match else f"{unit} and {match}"
            for unit, match in zip(found.units, found.matches, strict=True)
        )
        figure = row if len(pairs) > _FEW else 0
        label, name = f"{row + 1}–{column + 1}", _both(study, row, column)
        curves.append(_Curve(units, label, name, found.values, figure))
    figures = []
    for lines in _grouped(curves):
        units = lines[0].units
        axis = svg.Axis(_DEPTH, units, [unit_tick(unit.partition(" and ")[0]) for unit in units])
        figures.append(_figure(result, "The same depth in two models", axis, lines))
    return figures


def _grouped(curves: Sequence[_Curve]) -> list[list[_Curve]]:
    """Group curves by figure and units; drop single points and values that are not finite."""
    groups: dict[tuple[int, tuple[str, ...]], list[_Curve]] = {}
    for curve in curves:
        if len(curve.values) > 1 and np.isfinite(curve.values).all():
            groups.setdefault((curve.figure, curve.units), []).append(curve)
    return list(groups.values())


def _both(study: Study, row: int, column: int) -> str:
    return " and ".join(wording.short_name(study.models[k].name, 24) for k in (row, column))


def _figure(result: MeasureResult, title: str, axis: svg.Axis, curves: Sequence[_Curve]) -> Figure:
    values = [float(value) for curve in curves for value in curve.values]
    best = 0.0 if result.distance else result.choice.measure.bounds[1]
    scale = _round_range(result, [*values, 0.0, *([best] if np.isfinite(best) else [])])

    def draw(frame: svg.Frame) -> Markup:
        return svg.line_chart(
            series, axis, frame, title=title, y_title=result.choice.label, y_range=scale, height=240
        )

    series = [
        svg.Series(f"{curve.label} {curve.name}", curve.values.tolist(), curve.label, index)
        for index, curve in enumerate(curves)
    ]
    numbers = Table(
        f"{title} in numbers",
        ["units", *(one.name for one in series)],
        [[name, *(one.values[index] for one in series)] for index, name in enumerate(axis.names)],
    )
    return Figure(
        svg.legend(series) if len(series) > 1 else Markup(),
        [draw(replace(WIDE, right=50))],
        [draw(replace(NARROW, right=34))],
        numbers,
    )


def _round_range(result: MeasureResult, values: Sequence[float]) -> tuple[float, float]:
    """Return a range for values that rounding may have moved beyond the measure's bounds."""
    within = np.asarray(values, np.float64)
    for bound in result.choice.measure.bounds:
        within = np.where(np.abs(within - bound) < _ROUNDING, bound, within)
    return nice_range(within.tolist())


def _ends(study: Study, result: MeasureResult) -> PaperObservation:
    rows: list[list[str | float | None]] = []
    answers: list[bool | None] = []
    for k, model in enumerate(study.models):
        found = study.ends(result, k)
        answers.append(found.seen if found else None)
        values = (
            [None] * 4
            if found is None
            else [found.first, found.last, found.lower_quartile, found.upper_quartile]
        )
        rows.append([f"{k + 1} {wording.short_name(model.name, 24)}", *values, _answer(answers[k])])
    columns = ["model", "first step", "last step", "between: Q1", "Q3", "seen"]
    numbers = Table("Both ends of each model", columns, rows)
    return PaperObservation(observation_verdict(answers, "model"), numbers)


def _trend(study: Study, result: MeasureResult) -> PaperObservation:
    rows: list[list[str | float | None]] = []
    answers: list[bool | None] = []
    for row, column in study.pairs:
        found = study.trend(result, row, column)
        curve = study.same_depth(result, row, column).values
        answers.append(found.seen if found else None)
        rows.append(
            [
                f"{row + 1}–{column + 1} {_both(study, row, column)}",
                float(curve[0]),
                float(curve[-1]),
                float(np.mean(curve)),
                None if found is None else found.spearman,
                _answer(answers[-1]),
            ]
        )
    columns = ["models", "first unit", "last unit", "mean", "Spearman with depth", "seen"]
    numbers = Table("Every pair of models at the same depth", columns, rows)
    return PaperObservation(observation_verdict(answers, "pair"), numbers)


def _answer(seen: bool | None) -> str | None:
    return None if seen is None else "yes" if seen else "no"


def observation_verdict(answers: Sequence[bool | None], noun: str) -> str:
    """State in how many models or pairs an observation is seen; None cannot be tested."""
    tested = [answer for answer in answers if answer is not None]
    if not tested:
        return "cannot be tested"
    if len(tested) == 1:
        return "seen" if tested[0] else "not seen"
    if not any(tested):
        return f"not seen in any of {len(tested)} {noun}s"
    if all(tested):
        return f"seen in all {len(tested)} {noun}s"
    return f"seen in {sum(tested)} of {len(tested)} {noun}s"
