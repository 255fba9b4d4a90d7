"""Charts as SVG markup: pure functions of numbers and names, styled by the page's CSS.

A `Frame` gives the horizontal geometry; pictures drawn in one frame over one axis line up column by
column. Colours of lines are the CSS classes `s0` … `s7`; dashes tell them apart without colour.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, pairwise

from markupsafe import Markup

from recall_jax.report.wording import number, printable

# Style 0 is the line to look at: solid and heavy.
_DASHES = ("", "9 5", "2 3", "10 3 2 3", "20 4", "4 2", "8 3 2 3 2 3", "1.5 6")
_VIRIDIS = (
    (0x44, 0x01, 0x54),
    (0x48, 0x28, 0x78),
    (0x3E, 0x49, 0x89),
    (0x31, 0x68, 0x8E),
    (0x26, 0x82, 0x8E),
    (0x1F, 0x9E, 0x89),
    (0x35, 0xB7, 0x79),
    (0x6E, 0xCE, 0x58),
    (0xB5, 0xDE, 0x2B),
    (0xFD, 0xE7, 0x25),
)
_ROW = 26
_CHARACTER = 6.6  # width of a tick label's character at the page's 12 px


@dataclass(frozen=True)
class Series:
    """One line, or one row: a value for each column of the axis, a full name and a short label."""

    name: str
    values: Sequence[float]
    label: str = ""
    style: int = 0


@dataclass(frozen=True)
class Axis:
    """The columns of a picture: what they are, each one's full name, and what a tick says."""

    title: str
    names: Sequence[str]
    ticks: Sequence[str]


@dataclass(frozen=True)
class Frame:
    """Width and side margins of a picture, in CSS pixels."""

    width: int
    left: int
    right: int


def nice_range(values: Sequence[float], minimum_span: float = 0.0) -> tuple[float, float]:
    """The smallest range with round ends that holds all values and is `minimum_span` wide."""
    low, high = min(values), max(values)
    span = max(minimum_span, 1e-6 * max(abs(low), abs(high))) or 1.0
    if high - low < span:
        middle = (low + high) / 2
        floor = 0.0 if low >= 0 else -math.inf
        low = max(middle - span / 2, floor)
        high = low + span
    step = _nice_step(high - low)
    low, high = (math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step)
    return (low, high) if _nice_step(high - low) <= step else nice_range((low, high))


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
    """Lines over the columns of `axis`, each labelled at its right end.

    `guide` is a value marked by a thin dotted level line, which `legend` can name.
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

    parts = [_text(0, 14, y_title, "title")]
    for value, tick in _value_ticks(low, high):
        parts.append(_line(frame.left, y(value), right, y(value), "grid"))
        parts.append(_text(frame.left - 8, y(value) + 4, tick, "tick end"))
    parts += _column_axis(axis, frame, spacing, bottom)
    if guide is not None:
        parts.append(_line(frame.left, y(guide), right, y(guide), "guide"))
    for one in sorted(series, key=lambda one: one.style == 0):
        places = [(x(column), y(value)) for column, value in enumerate(one.values)]
        points = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        parts.append(
            Markup('<polyline class="line {}" points="{}" stroke-dasharray="{}"/>').format(
                _style(one), points, _dash(one)
            )
        )
        if spacing >= 14 or columns == 1:
            parts += [
                Markup('<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="{}"/>').format(
                    _style(one), across, down, 2.8 if one.style else 3.6
                )
                for across, down in places
            ]
    labelled = [one for one in series if one.label]
    ends = [y(one.values[-1]) for one in labelled]
    for one, end, place in zip(labelled, ends, _apart(ends, 15, top, bottom), strict=True):
        parts.append(_line(x(columns - 1) + 5, end, right + 4, place, f"leader {_style(one)}"))
        parts.append(_text(right + 7, place + 4, one.label, f"label {_style(one)}"))
    for column, name in enumerate(axis.names):
        said = ", ".join(f"{one.label or one.name} {number(one.values[column])}" for one in series)
        parts.append(
            _rect(x(column) - spacing / 2, top, spacing, bottom - top, f"{name}: {said}", "band")
        )
    return _svg(frame.width, height, f"{title}. {_summary(series, axis)}", parts)


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
    """One coloured cell for each row and column, with the value in it where it fits.

    The first word of a row's label stands at its left, the whole at its right if there is room.
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
        parts.append(_text(frame.left - 8, top + 17, row.label.partition(" ")[0], "tick end"))
        if frame.right > 60:
            parts.append(_text(width - frame.right + 7, top + 17, row.label, "tick"))
        for column, value in enumerate(row.values):
            left = frame.left + column * spacing
            colour = _viridis((value - low) / (high - low))
            said = f"{axis.names[column]}, {row.label or row.name}: {number(value)}"
            # Narrow cells overlap a little, or hairlines would show between them.
            cell = spacing - 1 if spacing > 8 else spacing + 0.6
            parts.append(_rect(left, top, cell, _ROW - 2, said, "cell", fill=_hex(colour)))
            if spacing >= 44:
                parts.append(
                    Markup(
                        '<text class="value" x="{:.1f}" y="{}" style="fill:{}">{}</text>'
                    ).format(left + spacing / 2, top + 16, text_colour(colour), number(value))
                )
    parts += _column_axis(axis, frame, spacing, bottom)
    parts += _colour_bar(frame, bottom + 54, value_title, low, high)
    css = "picture broad" if width > frame.width else "picture"
    return _svg(width, bottom + 88, f"{title}. {_summary(rows, axis)}", parts, css)


