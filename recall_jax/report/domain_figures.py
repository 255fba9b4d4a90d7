"""Draw figures and tables of how the units of a model separate the domains of texts."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recall_jax.report import svg, wording
from recall_jax.report.page import Figure, Table, line_figure, unit_tick

_DEPTH = "unit, from input to output"
_KINDS = ("within", "across")


def domain_figures(record: Mapping[str, Any]) -> list[Figure]:
    """Plot over the units: similarity within minus across domains, and neighbour accuracy."""
    found = record["domains"]
    if found is None:
        return []
    axis = svg.Axis(_DEPTH, record["units"], [unit_tick(unit) for unit in record["units"]])
    differences = [
        [None if one is None else one - other for one, other in zip(*pair, strict=True)]
        for pair in zip(found["within"], found["across"], strict=True)
    ]
    figures = []
    if all(value is not None for row in differences for value in row):
        figure = line_figure(
            "Similarity within domains less across them",
            "within − across",
            axis,
            _series(found, differences),
            guide=0.0,
            guide_name="texts of two domains as similar as those of one",
        )
        figures.append(replace(figure, numbers=_similarity_table(record)))
    figures.append(
        line_figure(
            "Domain predicted from the five nearest texts",
            "accuracy",
            axis,
            _series(found, found["neighbour_accuracy"]),
            guide=found["chance"],
            guide_name="always the largest domain",
        )
    )
    return figures


def _similarity_table(record: Mapping[str, Any]) -> Table:
    """Return the similarity within and across domains for each model and unit."""
    found = record["domains"]
    columns = ["unit", *(f"{name} {kind}" for name in found["models"] for kind in _KINDS)]
    rows = [
        [
            unit,
            *(
                found[kind][model][index]
                for model in range(len(found["models"]))
                for kind in _KINDS
            ),
        ]
        for index, unit in enumerate(record["units"])
    ]
    return Table("Similarity within and across domains", columns, rows)


def _series(found: Mapping[str, Any], values: Sequence[Sequence[Any]]) -> list[svg.Series]:
    """Return a line for each model, the newest first."""
    return [
        svg.Series(f"{name} model", row, name, index)
        for index, (name, row) in enumerate(zip(found["models"], values, strict=True))
    ]


def clusterings(record: Mapping[str, Any]) -> Table:
    """Return a table of how well each clustering covers the texts and separates their domains."""
    columns = [
        "clustered unit",
        "clusters",
        "mean distance",
        "of random texts",
        "farthest",
        "domains covered",
        "information, nats",
        "normalised",
    ]
    found = record["domains"]
    rows = [
        [
            each["unit"],
            each["count"],
            each["coverage"]["mean"],
            each["coverage"]["random"],
            each["coverage"]["farthest"],
            each["domains_covered"],
            each["mutual_information"]["nats"],
            each["mutual_information"]["normalised"],
        ]
        for each in (found["clusterings"] if found else ())
    ]
    return Table("Clusterings of the texts of all domains", columns, rows)


def clustering_figures(record: Mapping[str, Any]) -> list[Figure]:
    """Plot information and coverage over the number of clusters, a line for each clustered unit."""
    found = record["domains"]
    if found is None:
        return []
    recipe_unit = str(record["settings"]["samples"]["unit"])
    units = list(dict.fromkeys(each["unit"] for each in found["clusterings"]))
    counts = list(dict.fromkeys(str(each["count"]) for each in found["clusterings"]))
    if len(counts) < 2:
        return []

    def lines(value: Any) -> list[svg.Series]:
        by_unit = {
            unit: [value(each) for each in found["clusterings"] if each["unit"] == unit]
            for unit in units
        }
        return [
            svg.Series(
                f"clustered by {unit}",
                by_unit[unit],
                wording.short_name(unit, 10),
                0 if unit == recipe_unit else 1 + index % 7,
            )
            for index, unit in enumerate(units)
        ]

    axis = svg.Axis("number of clusters", counts, counts)
    return [
        line_figure(
            "Information about the domain in the cluster",
            "normalised mutual information",
            axis,
            lines(lambda each: each["mutual_information"]["normalised"]),
        ),
        line_figure(
            "How far texts are from the nearest typical sample",
            "mean distance, in spreads",
            axis,
            lines(lambda each: each["coverage"]["mean"]),
        ),
    ]
