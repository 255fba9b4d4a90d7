import base64
import hashlib
import itertools
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recall_jax.report.html import Table, render_html
from recall_jax.report.wording import number

VOID = {"meta", "br", "wbr"}


class Page(HTMLParser):
    """Elements and texts of a page; fails on a tag that is not closed where it should be."""

    def __init__(self, markup):
        super().__init__()
        self.open, self.elements, self.cells = [], [], []
        self.feed(markup)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data

    def tags(self):
        return [tag for tag, _ in self.elements]

    def ids(self):
        return [attrs["id"] for _, attrs in self.elements if "id" in attrs]


def assert_self_contained(markup):
    page = Page(markup)
    loading = {"src", "href", "srcset", "data", "action", "poster", "background", "xlink:href"}
    for tag, attrs in page.elements:
        assert tag not in {"link", "img", "iframe", "object", "embed", "base", "video", "audio"}
        assert not loading & set(attrs), (tag, attrs)
        assert not [name for name in attrs if name.startswith("on")]
        assert "url(" not in (attrs.get("style") or "")
    style = re.search("<style>(.*?)</style>", markup, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert page.tags().count("script") == page.tags().count("style") == 1
    return page


SECTIONS = ["method", "weights", "similarity", "adjacent", "sigma", "samples", "details"]


@settings(max_examples=12)
@given(models=st.integers(1, 8), units=st.integers(3, 130))
def test_every_value_is_on_the_page(make_report, models, units):
    report = make_report(K=models, U=units)
    markup = render_html(report, ["a", "b", "c"])
    page = assert_self_contained(markup)
    assert page.ids() == SECTIONS
    cells = set(page.cells)
    for key in ("weights", "similarity"):
        assert {number(value) for row in report[key] for value in row} <= cells
    for key in ("sigma", "adjacent"):
        assert {number(value) for value in report[key]} <= cells
    assert {*report["models"][:-1], f"{report['models'][-1]} newest, reference"} <= cells
    pictures = re.findall("<svg.*?</svg>", markup, re.S)
    # A chart and a heat map for two, a chart for two more, each wide and narrow; and the keys.
    assert len(pictures) == 12 + 2 * models + 1
    for picture in pictures:
        ElementTree.fromstring(picture)


def test_the_numbers_stand_in_their_row(make_report):
    report = make_report(K=3, U=5)
    cells = Page(render_html(report)).cells
    start = cells.index("layers.1")
    assert cells[start + 1 : start + 4] == [number(row[2]) for row in report["weights"]]


ABSENT = {
    "similarity": (None, {"similarity"}),
    "weights": (None, {"weights"}),
    "adjacent": (None, {"adjacent"}),
    "sigma": (None, {"sigma"}),
    "typical": (None, {"samples"}),
    "typical_samples": ([], set()),
    "reference": (None, set()),
    "peak_memory_bytes": (None, set()),
    "settings": ({}, set()),
    "timing_s": ({}, set()),
    "versions": ({}, set()),
    "bytes": ({"read": None, "written": None}, set()),
}


@pytest.mark.parametrize("key", ABSENT)
def test_a_part_that_is_absent_leaves_no_trace(make_report, key):
    value, gone = ABSENT[key]
    page = assert_self_contained(render_html(make_report(**{key: value})))
    assert page.ids() == [section for section in SECTIONS if section not in gone]
    assert "None" not in "".join(page.cells)


def test_a_constant_merge_shows_its_weights_once(constant_report):
    markup = render_html(constant_report)
    page = assert_self_contained(markup)
    assert page.ids() == ["method", "details"]
    assert "svg" not in page.tags()
    cells = page.cells
    for name, row in zip(constant_report["models"], constant_report["weights"], strict=True):
        assert cells[cells.index(name) + 1] == number(row[0])
    assert "rises with depth" not in markup


def test_a_method_unknown_here_is_named(constant_report):
    markup = render_html(constant_report | {"method": "slerp", "weights": None})
    assert assert_self_contained(markup).ids() == ["method", "details"]
    assert "<code>slerp</code>" in markup


@pytest.mark.parametrize(("rises", "answer"), [(True, "yes"), (False, "no")])
def test_the_verdict_is_the_reports_with_the_means_behind_it(make_report, rises, answer):
    report = make_report(K=2, U=9, weight_rises_with_depth=rises)
    row = [0.9, 0.1, 0.2, 0.5, 0.5, 0.5, 0.6, 0.7, 0.9]
    report["weights"] = [[1 - weight for weight in row], row]
    markup = render_html(report)
    assert f"weight rises with depth: <strong>{answer}</strong>" in markup
    assert "It is 0.1500 on average over the first third of the layers, 0.6500 over" in markup


def test_a_merge_in_memory_is_shown_without_what_it_did_not_measure(make_report):
    report = make_report(device="cpu", selection_passes=2)
    for key in ("typical", "timing_s", "bytes", "peak_memory_bytes", "versions"):
        del report[key]
    cells = assert_self_contained(render_html(report)).cells
    assert cells[cells.index("selection passes") + 1] == "2"
    assert "peak memory" not in cells


def test_weights_of_an_earlier_run_are_said_to_be(make_report):
    report = make_report(settings={"weights": "old.json", "dtype": None})
    markup = render_html(report)
    assert "earlier run: <code>old.json</code>" in markup
    assert "dtype" not in markup


HOSTILE = [
    "<script>alert(1)</script><img src=http://evil.example/x.png onerror=alert(2)>",
    "</div></li></ol></main><style>body{display:none}</style>",
    "{{ 7 * 7 }}{% raw %}",
    "nul \x00 bell \x07 lone \ud800 mark \u202e turned",
    "x" * 100_000,
    "שלום عليكم\n" * 10,
]


def test_hostile_texts_and_names_stay_text(make_report):
    report = make_report(
        K=len(HOSTILE),
        typical_samples=list(range(len(HOSTILE))),
        warnings=HOSTILE,
        settings={text[:50]: text for text in HOSTILE},
        versions={"a": HOSTILE[0]},
    )
    report["models"] = HOSTILE
    report["units"] = [text[:60] for text in HOSTILE] + ["a", "b"]
    tables = [Table(HOSTILE[0], HOSTILE[:2], [[HOSTILE[1], 1.0], [HOSTILE[2], None]], HOSTILE[0])]
    markup = render_html(report, HOSTILE, tables)
    assert_self_contained(markup)
    assert "{{ 7 * 7 }}{% raw %}" in markup
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in markup
    assert "nul ␀ bell ␇ lone ? mark" in markup.encode("utf-8").decode("utf-8")
    assert "80,000 more characters are not shown" in markup
    for picture in re.findall("<svg.*?</svg>", markup, re.S):
        ElementTree.fromstring(picture)


def test_texts_that_do_not_fit_the_samples_are_refused(make_report):
    with pytest.raises(ValueError, match="2 texts for 3 typical samples"):
        render_html(make_report(), ["a", "b"])


def test_long_texts_are_folded_and_short_ones_are_not(make_report):
    markup = render_html(make_report(), ["short", "long " * 200, "line\n" * 9])
    samples = markup[markup.index('<section id="samples">') : markup.index('id="details"')]
    assert samples.count("<details>") == 2
    assert "long " * 200 in samples and "line\n" * 9 in samples
    assert "data row 11 · stands for 1 text<" in samples
    assert "data row 3 · stands for 9 texts<" in samples


def test_data_used_whole_are_not_called_groups(make_report):
    typical = {"cluster_sizes": [1, 1, 1], "inertia": 0.0, "silhouette": None}
    markup = render_html(make_report(typical=typical))
    assert "Every text of the data was used" in markup and "groups" not in markup


def test_an_extra_table_is_shown(make_report):
    table = Table("Scores", ["model", "task", "note"], [["base", 0.25, "x"], ["new", None, "y"]])
    cells = Page(render_html(make_report(), tables=[table])).cells
    start = cells.index("task")
    assert cells[start - 1 : start + 8] == [
        *("model", "task", "note"),
        *("base", "0.2500", "x"),
        *("new", "–", "y"),
    ]


def test_warnings_stand_first(make_report):
    markup = render_html(make_report(warnings=["unit embed is degenerate"]))
    assert markup.index("unit embed is degenerate") < markup.index("What was done")
    assert "1 warning<" in markup


def test_the_policy_allows_this_script_and_nothing_else(make_report):
    markup = render_html(make_report())
    script = re.search("<script>(.*?)</script>", markup, re.S)[1]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in Page(markup).elements if "http-equiv" in a)
    assert policy == (
        "default-src 'none'; style-src 'unsafe-inline'; " + f"script-src 'sha256-{digest}'"
    )


