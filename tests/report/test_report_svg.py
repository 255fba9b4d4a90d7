import itertools
import re
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.report import scales, svg

FRAME = svg.Frame(width=880, left=52, right=146)
finite = st.floats(-1e6, 1e6)


def axis_of(size, names=None):
    names = names or ["embed", *(f"layers.{layer}" for layer in range(size - 2)), "head"][:size]
    return svg.Axis("unit", names, [name.rpartition(".")[2] for name in names])


def series_of(rows):
    return [svg.Series(f"m{i}", row, f"{i} m{i}", i) for i, row in enumerate(rows)]


def luminance(colour):
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@given(data=st.data(), models=st.integers(1, 8), units=st.integers(1, 130))
def test_pictures_are_well_formed_and_stay_in_their_frame(data, models, units):
    row = st.lists(finite, min_size=units, max_size=units)
    series = series_of([data.draw(row) for _ in range(models)])
    values = [value for one in series for value in one.values]
    y_range = scales.nice_range(values)
    chart = ElementTree.fromstring(
        svg.line_chart(series, axis_of(units), FRAME, title="t", y_title="y", y_range=y_range)
    )
    lines = chart.findall("polyline")
    assert len(lines) == models
    for line in lines:
        points = [tuple(map(float, pair.split(","))) for pair in line.get("points").split()]
        assert len(points) == units
        assert all(52 <= x <= 880 - 146 and 30 <= y <= 270 for x, y in points)
    cells = ElementTree.fromstring(
        svg.heat_map(series, axis_of(units), FRAME, title="t", value_title="v", value_range=y_range)
    )
    said = [cell.findtext("title") for cell in cells.findall("rect[@class='cell']")]
    assert len(said) == len(set(said)) == models * units


def test_a_higher_value_is_drawn_higher_and_brighter():
    series = series_of([[0.1, 0.4, 0.9]])
    chart = ElementTree.fromstring(
        svg.line_chart(series, axis_of(3), FRAME, title="t", y_title="y", y_range=(0, 1))
    )
    heights = [float(p.split(",")[1]) for p in chart.find("polyline").get("points").split()]
    assert heights == sorted(heights, reverse=True)
    cells = ElementTree.fromstring(
        svg.heat_map(series, axis_of(3), FRAME, title="t", value_title="v", value_range=(0, 1))
    )
    shades = [luminance(cell.get("fill")) for cell in cells.findall("rect[@class='cell']")]
    assert shades == sorted(shades) and len(set(shades)) == 3


def test_chart_and_heat_map_line_up():
    series, axis = series_of([[1.0] * 34, [0.5] * 34]), axis_of(34)
    chart = ElementTree.fromstring(
        svg.line_chart(series, axis, FRAME, title="t", y_title="y", y_range=(0, 1))
    )
    cells = ElementTree.fromstring(
        svg.heat_map(series, axis, FRAME, title="t", value_title="v", value_range=(0, 1))
    )
    bands = [float(band.get("x")) for band in chart.findall("rect[@class='band']")]
    assert bands == [float(cell.get("x")) for cell in cells.findall("rect[@class='cell']")][:34]


@given(values=st.lists(finite, min_size=1), span=st.sampled_from([0.0, 0.1, 5.0]))
def test_a_nice_range_holds_its_values_between_round_ticks(values, span):
    low, high = scales.nice_range(values, span)
    slack = 1e-6 * (high - low)
    assert low - slack <= min(values) and max(values) <= high + slack
    assert high - low >= span - slack
    ticks = [value for value, _ in scales.value_ticks(low, high)]
    assert 2 <= len(ticks) <= 8
    assert ticks[0] == low and ticks[-1] == pytest.approx(high)


@given(places=st.lists(st.floats(30, 220), min_size=1, max_size=8))
def test_labels_are_moved_apart_in_their_order(places):
    moved = scales.separate(places, 15, 30, 222)
    assert all(30 <= place <= 222 for place in moved)
    order = sorted(range(len(places)), key=lambda index: places[index])
    gaps = [moved[below] - moved[above] for above, below in itertools.pairwise(order)]
    assert all(gap >= 15 - 1e-9 for gap in gaps)


@pytest.mark.parametrize("units", [3, 8, 34, 82, 130])
@pytest.mark.parametrize("width", [280, 690])
def test_ticks_keep_clear_of_each_other(units, width):
    ticks = axis_of(units).ticks
    shown = scales.visible_ticks(ticks, width / units)
    assert {0, units - 1} <= set(shown)
    for first, second in itertools.pairwise(shown):
        written = (len(ticks[first]) + len(ticks[second])) / 2 * 6.6
        assert (second - first) * width / units > written


def test_names_that_crowd_are_thinned():
    ticks = [f"block_{index:02d}" for index in range(100)]
    shown = scales.visible_ticks(ticks, 6.9)
    assert 2 <= len(shown) <= 15


def test_numbers_that_repeat_are_thinned_as_words():
    shown = scales.visible_ticks(["0"] * 100, 3.0)
    assert 2 <= len(shown) <= 30


def test_text_on_any_colour_can_be_read():
    for parts in itertools.product(range(0, 256, 15), repeat=3):
        below = luminance("#{:02x}{:02x}{:02x}".format(*parts))
        above = luminance(scales.text_colour(parts))
        assert (max(below, above) + 0.05) / (min(below, above) + 0.05) >= 4.5


def test_lines_differ_without_colour():
    markup = svg.legend(series_of([[0.0]] * 8))
    assert len(set(re.findall('stroke-dasharray="([^"]*)"', markup))) == 8


@given(name=st.text(min_size=1))
def test_any_name_is_escaped(name):
    series = [svg.Series(name, [1.0], name)]
    axis = svg.Axis(name, [name], [name])
    chart = svg.line_chart(series, axis, FRAME, title=name, y_title=name, y_range=(0, 2))
    cells = svg.heat_map(series, axis, FRAME, title=name, value_title=name, value_range=(0, 2))
    for markup in (chart, cells, svg.legend(series, name)):
        tags = {element.tag for element in ElementTree.fromstring(markup).iter()}
        assert tags <= {"svg", "text", "line", "polyline", "circle", "rect", "title"} | {
            "ul",
            "li",
            "span",
        }
