"""Render pages from templates, with figures and tables in one style; they work offline."""

import base64
import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from recall_jax.report import svg, wording
from recall_jax.report.markdown import plain
from recall_jax.report.markdown import table as markdown_table
from recall_jax.report.scales import nice_range

WIDE = svg.Frame(width=880, left=52, right=146)
NARROW = svg.Frame(width=340, left=46, right=22)


@dataclass(frozen=True)
class Table:
    """Hold a table for a page; a cell is text, a number, or None if empty."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """Hold pictures of the same values, for wide and for narrow screens, and the values."""

    legend: Markup
    wide: Sequence[Markup]
    narrow: Sequence[Markup]
    numbers: Table


def render_page(template: str, **values: Any) -> str:
    """Render a template of this package with `values`."""
    script = _read("script.js")
    page = (
        _environment()
        .get_template(template)
        .render(
            **values,
            style=Markup(_read("style.css")),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    return wording.printable(page)


@functools.cache
def _environment() -> Environment:
    """Return the environment of all pages, which compiles each template once in a process."""
    environment = Environment(
        loader=FunctionLoader(_read),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "breakable": _breakable,
        "number": wording.number,
        "size": wording.size,
        "duration": wording.duration,
    }
    return environment


def line_figure(
    title: str,
    y_title: str,
    axis: svg.Axis,
    lines: Sequence[svg.Series],
    *,
    guide: float | None = None,
    guide_name: str = "",
) -> Figure:
    """Draw lines over one axis, with their values in a table.

    `guide` is the value of a level line, called `guide_name` in the legend.
    """
    values = [value for line in lines for value in line.values]
    y_range = nice_range([*values, *([] if guide is None else [guide])])

    def draw(frame: svg.Frame) -> Any:
        return svg.line_chart(
            lines, axis, frame, title=title, y_title=y_title, y_range=y_range, guide=guide
        )

    numbers = Table(
        title,
        [axis.title.partition(",")[0], *(line.name for line in lines)],
        [
            [name, *(float(line.values[index]) for line in lines)]
            for index, name in enumerate(axis.names)
        ],
    )
    return Figure(
        svg.legend(lines, guide=guide_name),
        [draw(replace(WIDE, right=90))],
        [draw(replace(NARROW, right=60))],
        numbers,
    )


def markdown(table: Table) -> str:
    """Return a table as Markdown below its title, with numbers as on the page."""
    columns, *rows = [[_cell(value) for value in row] for row in (table.columns, *table.rows)]
    text = f"## {plain(table.title)}\n\n{markdown_table(columns, rows)}\n"
    return wording.printable(text)


def unit_tick(unit: str) -> str:
    """Return the tick of a unit: a layer's number, or the unit's name."""
    return wording.short_name(unit.rpartition(".")[2], 12)


def _read(name: str) -> str:
    return files("recall_jax.report").joinpath(name).read_text(encoding="utf-8")


def _cell(value: str | float | None) -> str:
    return (
        "–" if value is None else plain(value) if isinstance(value, str) else wording.number(value)
    )


def _breakable(name: str) -> Markup:
    """Allow line breaks after the separators of a path."""
    return Markup("<wbr>").join(re.split(r"(?<=[/+_-])", name))
