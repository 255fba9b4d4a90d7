"""Render the page of an ablation: a table and a plot for each choice, and analyses by unit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log10
from typing import Any

from recall_jax.report import svg, wording
from recall_jax.report.domain_figures import clustering_figures, clusterings, domain_figures
from recall_jax.report.evaluation_page import estimate, words
from recall_jax.report.page import Figure, Table, line_figure, markdown, render_page

_REFERENCES = {
    "base": "the base, not merged",
    "newest": "the newest model, not merged",
    "average": "the average of all models",
}
_SURE = 2  # standard errors beyond which a difference is reported


@dataclass(frozen=True)
class AblationSection:
    """Hold what the page shows about one axis."""

    axis: str
    about: str
    verdict: str
    figure: Figure | None
    table: Table
    warnings: Sequence[str]


def render_ablation(record: Mapping[str, Any]) -> str:
    """Render the page for a record, in the form of `ablation.json`."""
    return render_page(
        "ablation.html.jinja",
        record=record,
        names=[wording.short_name(name, 40) for name in record["models"]],
        metrics=list(dict.fromkeys(words(task["metric"]) for task in record["tasks"])),
        references=_references(record),
        overview=overview(record),
        sections=[_section(record, axis) for axis in record["axes"]],
        domains=domain_figures(record),
        clusterings=clusterings(record),
        clustering_figures=clustering_figures(record),
        settings=wording.flat_settings(record["settings"]),
    )


def tables_in_markdown(record: Mapping[str, Any]) -> str:
    """Return all tables of the page as Markdown."""
    tables = [_references(record), overview(record)]
    tables += [_axis_table(record, axis) for axis in record["axes"]]
    if record["domains"] is not None:
        tables += [figure.numbers for figure in domain_figures(record)]
        tables.append(clusterings(record))
    return "\n".join(map(markdown, tables))


def _references(record: Mapping[str, Any]) -> Table:
    """Return the table of the recipe's merge and of the models to compare it with."""
    descriptions = {**_REFERENCES, "own": "RECALL as the recipe has it"}
    rows = []
    for name, description in descriptions.items():
        rows.append([description, _difference(record, name), *_scores(record, name)])
    return Table("Without variation", ["model", "difference", *_columns(record)], rows)


def overview(record: Mapping[str, Any]) -> Table:
    """Return a table of the best and the worst value of each axis, and their differences."""
    columns = ["choice", "the recipe’s", "best", "difference", "worst", "difference"]
    rows: list[list[str | None]] = []
    for axis in record["axes"]:
        ranked = _ranked(record, axis)
        in_recipe = next((each["label"] for each in axis["values"] if each["run"] == "own"), None)
        cells = [
            cell
            for each in (ranked[0], ranked[-1])
            for cell in (each["label"], _difference(record, each["run"]))
        ]
        rows.append([axis["axis"], in_recipe, *cells])
    return Table("How much each choice matters", columns, rows)


def _ranked(record: Mapping[str, Any], axis: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the values that could be merged, by decreasing mean; the recipe's wins a tie."""
    sign = 1 if record["less_is_better"] else -1
    return sorted(
        _merged(record, axis),
        key=lambda each: (sign * _mean(record, each["run"])["value"], each["run"] != "own"),
    )


def _merged(record: Mapping[str, Any], axis: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [each for each in axis["values"] if "error" not in record["runs"][each["run"]]]


def _mean(record: Mapping[str, Any], run: str, group: str = "all") -> Mapping[str, Any]:
    found: Mapping[str, Any] = record["runs"][run]["means"][group]
    return found


def _section(record: Mapping[str, Any], axis: Mapping[str, Any]) -> AblationSection:
    return AblationSection(
        axis["axis"],
        axis["about"],
        _verdict(record, axis),
        _axis_figure(record, axis),
        _axis_table(record, axis),
        [
            f"{each['label']}: {warning}"
            for each in _merged(record, axis)
            for warning in record["runs"][each["run"]]["warnings"]
        ],
    )


def _verdict(record: Mapping[str, Any], axis: Mapping[str, Any]) -> str:
    """Name the values that differ from the recipe's by more than twice the standard error."""
    sure = []
    for each in _merged(record, axis):
        found = record["runs"][each["run"]]["differences"]["all"]
        if found and abs(found["value"]) > _SURE * found["standard_error"]:
            sure.append(f"{each['label']} ({_difference(record, each['run'])})")
    if not sure:
        return "no value differs from the recipe’s by more than twice the standard error"
    return f"beyond twice the standard error: {', '.join(sure)}"


def _axis_table(record: Mapping[str, Any], axis: Mapping[str, Any]) -> Table:
    rows: list[list[str | None]] = []
    for each in axis["values"]:
        run = record["runs"][each["run"]]
        name = each["label"] + (" (the recipe’s)" if each["run"] == "own" else "")
        if "error" in run:
            rows.append([f"{name}: {run['error']}", *[None] * (len(_columns(record)) + 1)])
        else:
            rows.append([name, _difference(record, each["run"]), *_scores(record, each["run"])])
    return Table(axis["about"], [axis["axis"], "difference", *_columns(record)], rows)


def _columns(record: Mapping[str, Any]) -> list[str]:
    """Return a column for each group's mean and each task, with its metric if metrics differ."""
    groups = ["mean" if group == "all" else group for group in record["groups"]]
    tasks = record["tasks"]
    if len({task["metric"] for task in tasks}) == 1:
        return [*groups, *(task["task"] for task in tasks)]
    return [*groups, *(f"{task['task']}: {words(task['metric'])}" for task in tasks)]


def _scores(record: Mapping[str, Any], name: str) -> list[str]:
    run, metric = record["runs"][name], record["tasks"][0]["metric"]
    means = [estimate(run["means"][group], metric) for group in record["groups"]]
    tasks = record["tasks"]
    return [
        *means,
        *(estimate(run["results"][task["task"]][task["metric"]], task["metric"]) for task in tasks),
    ]


def _difference(record: Mapping[str, Any], name: str) -> str | None:
    """Return the difference of a run's mean over all tasks from that of the recipe's merge."""
    found = record["runs"][name]["differences"]["all"]
    if found is None or name == "own":
        return None
    value, error = found["value"], found["standard_error"]
    digits = 3 if record["less_is_better"] else 1
    if error > 0:  # enough for the first digit of the error
        digits = max(digits, ceil(-log10(error)))
    return f"{value:+.{digits}f} ± {error:.{digits}f}"


def _axis_figure(record: Mapping[str, Any], axis: Mapping[str, Any]) -> Figure | None:
    """Plot the groups' means over the values, with the average of all models as a level line."""
    values = _merged(record, axis)
    if len(values) < 2:
        return None
    labels = [each["label"] for each in values]
    ticks = [wording.short_name(label, 14) for label in labels]
    lines = [
        svg.Series(
            "all tasks" if group == "all" else f"{group} tasks",
            [_mean(record, each["run"], group)["value"] for each in values],
            group,
            index,
        )
        for index, group in enumerate(record["groups"])
    ]
    guide = _mean(record, "average")["value"]
    return line_figure(
        axis["about"],
        "mean score",
        svg.Axis(axis["axis"], labels, ticks),
        lines,
        guide=guide,
        guide_name="the average of all models, all tasks",
    )
