"""Render the report of a merge as a page that works offline, `recall_report.html`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from markupsafe import Markup

from recall_jax.report import svg, wording
from recall_jax.report.page import NARROW, WIDE, Figure, Table, render_page, unit_tick
from recall_jax.report.record import KEYS
from recall_jax.report.scales import nice_range

_UNMEASURED: dict[str, Any] = {
    "typical": None,
    "timing_s": {},
    "bytes": {"read": None, "written": None},
    "peak_memory_bytes": None,
    "versions": {},
}
_SHOWN_ELSEWHERE = ("equation", "weight_rises_with_depth")
_DEPTH = "unit, from input to output"
_PREVIEW = 280  # number of characters beyond which a text is folded
_LONGEST = 20_000  # number of characters beyond which a text is truncated


@dataclass(frozen=True)
class Sample:
    """Hold a typical sample as the page shows it.

    `row` is its row in the data, and `stands_for` the number of texts in its cluster, if known. A
    long text is folded to its `preview`, and truncated by `left_out` characters.
    """

    row: int | None
    stands_for: int | None
    text: str
    preview: str | None
    left_out: int


def render_html(
    report: Mapping[str, Any], texts: Sequence[str] = (), tables: Sequence[Table] = ()
) -> str:
    """Render the page for a report.

    Args:
        report: a report valid by `validate_report`, or without the entries that a merge in memory
            does not measure.
        texts: texts of the typical samples, in the order of `typical_samples`.
        tables: further results to show, such as an evaluation.

    Raises:
        ValueError: if texts and typical samples differ in number.
    """
    report = _UNMEASURED | dict(report)
    rows = report["typical_samples"]
    if texts and rows and len(texts) != len(rows):
        raise ValueError(f"{len(texts)} texts for {len(rows)} typical samples")
    return render_page(
        "template.html.jinja",
        report=report,
        names=[wording.short_name(name, 40) for name in report["models"]],
        roles=wording.roles(report),
        shares=_shares(report),
        verdict=wording.depth_verdict(report),
        equation=wording.equation(report),
        weights=_weights(report),
        similarity=_similarity(report),
        sigma=_sigma(report),
        adjacent=_adjacent(report),
        samples=_samples(report, texts),
        tables=tables,
        run=_run(report),
        settings=wording.flat_settings(report["settings"]),
    )


def _shares(report: Mapping[str, Any]) -> list[tuple[float, float, float]] | None:
    """Return the mean, the least and the greatest weight of each model over the units."""
    if report["weights"] is None:
        return None
    return [(sum(row) / len(row), min(row), max(row)) for row in report["weights"]]


def _weights(report: Mapping[str, Any]) -> Figure | None:
    if report["weights"] is None:
        return None
    if report["similarity"] is None and not wording.varies(report["weights"]):
        return None
    share = 1 / len(report["models"])
    values = [weight for row in report["weights"] for weight in row]
    return _map_over_units(
        report,
        report["weights"],
        title="Weights over depth",
        value="weight",
        value_range=nice_range([*values, share], minimum_span=0.1),
        colour_range=(min(values), max(*values, min(values) + 0.05)),
        equal_share=share,
    )


def _similarity(report: Mapping[str, Any]) -> Figure | None:
    if report["similarity"] is None:
        return None
    values = [value for row in report["similarity"] for value in row]
    return _map_over_units(
        report,
        report["similarity"],
        title="Similarity over depth",
        value="similarity",
        value_range=(scale := nice_range([*values, 0.0, 1.0])),
        colour_range=scale,
    )


def _map_over_units(
    report: Mapping[str, Any],
    values: Sequence[Sequence[float]],
    *,
    title: str,
    value: str,
    value_range: tuple[float, float],
    colour_range: tuple[float, float],
    equal_share: float | None = None,
) -> Figure:
    """Draw curves above a heat map of `values` (K, U), with a column for each unit."""
    units = report["units"]
    ticks = [unit_tick(unit) for unit in units]
    upper, lower = svg.Axis("", units, ticks), svg.Axis(_DEPTH, units, ticks)
    wide, narrow = _series(report["models"], values)

    def draw(series: Sequence[svg.Series], frame: svg.Frame) -> list[Markup]:
        return [
            svg.line_chart(
                series,
                upper,
                frame,
                title=title,
                y_title=value,
                y_range=value_range,
                guide=equal_share,
            ),
            svg.heat_map(
                series,
                lower,
                frame,
                title=f"{title}, as colours",
                value_title=value,
                value_range=colour_range,
            ),
        ]

    numbers = Table(
        f"{title} in numbers",
        ["unit", *(series.label for series in wide)],
        [[unit, *(row[index] for row in values)] for index, unit in enumerate(units)],
    )
    legend = svg.legend(wide, guide="equal share" if equal_share is not None else "")
    return Figure(legend, draw(wide, WIDE), draw(narrow, NARROW), numbers)


def _series(
    models: Sequence[str], values: Sequence[Sequence[float]]
) -> tuple[list[svg.Series], list[svg.Series]]:
    """Return lines labelled with each model's number and name, and lines with only the number."""
    wide, narrow = [], []
    for index, (name, row) in enumerate(zip(models, values, strict=True)):
        style = 0 if index == len(models) - 1 else 1 + index % 7
        full = f"{index + 1} {wording.short_name(name, 60)}"
        wide.append(svg.Series(full, row, f"{index + 1} {wording.short_name(name)}", style))
        narrow.append(svg.Series(full, row, f"{index + 1}", style))
    return wide, narrow


