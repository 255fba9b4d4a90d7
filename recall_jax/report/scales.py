"""Compute ranges, ticks, label positions and colours for pictures."""

import math
from collections.abc import Iterator, Sequence
from itertools import count, pairwise

CHARACTER = 6.6  # width of a tick's character, in CSS pixels at the page's 12 px
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


def nice_range(values: Sequence[float], minimum_span: float = 0.0) -> tuple[float, float]:
    """Return the smallest range with round ends that includes all values and `minimum_span`."""
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


def value_ticks(low: float, high: float) -> Iterator[tuple[float, str]]:
    """Yield values from `low` to `high` in round steps, with their texts."""
    step = _nice_step(high - low)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    plain = decimals <= 5 and max(abs(low), abs(high)) < 1e6
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        yield value, f"{value:.{decimals}f}" if plain else f"{value:.3g}"


def visible_ticks(
    ticks: Sequence[str], spacing: float, line_height: float | None = None
) -> list[int]:
    """Return the columns whose ticks are shown: words, and multiples of a round step between them.

    `spacing` is the width of a column. Stacked or vertical ticks take `line_height` each, others
    the width of their text. Numbers that repeat count as words.
    """

    def clear(first: int, second: int) -> bool:
        room = abs(first - second) * spacing
        if line_height is not None:
            return room >= line_height
        return room >= CHARACTER / 2 * (len(ticks[first]) + len(ticks[second])) + 7

    numbered = [column for column, tick in enumerate(ticks) if tick.isdecimal()]
    if len({int(ticks[column]) for column in numbered}) < len(numbered):
        numbered = []
    words: list[int] = []
    for column in range(len(ticks)):
        if column not in numbered and (not words or clear(words[-1], column)):
            words.append(column)
    between = [column for column in numbered if all(clear(column, word) for word in words)]
    for step in (digit * 10**power for power in count() for digit in (1, 2, 5)):
        numbers = [column for column in between if int(ticks[column]) % step == 0]
        if all(clear(*neighbours) for neighbours in pairwise(numbers)):
            break
    return sorted(words + numbers)


def separate(positions: Sequence[float], gap: float, top: float, bottom: float) -> list[float]:
    """Move positions apart, by a sweep down and one up, until they are `gap` from each other."""
    order = sorted(range(len(positions)), key=lambda index: positions[index])
    moved = list(positions)
    for above, below in pairwise(order):
        moved[below] = max(moved[below], moved[above] + gap)
    limit = bottom
    for index in reversed(order):
        moved[index] = max(min(moved[index], limit), top)
        limit = moved[index] - gap
    return moved


def viridis(fraction: float) -> tuple[int, int, int]:
    """Return the colour of matplotlib's viridis map, by ten anchors, at a fraction in [0, 1]."""
    position = min(max(fraction, 0.0), 1.0) * (len(_VIRIDIS) - 1)
    index = min(int(position), len(_VIRIDIS) - 2)
    first, second = _VIRIDIS[index], _VIRIDIS[index + 1]
    red, green, blue = (
        round(a + (b - a) * (position - index)) for a, b in zip(first, second, strict=True)
    )
    return red, green, blue


def text_colour(background: tuple[int, int, int]) -> str:
    """Return black or white, whichever has more contrast on `background` (sRGB), at least 4.5:1."""
    linear = [
        channel / 12.92 if channel <= 0.04045 else ((channel + 0.055) / 1.055) ** 2.4
        for channel in (part / 255 for part in background)
    ]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    return "#000000" if luminance > 0.179 else "#ffffff"


def hex_colour(colour: tuple[int, int, int]) -> str:
    """Return the colour in CSS notation."""
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _nice_step(span: float) -> float:
    """Return the step, 1, 2 or 5 times a power of ten, that divides `span` into at most five."""
    power = 10.0 ** math.floor(math.log10(span / 5))
    return next(digit * power for digit in (1, 2, 5, 10) if digit * power >= span / 5 * (1 - 1e-9))
