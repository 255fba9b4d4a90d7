"""Render the page of a continual-learning run: the table, learning curves, and all matrices."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from recall_jax.report import wording
from recall_jax.report.page import Table, render_page
from recall_jax.report.scales import hex_colour, nice_range, text_colour, viridis
from recall_jax.report.svg import Axis, Frame, Series, legend, line_chart

_CURVES = Frame(width=430, left=46, right=14)
_MOST_LINES = 8  # the number of different line styles
_LOWEST_IS_BEST = ("forgetting",)

Matrix = Sequence[Sequence[Any]]  # numbers, None if not measured


@dataclass(frozen=True)
class Cell:
    """Hold a score in a heat map, and its colours in CSS."""

    text: str
    background: str
    colour: str


@dataclass(frozen=True)
class HeatMap:
    """Hold a matrix R as column names, and a name and cells for each row, None if not measured."""

    title: str
    columns: Sequence[str]
    num_tasks: int
    rows: Sequence[tuple[str, Sequence[Cell | None]]]


@dataclass(frozen=True)
class Curves:
    """Hold the learning curves of an order: a legend, and a picture for each task."""

    title: str
    legend: Markup
    pictures: Sequence[Markup]
    left_out: Sequence[str]


def continual_summary(record: Mapping[str, Any], mark: str = "{}") -> Table:
    """Return a table with a row for the base and for each strategy, metrics as `mean ± sd`.

    The best of each metric is formatted with `mark`. The base and joint training are bounds, and do
    not count.
    """
    entries = {"base": record["base"] | {"joint": True}, **record["strategies"]}
    metrics = list(record["base"]["summary"])
    digits = _digits(record)
    rows = []
    for name, entry in entries.items():
        cells: list[str | float | None] = [name]
        for metric in metrics:
            found = entry["summary"][metric]
            text = None if found is None else _estimate(found, digits)
            if found and not entry["joint"] and found["mean"] == _best(record, metric):
                text = mark.format(text)
            cells.append(text)
        rows.append(cells)
    return Table("Strategies", ["strategy", *(m.replace("_", " ") for m in metrics)], rows)


def markdown_table(record: Mapping[str, Any]) -> str:
    """Return the table of strategies as Markdown, with the best of each metric in bold."""
    table = continual_summary(record, "**{}**")
    lines = [list(table.columns), ["---", *["---:"] * (len(table.columns) - 1)]]
    lines += [["–" if cell is None else str(cell) for cell in row] for row in table.rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def render_continual(record: Mapping[str, Any]) -> str:
    """Render the page for a record, in the form of `continual.json`."""
    return render_page(
        "continual.html.jinja",
        record=record,
        summary=continual_summary(record, "★ {}"),
        curves=[
            curves for order in range(len(record["orders"])) for curves in _curves(record, order)
        ],
        maps={name: list(_maps(record, name)) for name in record["strategies"]},
        settings=wording.flat_settings(
            {
                k: v
                for k, v in record["recipe"].items()
                if k not in ("strategies", "tasks", "orders")
            }
        ),
    )


def _best(record: Mapping[str, Any], metric: str) -> float | None:
    means = [
        entry["summary"][metric]["mean"]
        for entry in record["strategies"].values()
        if entry["summary"][metric] is not None and not entry["joint"]
    ]
    if not means:
        return None
    return min(means) if metric in _LOWEST_IS_BEST else max(means)


def _digits(record: Mapping[str, Any]) -> int:
    """Return the number of decimals: one for scores up to 100, three for bits per byte."""
    values = [abs(value) for run in record["runs"] for row in run["R"] for value in row if value]
    return 1 if max(values, default=0.0) > 20 else 3


def _estimate(found: Mapping[str, Any], digits: int) -> str:
    text = _with_minus(found["mean"], digits)
    if found["deviation"] is None:
        return text
    return f"{text} ± {found['deviation']:.{digits}f}"


def _with_minus(value: float, digits: int) -> str:
    """Format a number with a minus sign instead of a hyphen, and zero without one."""
    text = f"{value:.{digits}f}"
    return text.replace("-", "" if float(text) == 0 else "−")


def _mean_of(matrices: Sequence[Matrix]) -> list[list[Any]]:
    """Return the element-wise mean of matrices over seeds; None if any of them has None there."""
    return [
        [None if None in values else fmean(values) for values in zip(*rows, strict=True)]
        for rows in zip(*matrices, strict=True)
    ]


def _groups(record: Mapping[str, Any], order: int) -> dict[str, list[Mapping[str, Any]]]:
    """Return the runs of an order by strategy, sorted by decreasing final average."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for run in record["runs"]:
        if run["order"] == order:
            groups.setdefault(run["strategy"], []).append(run)

    def last(name: str) -> float:
        return fmean(run["metrics"]["final_average"] for run in groups[name])

    return {name: groups[name] for name in sorted(groups, key=last, reverse=True)}


def _curves(record: Mapping[str, Any], order: int) -> Iterator[Curves]:
    """Yield curves of the strategies that were measured after every task, at most eight."""
    groups = _groups(record, order)
    means = {name: _mean_of([run["R"] for run in runs]) for name, runs in groups.items()}
    complete = {name: R for name, R in means.items() if not any(None in row for row in R)}
    if not complete:
        return
    shown = list(complete)[:_MOST_LINES]
    run = groups[shown[0]][0]
    stages, count = run["stages"], run["num_tasks"]
    axis = Axis("after learning", stages, stages)
    values = [value for name in shown for row in complete[name] for value in row]
    y_range = (0.0, 100.0) if _digits(record) == 1 and min(values) >= 0 else nice_range(values)
    titles = [*run["columns"][:count], *(f"{name} (unseen)" for name in run["columns"][count:])]
    pictures = [
        line_chart(
            [
                Series(name, [row[column] for row in complete[name]], style=style)
                for style, name in enumerate(shown)
            ],
            axis,
            _CURVES,
            title=f"Scores of {title}",
            y_title=title,
            y_range=y_range,
            height=220,
        )
        for column, title in enumerate(titles)
    ]
    key = legend([Series(name, (), style=style) for style, name in enumerate(shown)])
    title = " → ".join(run["stages"][1:])
    yield Curves(title, key, pictures, [name for name in groups if name not in shown])


def _maps(record: Mapping[str, Any], strategy: str) -> Iterator[HeatMap]:
    """Yield the matrix of each order and seed of a strategy, with one colour scale for all."""
    digits = _digits(record)
    values = [v for run in record["runs"] for row in run["R"] for v in row if v is not None]
    low, high = (0.0, 100.0) if digits == 1 and min(values) >= 0 else nice_range(values)
    for run in record["runs"]:
        if run["strategy"] != strategy:
            continue
        rows = [
            (stage, [_cell(value, low, high, digits) for value in row])
            for stage, row in zip(run["stages"], run["R"], strict=True)
        ]
        title = f"order {run['order']}, seed {run['seed']}"
        yield HeatMap(title, run["columns"], run["num_tasks"], rows)


def _cell(value: float | None, low: float, high: float, digits: int) -> Cell | None:
    if value is None:
        return None
    colour = viridis((value - low) / (high - low))
    return Cell(_with_minus(value, digits), hex_colour(colour), text_colour(colour))
