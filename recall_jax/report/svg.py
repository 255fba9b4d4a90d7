"""Draw charts as SVG, styled by the page's CSS.

A `Frame` sets the horizontal geometry, so that the columns of pictures with the same frame and axis
are aligned. The colours of lines are the CSS classes `s0` … `s7`; dashes distinguish them without
colour.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recall_jax.report.scales import (
    CHARACTER,
    hex_colour,
    separate,
    text_colour,
    value_ticks,
    viridis,
    visible_ticks,
)
from recall_jax.report.wording import number, printable

# Style 0 is the most prominent line: solid and heavy.
_DASHES = ("", "9 5", "2 3", "10 3 2 3", "20 4", "4 2", "8 3 2 3 2 3", "1.5 6")
_ROW = 26


@dataclass(frozen=True)
class Series:
    """Hold a line or a row: a value for each column of the axis, a full name and a short label."""

    name: str
    values: Sequence[float]
    label: str = ""
    style: int = 0


@dataclass(frozen=True)
class Axis:
    """Describe the columns of a picture: a title, and the full name and the tick of each."""

    title: str
    names: Sequence[str]
    ticks: Sequence[str]


@dataclass(frozen=True)
class Frame:
    """Set the width and side margins of a picture, in CSS pixels."""

    width: int
    left: int
    right: int


def line_chart(
    series: Sequence[Series],
    axis: Axis,
    frame: Frame,
    *,
    title: str,
    y_title: str,
    y_range: tuple[float, float],
    guide: float | None = None,
    height: int = 270,
) -> Markup:
    """Draw lines over the columns of `axis`, each labelled at its right end.

    `guide` is the value of a thin dotted level line, which `legend` can name.
    """
    top, bottom = 30, height - (48 if axis.title else 28)
    low, high = y_range
    columns = len(axis.names)
    spacing = (frame.width - frame.left - frame.right) / columns
    right = frame.width - frame.right

    def x(column: int) -> float:
        return frame.left + (column + 0.5) * spacing

    def y(value: float) -> float:
        return bottom - (value - low) / (high - low) * (bottom - top)

    parts = [text_at(0, 14, y_title, "title")]
    for value, tick in value_ticks(low, high):
        parts.append(_line(frame.left, y(value), right, y(value), "grid"))
        parts.append(text_at(frame.left - 8, y(value) + 4, tick, "tick end"))
    parts += _column_axis(axis, frame, spacing, bottom)
    if guide is not None:
        parts.append(_line(frame.left, y(guide), right, y(guide), "guide"))
    for one in sorted(series, key=lambda one: one.style == 0):
        points = [(x(column), y(value)) for column, value in enumerate(one.values)]
        coordinates = " ".join(f"{across:.1f},{down:.1f}" for across, down in points)
        parts.append(
            Markup('<polyline class="line {}" points="{}" stroke-dasharray="{}"/>').format(
                _style(one), coordinates, _dash(one)
            )
        )
        if spacing >= 14 or columns == 1:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    _style(one), across, down, 2.8 if one.style else 3.6
                )
                for across, down in points
            ]
    labelled = [one for one in series if one.label]
    ends = [y(one.values[-1]) for one in labelled]
    for one, end, label_y in zip(labelled, ends, separate(ends, 15, top, bottom), strict=True):
        parts.append(_line(x(columns - 1) + 5, end, right + 4, label_y, f"leader {_style(one)}"))
        parts.append(text_at(right + 7, label_y + 4, one.label, f"label {_style(one)}"))
    for column, name in enumerate(axis.names):
        values = (f"{one.label or one.name} {number(one.values[column])}" for one in series)
        tooltip = f"{name}: {', '.join(values)}"
        parts.append(_rect(x(column) - spacing / 2, top, spacing, bottom - top, tooltip, "band"))
    return picture(frame.width, height, f"{title}. {_summary(series, axis)}", parts)


def heat_map(
    rows: Sequence[Series],
    axis: Axis,
    frame: Frame,
    *,
    title: str,
    value_title: str,
    value_range: tuple[float, float],
    minimum_cell: float = 5.0,
) -> Markup:
    """Draw a coloured cell for each row and column, with its value in it if there is room.

    The first word of a row's label is at its left, the full label at its right if there is room.
    The picture is wider than the frame if its cells would be narrower than `minimum_cell`.
    """
    columns = len(axis.names)
    spacing = max((frame.width - frame.left - frame.right) / columns, minimum_cell)
    width = round(frame.left + spacing * columns + frame.right)
    low, high = value_range
    bottom = 4 + _ROW * len(rows)
    parts: list[Markup] = []
    for index, row in enumerate(rows):
        top = 4 + _ROW * index
        parts.append(text_at(frame.left - 8, top + 17, row.label.partition(" ")[0], "tick end"))
        if frame.right > 60:
            parts.append(text_at(width - frame.right + 7, top + 17, row.label, "tick"))
        for column, value in enumerate(row.values):
            left = frame.left + column * spacing
            colour = viridis((value - low) / (high - low))
            tooltip = f"{axis.names[column]}, {row.label or row.name}: {number(value)}"
            # Narrow cells overlap slightly, to leave no hairlines between them.
            cell = spacing - 1 if spacing > 8 else spacing + 0.6
            fill = hex_colour(colour)
            parts.append(_rect(left, top, cell, _ROW - 2, tooltip, "cell", fill=fill))
            if spacing >= 44:
                parts.append(
                    Markup(
                        '<text class="value" x="{:.1f}" y="{}" style="fill:{}">{}</text>'
                    ).format(left + spacing / 2, top + 16, text_colour(colour), number(value))
                )
    parts += _column_axis(axis, frame, spacing, bottom)
    parts += colour_bar(frame.left, bottom + 54, value_title, low, high)
    css = "picture broad" if width > frame.width else "picture"
    return picture(width, bottom + 88, f"{title}. {_summary(rows, axis)}", parts, css)


def legend(series: Sequence[Series], guide: str = "") -> Markup:
    """Return an HTML list with a sample and the name of each line, and of the guide if named."""
    lines = [(f"line {_style(one)}", _dash(one), one.name) for one in series]
    if guide:
        lines.append(("guide", "1 3", guide))
    items = [
        Markup(
            '<li><svg class="key" width="44" height="12" viewBox="0 0 44 12" aria-hidden="true">'
            '<line class="{}" x1="1" y1="6" x2="43" y2="6" stroke-dasharray="{}"/></svg>'
            "<span>{}</span></li>"
        ).format(css, dash, printable(name))
        for css, dash, name in lines
    ]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def _style(one: Series) -> str:
    return f"s{one.style % len(_DASHES)}"


def _dash(one: Series) -> str:
    return _DASHES[one.style % len(_DASHES)] or "none"


def _column_axis(axis: Axis, frame: Frame, spacing: float, bottom: float) -> list[Markup]:
    parts = [
        text_at(
            frame.left + (column + 0.5) * spacing, bottom + 19, axis.ticks[column], "tick middle"
        )
        for column in visible_ticks(axis.ticks, spacing)
    ]
    if axis.title:
        parts.append(text_at(frame.left, bottom + 40, axis.title, "title"))
    return parts


def colour_bar(
    left: float, top: float, title: str, low: float, high: float, *, reverse: bool = False
) -> Iterator[Markup]:
    """Draw a title and the colours from `low` to `high` next to it; 28 pixels high."""
    cells, width = 40, 160
    bar = left + 8 + CHARACTER * len(title)
    yield text_at(left, top + 11, title, "title")
    for cell in range(cells):
        fraction = (cell + 0.5) / cells
        colour = hex_colour(viridis(1 - fraction if reverse else fraction))
        yield Markup(
            '<rect class="step" x="{:.1f}" y="{}" width="{:.1f}" height="14" fill="{}"/>'
        ).format(bar + cell * width / cells, top, width / cells + 0.3, colour)
    yield text_at(bar, top + 28, f"{low:.3g}", "tick")
    yield text_at(bar + width, top + 28, f"{high:.3g}", "tick end")


def _summary(series: Sequence[Series], axis: Axis) -> str:
    """Describe a picture for screen readers."""
    return " ".join(
        f"{one.label or one.name}: {number(one.values[0])} at {axis.names[0]}, "
        f"{number(one.values[-1])} at {axis.names[-1]}, "
        f"from {number(min(one.values))} to {number(max(one.values))}."
        for one in series
    )


def picture(
    width: int, height: float, description: str, parts: Sequence[Markup], css: str = "picture"
) -> Markup:
    """Return an SVG of these parts, with a `description` for screen readers."""
    return Markup(
        '<svg class="{css}" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'role="img" aria-label="{description}">{content}</svg>'
    ).format(
        css=css,
        width=width,
        height=height,
        description=printable(description),
        content=Markup("").join(parts),
    )


def text_at(x: float, y: float, text: str, css: str) -> Markup:
    """Draw a line of text with its baseline at `y`, and its anchor (by the style) at `x`."""
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
        css, x, y, printable(text)
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        css, x1, y1, x2, y2
    )


def _rect(
    x: float, y: float, width: float, height: float, tooltip: str, css: str, fill: str = "none"
) -> Markup:
    """Draw a rectangle with a tooltip."""
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}">'
        "<title>{}</title></rect>"
    ).format(css, x, y, width, height, fill, printable(tooltip))