def _sigma(report: Mapping[str, Any]) -> Figure | None:
    if report["sigma"] is None:
        return None
    units = report["units"]
    axis = svg.Axis(_DEPTH, units, [unit_tick(unit) for unit in units])
    return _curve(
        report["sigma"],
        axis,
        "Bandwidth over depth",
        "sigma",
        nice_range([*report["sigma"], 0]),
    )


def _adjacent(report: Mapping[str, Any]) -> Figure | None:
    if not report["adjacent"]:
        return None
    layers = report["units"][1:-1]
    axis = svg.Axis("layer, from input to output", layers, [unit_tick(layer) for layer in layers])
    values = report["adjacent"]
    return _curve(
        values, axis, "Similarity of neighbours", "similarity", nice_range([*values, 0, 1])
    )


def _curve(
    values: Sequence[float],
    axis: svg.Axis,
    title: str,
    value: str,
    value_range: tuple[float, float],
) -> Figure:
    """Draw a single line, without room for labels at its right."""
    series = [svg.Series(title, values)]
    wide, narrow = (
        svg.line_chart(
            series, axis, frame, title=title, y_title=value, y_range=value_range, height=220
        )
        for frame in (replace(WIDE, right=12), replace(NARROW, right=18))
    )
    rows = list(zip(axis.names, values, strict=True))
    numbers = Table(f"{title} in numbers", ["unit", value], rows)
    return Figure(Markup(), [wide], [narrow], numbers)


def _samples(report: Mapping[str, Any], texts: Sequence[str]) -> list[Sample]:
    rows = report["typical_samples"]
    sizes = report["typical"]["cluster_sizes"] if report["typical"] else []
    samples = []
    for index, text in enumerate(texts):
        shown = text[:_LONGEST]
        folded = len(shown) > _PREVIEW or shown.count("\n") > 5
        samples.append(
            Sample(
                row=rows[index] if rows else None,
                stands_for=sizes[index] if len(sizes) == len(texts) else None,
                text=shown,
                preview=" ".join(shown[:_PREVIEW].split()) if folded else None,
                left_out=len(text) - len(shown),
            )
        )
    return samples


def _run(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return bytes, memory, the plan, and further keys of the report, as rows of a table."""
    sizes = {
        "bytes read from weight files": report["bytes"]["read"],
        "bytes written": report["bytes"]["written"],
        "peak memory": report["peak_memory_bytes"],
    }
    rows = [(name, wording.size(count)) for name, count in sizes.items() if count is not None]
    rows += [("plan", "; ".join(report["plan"]))] if report.get("plan") else []
    return rows + [
        (key.replace("_", " "), str(value))
        for key, value in report.items()
        if key not in (*KEYS, *_SHOWN_ELSEWHERE) and isinstance(value, str | int | float)
    ]
