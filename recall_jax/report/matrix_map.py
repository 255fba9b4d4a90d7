"""Draw a matrix of similarities as a heat map, in blocks of models, with a cell for two units."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from markupsafe import Markup

from recall_jax.report.scales import CHARACTER, hex_colour, text_colour, viridis, visible_ticks
from recall_jax.report.svg import colour_bar, picture, text_at
from recall_jax.report.wording import number, printable, short_name

_WIDTH = 880  # width of the picture unless cells would be too small
_CELLS = 4, 40  # least and greatest side of a cell
_GAP = 8  # between models, so that ticks at its two sides do not touch
_LINE = 13
_LEVELS = 128  # number of colours; all cells of one colour are a single path
_ROOM_FOR_VALUE = 34
# For a map in a separate file; in a page the page's style applies.
_STYLE = """
svg { background: #ffffff; font-family: system-ui, "Segoe UI", Roboto, Arial, sans-serif; }
text { font-size: 12px; fill: #5a616a; }
.title { fill: #1b1f23; }
.middle, .value { text-anchor: middle; }
.end { text-anchor: end; }
.cells, .step { shape-rendering: crispEdges; }
.missing { fill: #c8c8c8; }
"""


@dataclass(frozen=True)
class MapBlock:
    """Describe the rows, and the columns, of one model: its name, and a tick for each unit."""

    name: str
    ticks: Sequence[str]


@dataclass(frozen=True)
class Grid:
    """Place the cells, in CSS pixels: `offsets` (A,) along either axis from the top left corner."""

    left: int
    top: int
    cell: int
    offsets: Sequence[int]
    margin: int  # of the ticks
    named: bool  # whether models are named next to the ticks

    @property
    def extent(self) -> int:
        """Return the width, and the height, of all cells."""
        return self.offsets[-1] + self.cell


def lay_out(blocks: Sequence[MapBlock]) -> Grid:
    """Make cells as large as the page's width allows; only the smallest cells may exceed it."""
    named = any(len(block.ticks) > 1 for block in blocks)
    margin = round(1.1 * CHARACTER * max(len(tick) for block in blocks for tick in block.ticks)) + 8
    left = margin + (20 if named else 0)
    count = sum(len(block.ticks) for block in blocks)
    gap = _GAP if named else 0
    cell = (_WIDTH - left - gap * len(blocks)) // count
    cell = min(max(cell, _CELLS[0]), _CELLS[1])
    sizes = [len(block.ticks) * cell + gap for block in blocks]
    starts = [0, *accumulate(sizes)][:-1]
    offsets = [
        start + index * cell
        for start, block in zip(starts, blocks, strict=True)
        for index in range(len(block.ticks))
    ]
    return Grid(left, 4, cell, offsets, margin, named)


def matrix_map(
    matrix: np.ndarray,
    blocks: Sequence[MapBlock],
    *,
    title: str,
    value_title: str,
    value_range: tuple[float, float],
    reverse: bool = False,
) -> Markup:
    """Draw the heat map of a matrix (A, A), the first row on top.

    Bright cells are high, or low with `reverse`, for distances. Values that are not finite are
    grey.
    """
    grid = lay_out(blocks)
    bar = round(CHARACTER * len(value_title)) + 180
    width = grid.left + max(grid.extent, bar) + 4
    bottom = grid.top + grid.extent + grid.margin + (26 if grid.named else 0)
    parts = [
        *_cells(matrix, grid, value_range, reverse),
        *_ticks(blocks, grid),
        *colour_bar(grid.left, bottom + 6, value_title, *value_range, reverse=reverse),
    ]
    description = f"{title}. {_summary(matrix, blocks)}"
    return picture(width, bottom + 40, description, parts, "picture broad")


def standalone(markup: Markup) -> str:
    """Return the content of an SVG file with the map and its style."""
    head, rest = markup.split(">", 1)
    return f'{head} xmlns="http://www.w3.org/2000/svg"><style>{_STYLE}</style>{rest}\n'


def hover_data(matrix: np.ndarray, blocks: Sequence[MapBlock], labels: Sequence[str]) -> str:
    """Return as JSON what the page's script needs to show the value of the cell pointed at."""
    grid = lay_out(blocks)
    values = [number(float(value)) for value in np.ravel(matrix)]
    corner = {"left": grid.left, "top": grid.top, "cell": grid.cell}
    record = {**corner, "places": list(grid.offsets), "labels": list(labels), "values": values}
    return json.dumps(record, separators=(",", ":"))


def _cells(
    matrix: np.ndarray, grid: Grid, value_range: tuple[float, float], reverse: bool
) -> Iterator[Markup]:
    low, high = value_range
    fractions = np.clip((np.nan_to_num(matrix) - low) / (high - low), 0, 1)
    levels = np.rint((1 - fractions if reverse else fractions) * (_LEVELS - 1)).astype(int)
    levels[~np.isfinite(matrix)] = -1
    corners = np.asarray(grid.offsets)
    for level in np.unique(levels):
        rows, columns = np.nonzero(levels == level)
        across, down = grid.left + corners[columns], grid.top + corners[rows]
        side = grid.cell
        path = "".join(
            f"M{x} {y}h{side}v{side}h-{side}z" for x, y in zip(across, down, strict=True)
        )
        if level < 0:
            yield Markup('<path class="cells missing" d="{}"/>').format(path)
            continue
        colour = viridis(level / (_LEVELS - 1))
        yield Markup('<path class="cells" fill="{}" d="{}"/>').format(hex_colour(colour), path)
        if grid.cell >= _ROOM_FOR_VALUE:
            for x, y, value in zip(across, down, matrix[rows, columns], strict=True):
                yield Markup('<text class="value" x="{}" y="{}" style="fill:{}">{}</text>').format(
                    x + side // 2, y + side // 2 + 4, text_colour(colour), _short(float(value))
                )


def _ticks(blocks: Sequence[MapBlock], grid: Grid) -> Iterator[Markup]:
    """Draw ticks of units to the left of the cells and below them, and models' names outside."""
    below = grid.top + grid.extent
    done = 0
    for index, block in enumerate(blocks, start=1):
        count = len(block.ticks)
        for unit in visible_ticks(block.ticks, grid.cell, line_height=_LINE):
            middle = grid.offsets[done + unit] + grid.cell / 2 + 4
            yield text_at(grid.left - 6, grid.top + middle, block.ticks[unit], "tick end")
            yield _vertical_text(grid.left + middle, below + 6, block.ticks[unit], "tick end")
        if count > 1:
            size = count * grid.cell
            limit = int(size / CHARACTER) - 3
            name = f"{index} {short_name(block.name, limit)}" if limit > 3 else f"{index}"
            middle = grid.offsets[done] + size / 2
            yield _vertical_text(12, grid.top + middle, name, "title middle")
            yield text_at(grid.left + middle, below + grid.margin + 14, name, "title middle")
        done += count


def _vertical_text(x: float, y: float, text: str, css: str) -> Markup:
    """Draw text that reads upwards."""
    return Markup(
        '<text class="{}" transform="translate({:.1f} {:.1f}) rotate(-90)">{}</text>'
    ).format(css, x, y, printable(text))


def _short(value: float) -> str:
    return f"{value:.2f}" if abs(value) < 100 else f"{value:.0e}"


def _summary(matrix: np.ndarray, blocks: Sequence[MapBlock]) -> str:
    """Describe the picture for screen readers."""
    names = ", ".join(f"{index} {block.name}" for index, block in enumerate(blocks, start=1))
    finite = matrix[np.isfinite(matrix)]
    if not finite.size:
        return f"{names}: no value is finite."
    return f"{names}: from {number(float(finite.min()))} to {number(float(finite.max()))}."
