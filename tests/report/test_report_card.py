import re

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recall_jax.report.card import model_card
from recall_jax.report.wording import number


def front_matter(card):
    return yaml.safe_load(re.match("---\n(.*?)---\n", card, re.S)[1])


def tables(card):
    """Cells of each table of the card, header first."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", card, re.M)
    split = [[re.split(r"(?<!\\)\|", row)[1:-1] for row in block.splitlines()] for block in blocks]
    return [[[cell.strip() for cell in row] for row in rows] for rows in split]


def test_front_matter_names_the_tools_and_only_given_base_models(make_report):
    report = make_report(K=2)
    assert front_matter(model_card(report, "out")) == {
        "library_name": "transformers",
        "tags": ["merge", "recall", "recall_jax"],
    }
    card = model_card(report, "out", ["org/a", "org/b: c", "org/a"])
    assert front_matter(card)["base_model"] == ["org/a", "org/b: c"]


def test_models_and_their_weights_are_listed(make_report):
    report = make_report(K=3, U=7)
    models, weights, settings = tables(model_card(report, "out"))
    assert models[2:] == [
        ["1", "`runs/model_0`"],
        ["2", "`runs/model_1`"],
        ["3", "`runs/model_2` (newest, reference)"],
    ]
    assert weights[0] == ["unit", "1", "2", "3"]
    assert weights[2:] == [
        [unit, *(number(row[index]) for row in report["weights"])]
        for index, unit in enumerate(report["units"])
    ]
    assert ["`samples.count`", "`3`"] in settings


def test_a_deep_model_is_cut_to_thirds(make_report):
    report = make_report(K=2, U=62)
    rows = tables(model_card(report, "out"))[1][2:]
    assert [row[0] for row in rows] == [
        "embed to layers.19",
        "layers.20 to layers.39",
        "layers.40 to head",
    ]
    means = [sum(report["weights"][1][a:b]) / (b - a) for a, b in [(0, 21), (21, 41), (41, 62)]]
    assert [row[2] for row in rows] == [number(mean) for mean in means]


def test_constant_weights_take_one_row_and_claim_no_similarity(constant_report):
    card = model_card(constant_report, "out")
    assert tables(card)[1][2:] == [["every unit", "0.1250", "0.2500", "0.5000", "0.0625"]]
    assert "RECALL" not in card and "rises" not in card


@pytest.mark.parametrize("absent", ["weights", "similarity", "reference"])
def test_absent_parts_leave_no_trace(make_report, absent):
    card = model_card(make_report(**{absent: None}), "out")
    assert "None" not in card
    assert ("## Weights" in card) == (absent != "weights")


def test_how_to_load_and_to_repeat(make_report):
    card = model_card(make_report(), 'a "quoted" name')
    snippet = re.search("```python\n(.*?)```", card, re.S)[1]
    compile(snippet, "snippet", "exec")
    assert r'AutoModelForCausalLM.from_pretrained("a \"quoted\" name")' in snippet
    assert "recall merge recall_recipe.yml OUT" in card


def test_warnings_are_shown(make_report):
    card = model_card(make_report(warnings=["unit <b>\nlayers.1* is degenerate"]), "out")
    assert r"- unit &lt;b> layers.1\* is degenerate" in card


@settings(max_examples=50)
@example(name="a|b")
@example(name="`a``b`")
@given(name=st.text())
def test_no_name_breaks_a_table(make_report, name):
    report = make_report(K=2, settings={"data": name}, warnings=[name])
    report["models"] = [name, "b"]
    models, _, settings_table = tables(model_card(report, name))
    assert all(len(row) == 2 for row in models + settings_table)
    assert len(models) == 4 and len(settings_table) == 3
