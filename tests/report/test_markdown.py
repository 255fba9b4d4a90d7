"""Cards and pages: names and texts of the input are neither markup nor controls there."""

import re

import pytest

from recall_jax.report.card import model_card
from recall_jax.report.html import render_html
from recall_jax.report.markdown import bullet, code, plain
from recall_jax.report.page import Table, markdown
from recall_jax.report.training_card import training_card

NAMES = [
    "a`b``c",
    "a|b",
    "---\nlibrary_name: evil\n---",
    "line\n# heading\r\n\n- item",
    "<script>alert(1)</script>",
    "[link](http://evil.example) ![picture](x)",
    "\x1b[31mred\x9b2J",
    "gnp.exe\u202efdp\u2066x\u200f",
    "\ud800",
    "*bold* ~~gone~~ &amp; \\",
]
OBEYED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


def training_record(name):
    return {
        "losses": [1.0, 0.5],
        "best_step": None,
        "steps": 2,
        "tokens": 9,
        "settings": {name: name, "rate": 0.1},
        "model": name,
        "data": {"path": name, "rows": 3},
        "method": "full",
    }


@pytest.mark.parametrize("name", NAMES)
def test_the_card_of_a_fine_tuned_model_holds_names_as_they_read(name):
    card = training_card(training_record(name), name)
    front, title, sentence, facts, heading, settings = card.rstrip("\n").split("\n\n")
    assert front == "---\nlibrary_name: transformers\ntags:\n- recall_jax\n---"
    assert title.startswith("# ") and "\n" not in title
    assert "\n" not in sentence
    assert facts.count("\n") == 1
    assert heading == "## Settings"
    assert settings.count("\n- ") == 1
    assert not OBEYED.search(card)
    assert "<script" not in re.sub("(`+).*?\\1", "", card)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_of_a_merge_holds_names_as_they_read(name, make_report):
    report = make_report(K=2, warnings=[name], settings={"data": name, name: 1})
    report["models"], report["units"] = [name, "b"], [name, *report["units"][1:]]
    card = model_card(report, name)
    assert card.count("\n---\n") == 1  # the end of the front matter
    headings = re.findall("^#+ .*$", re.sub("```.*?```", "", card, flags=re.S), re.M)
    assert headings[1:] == [
        f"## {said}"
        for said in ("Models", "Method", "Weights", "Settings", "Warnings", "Use", "Repeat")
    ]
    assert not OBEYED.search(card)


@pytest.mark.parametrize("name", NAMES)
def test_pages_hold_names_as_they_read(name, make_report):
    report = make_report(K=2, warnings=[name], settings={"data": name}, typical_samples=[0])
    report["models"], report["units"] = [name, "b"], [name, *report["units"][1:]]
    page = render_html(report, [name], [Table(name, [name, "x"], [[name, 1.0]], name)])
    assert not OBEYED.search(page)
    assert page.count("<script>") == 1


@pytest.mark.parametrize("name", NAMES)
def test_tables_in_markdown_hold_names_as_they_read(name):
    text = markdown(Table(name, ["model", name], [[name, -0.5], ["b", None]]))
    title, empty, *lines, end = text.split("\n")
    assert title.startswith("## ")
    assert (empty, end, len(lines)) == ("", "", 4)
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    assert not OBEYED.search(text)


def test_letters_that_join_stay():
    page = render_html_of_text("می\u200cخواهم 👩\u200d🚀")
    assert "می\u200cخواهم 👩\u200d🚀" in page


def render_html_of_text(text):
    from recall_jax.report.wording import printable

    return printable(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("# a", "- \\# a"),
        ("---", "- \\---"),
        ("1. a", "- 1\\. a"),
        ("12) a", "- 12\\) a"),
        ("0.5 of it", "- 0.5 of it"),
        ("-0.5 is low", "- -0.5 is low"),
        ("plain", "- plain"),
    ],
)
def test_an_item_of_a_list_is_a_line_of_text(text, expected):
    assert bullet(text) == expected


def test_spans():
    assert code("a`b") == "``a`b``"
    assert code("`a") == "`` `a ``"
    assert code("") == "` `"
    assert plain("a*b<c[d]") == r"a\*b&lt;c\[d\]"
