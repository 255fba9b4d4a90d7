import json
import re
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_report_html import Page, assert_self_contained

from recall_jax.checkpoint.units import unit_names
from recall_jax.report import matrix_map
from recall_jax.report.scales import hex_colour, viridis
from recall_jax.report.similarity_page import draw_map, observation_verdict, render_study
from recall_jax.report.study_files import write_study
from recall_jax.report.wording import number
from recall_jax.similarity.choice import MeasureChoice
from recall_jax.similarity.study import MeasureResult, ModelStates, Study, study_record


def make_study(*units, measures=("linear_cka", "procrustes_distance"), seed=0):
    """Models with these units (a number: those of so many), and matrices drawn at random."""
    draw = np.random.default_rng(seed)
    names = [unit_names(one - 2) if isinstance(one, int) else tuple(one) for one in units]
    models = tuple(
        ModelStates(f"runs/m{k}", names, draw.standard_normal((len(names), 4, 3)))
        for k, names in enumerate(names)
    )
    size = sum(map(len, names))
    results = tuple(
        MeasureResult(
            MeasureChoice(name, {}), draw.uniform(0, 1, (size, size)).astype(np.float32), 0.25
        )
        for name in measures
    )
    return Study(models, np.arange(4), results)


def render(study):
    record = study_record(study)
    return render_study(study, record | {"settings": {"layers": "all"}, "versions": {"jax": "1"}})


def section(markup, slug):
    return re.search(f'<section id="{slug}">(.*?)</section>', markup, re.S)[1]


@settings(max_examples=10)
@given(units=st.lists(st.integers(3, 12), min_size=1, max_size=5))
def test_every_pair_and_every_curve_is_on_the_page(units):
    study = make_study(*units)
    markup = render(study)
    page = assert_self_contained(markup)
    slugs = ["linear_cka", "procrustes_distance"]
    assert page.ids() == ["models", "observations", *slugs, "details"]
    for result in study.results:
        part = section(markup, result.choice.slug)
        cells = set(Page(part).cells)
        for row, column in study.pairs:
            assert f"{row + 1}–{column + 1} m{row} and m{column}" in cells
            curve = study.same_depth(result, row, column).values
            assert {number(float(value)) for value in curve} <= cells
            assert number(float(np.mean(curve))) in cells
        for k in range(len(units)):
            steps = study.adjacent(result, k)
            if len(steps) > 1:
                assert {number(float(value)) for value in steps} <= cells
    for picture in re.findall("<svg.*?</svg>", markup, re.S):
        ElementTree.fromstring(picture)


def test_the_script_can_read_every_cell():
    study = make_study(4, ["only"], 5)
    result = study.results[0]
    markup = render(study)
    page = Page(section(markup, "linear_cka"))
    (told,) = [json.loads(attrs["data-map"]) for _, attrs in page.elements if "data-map" in attrs]
    assert told["values"] == [number(float(value)) for value in result.matrix.ravel()]
    assert told["labels"][:5] == [*(f"1 m0 {unit}" for unit in unit_names(2)), "2 m1 only"]
    squares = cells_of(draw_map(study, result))
    assert set(squares) == {
        (told["left"] + x, told["top"] + y) for x in told["places"] for y in told["places"]
    }


def cells_of(markup):
    """Colour by the upper left corner of a cell."""
    found = {}
    for path in ElementTree.fromstring(markup).findall("path"):
        for corner in re.findall(r"M(\d+) (\d+)h", path.get("d")):
            place = tuple(map(int, corner))
            assert place not in found
            found[place] = path.get("fill")
    return found


@pytest.mark.parametrize("reverse", [False, True])
def test_cells_have_the_colour_of_their_value(reverse):
    matrix = np.asarray([[0.0, 0.5], [1.0, np.nan]])
    blocks = [matrix_map.MapBlock("a", ["x", "y"])]
    markup = matrix_map.matrix_map(
        matrix, blocks, title="t", value_title="v", value_range=(0, 1), reverse=reverse
    )
    colours = [colour for _, colour in sorted(cells_of(markup).items(), key=lambda x: x[0][::-1])]
    low, high = hex_colour(viridis(float(reverse))), hex_colour(viridis(float(not reverse)))
    assert (colours[0], colours[2]) == (low, high)
    assert colours[3] is None and 'class="cells missing"' in markup


