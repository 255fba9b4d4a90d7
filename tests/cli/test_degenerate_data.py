"""Data that is hardly any: valid output, or one line that says what it lacks, and nothing left."""

import json
import re

import pytest
from toys import tree, write_rows

COUNT = 4
# What each holds, and the distinct rows that the first of two models chooses.
DATA = {
    "one row": (["abc"], [0]),
    "all alike": (["abc def"] * 12, [0]),
    "alike but for one": (["abc def"] * 5 + ["XYZ"] + ["abc def"] * 6, [0, 5]),
    "two rows": (["abc", "XYZ"], [0, 1]),
    "fewer that differ than clusters": (["abc", "XYZ", "h 0"] * 4, [0, 1, 2]),
    "of one token": (["a", "b", "c", "d", "a", "b", "c", "d"], [0, 1, 2, 3]),
    "longer than the model": (["abcdefgh" * 40] * 9, [0]),
    "alike as the model sees them": (["a" * n for n in range(3, 12)], [0]),
}


@pytest.fixture
def rows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda texts: write_rows(tmp_path / "rows.jsonl", texts)


@pytest.mark.parametrize("case", DATA)
def test_a_choice_among_rows_that_are_alike(case, rows, recall, toys, tmp_path):
    texts, expected = DATA[case]
    options = ["--data", rows(texts), "--out", "typical.jsonl", "--count", COUNT]
    done = recall("select", toys.llama[0], *options)
    assert done.status == 0, done
    chosen = [json.loads(line) for line in (tmp_path / "typical.jsonl").read_text().splitlines()]
    assert chosen == [{"text": texts[row], "row": row} for row in expected]
    warned = f"only {len(expected)} of {COUNT} clusters have members"
    assert (warned in done.err) == (len(texts) > COUNT > len(expected))


@pytest.mark.parametrize("case", ["all alike", "longer than the model"])
def test_rows_all_alike_have_no_median_and_merge_by_a_number(case, rows, recall, toys, tmp_path):
    line = ["quick", *toys.llama, "--data", rows(DATA[case][0]), "--out", "out", "--count", COUNT]
    before = tree(tmp_path)
    done = recall(*line)
    assert done.status == 2 and tree(tmp_path) == before
    assert re.fullmatch(
        r"recall: [^\n]+ leaves 1 of 4 typical samples: [^\n]+sigma[^\n]+\n", done.err
    )
    done = recall(*line, "--sigma", 1.0)
    assert done.status == 0, done
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert report["typical_samples"] == [0]
    assert report["typical"]["cluster_sizes"] == [len(DATA[case][0])]
    assert report["typical"]["inertia"] == 0 and report["typical"]["silhouette"] is None
    assert report["warnings"][0].startswith("only 1 of 4 clusters have members")


@pytest.mark.parametrize("similarity", ["linear_cka", "cosine"])
def test_other_measures_on_rows_all_alike(similarity, rows, recall, toys, tmp_path):
    data = rows(DATA["all alike"][0])
    models = ", ".join(f"{{model: {model}}}" for model in toys.llama)
    (tmp_path / "recipe.yml").write_text(
        f"merge_method: recall\nmodels: [{models}]\nsamples: {{data: {data}, count: {COUNT}}}\n"
        f"parameters: {{similarity: {similarity}}}\n"
    )
    before = tree(tmp_path)
    done = recall("merge", "recipe.yml", "out")
    if similarity == "cosine":
        assert done.status == 0, done
    else:
        assert done.status == 2 and tree(tmp_path) == before
        assert re.fullmatch(r"recall: [^\n]+ takes at least 2\n", done.err)


def test_rows_all_empty_but_one_name_the_first_empty_one(rows, recall, toys, tmp_path):
    data = rows(["abc", "", "", ""])
    before = tree(tmp_path)
    done = recall("quick", *toys.llama, "--data", data, "--out", "out")
    assert done.status == 2 and tree(tmp_path) == before
    assert "row 1 (from 0) tokenises to nothing" in done.err