def legend(series: Sequence[Series], guide: str = "") -> Markup:
    """An HTML list that names each line, and the guide if there is one, beside a piece of it."""
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


def text_colour(background: tuple[int, int, int]) -> str:
    """Black or white, whichever stands out more on `background` (sRGB); at least 4.5 to 1."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (part / 255 for part in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def _style(one: Series) -> str:
    return f"s{one.style % len(_DASHES)}"


def _dash(one: Series) -> str:
    return _DASHES[one.style % len(_DASHES)] or "none"


def _column_axis(axis: Axis, frame: Frame, spacing: float, bottom: float) -> list[Markup]:
    parts = [
        _text(frame.left + (column + 0.5) * spacing, bottom + 19, axis.ticks[column], "tick middle")
        for column in _visible_ticks(axis.ticks, spacing)
    ]
    if axis.title:
        parts.append(_text(frame.left, bottom + 40, axis.title, "title"))
    return parts


def _visible_ticks(ticks: Sequence[str], spacing: float) -> list[int]:
    """Columns whose tick is written: words, and multiples of a round step between them."""

    def clear(first: int, second: int) -> bool:
        room = abs(first - second) * spacing
        return room >= _CHARACTER / 2 * (len(ticks[first]) + len(ticks[second])) + 7

    words: list[int] = []
    for column, tick in enumerate(ticks):
        if not tick.isdecimal() and (not words or clear(words[-1], column)):
            words.append(column)
    for step in (digit * 10**power for power in count() for digit in (1, 2, 5)):
        numbers = [
            column
            for column, tick in enumerate(ticks)
            if tick.isdecimal()
            and int(tick) % step == 0
            and all(clear(column, word) for word in words)
        ]
        if all(clear(*neighbours) for neighbours in pairwise(numbers)):
            break
    return sorted(words + numbers)


def _value_ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    step = _nice_step(high - low)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = decimals <= 5 and max(abs(low), abs(high)) < 1e6
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        yield value, f"{value:.{decimals}f}" if plain else f"{value:.3g}"


def _nice_step(span: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that cuts `span` into five parts or fewer."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= span / 5 * (1 - 1e-9))


def _apart(places: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """`places` moved as little as a sweep down and one up need to keep `gap` between them."""
    order = sorted(range(len(places)), key=lambda index: places[index])
    moved = list(places)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + gap)
    limit = bottom
    for index in reversed(order):
        moved[index] = max(min(moved[index], limit), top)
        limit = moved[index] - gap
    return moved


def _colour_bar(frame: Frame, top: float, title: str, low: float, high: float) -> Iterator[Markup]:
    cells, width = 40, 160
    left = frame.left + 8 + _CHARACTER * len(title)
    yield _text(frame.left, top + 11, title, "title")
    for cell in range(cells):
        colour = _hex(_viridis((cell + 0.5) / cells))
        yield Markup(
            '<rect class="step" x="{:.1f}" y="{}" width="{:.1f}" height="14" fill="{}"/>'
        ).format(left + cell * width / cells, top, width / cells + 0.3, colour)
    yield _text(left, top + 28, f"{low:.3g}", "tick")
    yield _text(left + width, top + 28, f"{high:.3g}", "tick end")


def _viridis(fraction: float) -> tuple[int, int, int]:
    """Colour of the viridis map (matplotlib's, ten anchors) at a place in [0, 1]."""
    place = min(max(fraction, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(place), len(_VIRIDIS) - 2)
    first, second = _VIRIDIS[index], _VIRIDIS[index + 1]
    red, green, blue = (
        round(a + (b - a) * (place - index)) for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def _hex(colour: tuple[int, int, int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _summary(series: Sequence[Series], axis: Axis) -> str:
    """What a picture shows, for those who hear it."""
    return " ".join(
        f"{one.label or one.name}: {number(one.values[0])} at {axis.names[0]}, "
        f"{number(one.values[-1])} at {axis.names[-1]}, "
        f"from {number(min(one.values))} to {number(max(one.values))}."
        for one in series
    )


def _svg(
    width: int, height: float, description: str, parts: Sequence[Markup], css: str = "picture"
) -> Markup:
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


def _text(x: float, y: float, text: str, css: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(
        css, x, y, printable(text)
    )


def _line(x1: float, y1: float, x2: float, y2: float, css: str) -> Markup:
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>').format(
        css, x1, y1, x2, y2
    )


def _rect(
    x: float, y: float, width: float, height: float, said: str, css: str, fill: str = "none"
) -> Markup:
    """A rectangle that says `said` when pointed at."""
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}" fill="{}">'
        "<title>{}</title></rect>"
    ).format(css, x, y, width, height, fill, printable(said))