@pytest.mark.parametrize("units", [(26, 26), (14,) * 4, (34,) * 8, (["only"],) * 6, (3,)])
def test_a_map_fits_the_page_and_its_labels_keep_clear(units):
    study = make_study(*units, measures=("linear_cka",))
    picture = ElementTree.fromstring(draw_map(study, study.results[0]))
    cells = cells_of(draw_map(study, study.results[0]))
    width, size = int(picture.get("width")), len(study.sides)
    assert len(cells) == size**2
    assert width <= 880 or size > 200
    beside = [float(t.get("y")) for t in picture.findall("text[@class='tick end']") if t.get("y")]
    beside = sorted(beside[:-1])  # the last is the colour bar's
    assert len(beside) >= 2 * len(units) or units[0] == ["only"]
    assert min(np.diff(beside)) >= 11.9
    names = [text.text for text in picture.findall("text[@class='title middle']")]
    shown = range(len(units)) if units[0] != ["only"] else ()
    assert sorted(names) == sorted(f"{k + 1} m{k}" for k in shown for _ in "xy")


def test_a_map_stands_alone():
    study = make_study(5, 5)
    text = matrix_map.standalone(draw_map(study, study.results[1]))
    root = ElementTree.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert ".cells" in root.findtext("{http://www.w3.org/2000/svg}style")
    assert "bright is near" in text
    assert "var(" not in text and "url(" not in text


def falling(U, *, at_ends=False):
    """Two models of U units: alike at the input, less and less further on; or with sharp ends."""
    study = make_study(U, U)
    depth = np.arange(U) / U
    matrix = np.full((2 * U, 2 * U), 0.5, np.float32)
    matrix[U + np.arange(U), np.arange(U)] = 1 - depth**2
    steps = np.arange(U - 1)
    for k in (0, U):
        matrix[k + steps, k + steps + 1] = 0.9
        if at_ends:
            matrix[k, k + 1] = matrix[k + U - 3, k + U - 2] = 0.2
    results = (
        replace(study.results[0], matrix=matrix),
        replace(study.results[1], matrix=1 - matrix),
    )
    return replace(study, results=results)


@pytest.mark.parametrize("at_ends", [False, True])
def test_observations_are_those_of_the_numbers(at_ends):
    study = falling(9, at_ends=at_ends)
    record = study_record(study)
    ends = "seen in all 2 models" if at_ends else "not seen in any of 2 models"
    markup = render(study)
    for measure in record["measures"]:
        found = measure["observations"]
        assert [entry["seen"] for entry in found["falls_at_both_ends"]] == [at_ends] * 2
        (pair,) = found["falls_with_depth"]
        assert pair["seen"] is True and pair["spearman"] == pytest.approx(-1)
        part = section(markup, measure["file"])
        assert f"the last layers: <strong>{ends}</strong>" in part
        assert "with depth: <strong>seen</strong>" in part
    cells = Page(section(markup, "observations")).cells
    assert cells[3:] == ["linear_cka", ends, "seen", "procrustes_distance", ends, "seen"]


def test_nothing_is_claimed_where_it_cannot_be_asked():
    some = falling(9, at_ends=True)
    parts = tuple(replace(model, all_units=False) for model in some.models)
    markup = render(replace(some, models=parts))
    assert "the last layers: <strong>cannot be tested</strong>" in markup
    few = render(falling(5))
    assert "the last layers: <strong>cannot be tested</strong>" in few
    unlike = render(make_study(9, 12))
    assert "with depth: <strong>cannot be tested</strong>" in unlike
    alone = render(make_study(9))
    assert "needs two models" in alone and "with depth: <strong>" not in alone


def test_verdicts():
    assert (
        observation_verdict([], "model")
        == observation_verdict([None], "model")
        == "cannot be tested"
    )
    assert observation_verdict([True], "pair") == "seen"
    assert observation_verdict([False, None], "pair") == "not seen"
    assert observation_verdict([True, True], "pair") == "seen in all 2 pairs"
    assert observation_verdict([False, None, False], "model") == "not seen in any of 2 models"
    assert observation_verdict([False, True, None, True], "model") == "seen in 2 of 3 models"


def test_values_that_are_not_finite_are_shown_as_such(tmp_path):
    study = make_study(6, 6)
    study.results[0].matrix[:] = np.nan
    study.results[1].matrix[7, 1] = np.inf
    record = study_record(study)
    page = assert_self_contained(render(study))
    assert "nan" in page.cells
    write_study(tmp_path, study, record | {"settings": {}, "versions": {}})
    stored = json.loads((tmp_path / "similarity.json").read_text())
    assert stored["measures"][0]["adjacent"] == [[None] * 4] * 2
    assert stored["measures"][1]["same_depth"][0]["values"][1] is None


@given(name=st.text(min_size=1, max_size=40))
@settings(max_examples=20)
def test_any_name_is_escaped(name):
    study = make_study(3, ["only"], [name, "b"], measures=("linear_cka",))
    models = tuple(replace(model, name=name) for model in study.models)
    study = replace(study, models=models, warnings=(name,))
    page = assert_self_contained(render(study))
    assert {"script", "style"} <= set(page.tags())
    ElementTree.fromstring(matrix_map.standalone(draw_map(study, study.results[0])))