def palettes(markup):
    """The colours of the light scheme and of the dark one, name -> linear RGB."""
    style = re.search("<style>(.*?)</style>", markup, re.S)[1]
    light, dark, *_ = re.findall(r":root \{(.*?)\}", style, re.S)
    found = []
    for block in (light, dark):
        names = dict(re.findall(r"--([\w-]+): #([0-9a-f]{6})", block))
        parts = {n: np.array([int(c[i : i + 2], 16) for i in (0, 2, 4)]) for n, c in names.items()}
        found.append(
            {
                name: np.where(
                    c / 255 <= 0.04045, c / 255 / 12.92, ((c / 255 + 0.055) / 1.055) ** 2.4
                )
                for name, c in parts.items()
            }
        )
    return found


TEXT_ON = [
    *itertools.product(["ink", "muted", "accent"], ["surface", "panel"]),
    ("notice-ink", "notice-surface"),
    *((f"s{style}", "surface") for style in range(8)),
]


@pytest.mark.parametrize("scheme", [0, 1])
def test_text_has_contrast_in_both_schemes(make_report, scheme):
    colours = palettes(render_html(make_report()))[scheme]
    for text, surface in TEXT_ON:
        light, dark = sorted(
            (colours[name] @ [0.2126, 0.7152, 0.0722] for name in (text, surface)), reverse=True
        )
        assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, surface)


@pytest.mark.parametrize("scheme", [0, 1])
@pytest.mark.parametrize(
    "sight",
    [
        np.eye(3),
        # Machado et al. 2009, severity 1: protanopia, deuteranopia, tritanopia.
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ],
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.01182, 0.04294, 0.968881],
        ],
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.3039],
        ],
    ],
    ids=["full", "protan", "deutan", "tritan"],
)
def test_lines_differ_in_colour_for_every_sight(make_report, scheme, sight):
    colours = palettes(render_html(make_report()))[scheme]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]

    def lab(linear):
        xyz = to_xyz @ np.clip(sight @ linear, 0, 1) / [0.9505, 1, 1.089]
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    seen = [lab(colours[f"s{style}"]) for style in range(8)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 15


def test_rendering_needs_no_jax():
    code = (
        "import sys, recall_jax.report.html, recall_jax.report.card, recall_jax.report.record; "
        "sys.exit(bool({'jax', 'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
