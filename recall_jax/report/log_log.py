"""Draw small charts of cost against size, side by side with the same logarithmic axes."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from recall_jax.report.svg import picture, text_at

_COLUMNS, _WIDTH, _HEIGHT = 4, 250, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 30, 28  # margins of one chart
_HEAD = 44
# Colour and dashes of a line; the first is the most prominent.
_STYLES = (
    ("#b13c00", "none"),
    ("#3b6eaf", "7 4"),
    ("#5c744d", "2 3"),
    ("#5b0f65", "9 3 2 3"),
    ("#353535", "4 2"),
)


@dataclass(frozen=True)
class Chart:
    """Hold a chart's title, and for each name the points (x, y), all above zero."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]


def log_log_charts(charts: Sequence[Chart], *, x_title: str, y_title: str) -> Markup:
    """Draw all charts below a legend; a name has the same colour and dashes in each chart."""
    names = list(dict.fromkeys(name for chart in charts for name in chart.lines))
    points = [point for chart in charts for line in chart.lines.values() for point in line]
    (x_low, x_high), (y_low, y_high) = (
        (math.log10(min(values)), math.log10(max(values))) for values in zip(*points, strict=True)
    )
    y_low, y_high = math.floor(y_low), max(math.ceil(y_high), math.floor(y_low) + 1)
    x_span = max(x_high - x_low, 1e-9)

    def place(chart: int, point: tuple[float, float]) -> tuple[float, float]:
        left, top = _corner(chart)
        x, y = map(math.log10, point)
        across = (x - x_low) / x_span * (_WIDTH - _LEFT - _RIGHT)
        down = (y_high - y) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return left + _LEFT + across, top + _TOP + down

    sizes = sorted({x for x, _ in points})
    parts = [*_key(names)]
    for number, chart in enumerate(charts):
        left, top = _corner(number)
        parts.append(text_at(left + _LEFT, top + 18, chart.title, "title"))
        for power in range(y_low, y_high + 1):
            start, end = (place(number, (size, 10.0**power)) for size in (sizes[0], sizes[-1]))
            parts.append(_polyline([start, end], "#e6e6e1", "none", 1))
            if (power - y_low) % 2 == 0:
                parts.append(text_at(start[0] - 6, start[1] + 4, f"{10.0**power:g}", "end"))
        for size in (sizes[0], sizes[-1]):
            x, y = place(number, (size, 10.0**y_low))
            parts.append(text_at(x, y + 16, f"{size:g}", "middle"))
        for name, line in reversed(list(chart.lines.items())):
            colour, dashes = _STYLES[names.index(name) % len(_STYLES)]
            width = 2.6 if names.index(name) == 0 else 1.6
            points = [place(number, point) for point in line]
            parts.append(_polyline(points, colour, dashes, width))
            parts += [_dot(x, y, colour) for x, y in points]
    parts.append(text_at(_LEFT, _HEAD - 8, f"{y_title}, against {x_title}", "title"))
    rows = -(-len(charts) // _COLUMNS)
    width = _WIDTH * min(_COLUMNS, len(charts))
    summaries = " ".join(map(_summary, charts))
    description = f"{y_title} against {x_title}, both logarithmic. {summaries}"
    height = _HEAD + _HEIGHT * rows
    return picture(max(width, 2 * _WIDTH), height, description, parts, "picture broad")


def _corner(chart: int) -> tuple[int, int]:
    return chart % _COLUMNS * _WIDTH, _HEAD + chart // _COLUMNS * _HEIGHT


def _key(names: Sequence[str]) -> Iterator[Markup]:
    for number, name in enumerate(names):
        left = _LEFT + 110 * number
        yield _polyline([(left, 12), (left + 30, 12)], *_STYLES[number % len(_STYLES)], 2)
        yield text_at(left + 36, 16, name, "title")


def _summary(chart: Chart) -> str:
    values = ", ".join(f"{name} {line[-1][1]:.2g}" for name, line in chart.lines.items())
    return f"{chart.title}: {values}."


def _polyline(
    points: Sequence[tuple[float, float]], colour: str, dashes: str, width: float
) -> Markup:
    coordinates = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return Markup(
        '<polyline fill="none" points="{}" stroke="{}" stroke-dasharray="{}" stroke-width="{}"/>'
    ).format(coordinates, colour, dashes, width)


def _dot(x: float, y: float, colour: str) -> Markup:
    return Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.4" fill="{}"/>').format(x, y, colour)
