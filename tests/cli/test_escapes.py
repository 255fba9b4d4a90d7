"""Names with characters that a terminal obeys: every line that a command prints is printable."""

import json

import pytest
from toys import copy_model, write_rows

ODD = "a\x1b[31mb\u202ec\x9bd\u2066"


def assert_printable(done, shown="\\x1b[31mb\\u202ec\\x9bd\\u2066"):
    for text in (done.out, done.err):
        assert all(line.isprintable() for line in text.split("\n")), text
    assert shown in done.out + done.err


@pytest.mark.parametrize("options", [[], ["--json"]])
@pytest.mark.parametrize("command", ["inspect", "verify"])
def test_of_folders(command, options, recall, toys, tmp_path):
    model = copy_model(toys.llama[0], tmp_path / ODD)
    done = recall(command, model, *options)
    assert done.status == 0
    assert_printable(done, "b\\u202ec")


def test_of_folders_that_are_not_there(recall):
    assert_printable(recall("inspect", ODD))
    assert_printable(recall("evaluate", "m", "--tasks", ODD))
    assert_printable(recall(ODD))
    assert_printable(recall("inspect", f"--{ODD}"))


def test_of_models_of_a_merge(recall, toys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    copy_model(toys.llama[1], tmp_path / ODD)
    rows = write_rows(tmp_path / "rows.jsonl", ["a", "b"])
    done = recall("quick", toys.llama[0], ODD, "--data", rows, "--out", "out\x1b", "--count", 2)
    assert done.status == 0
    assert_printable(done)
    for name in ("README.md", "recall_report.html"):
        text = (tmp_path / "out\x1b" / name).read_text()
        assert not {*text} & {"\x1b", "\x9b", "\u202e", "\u2066"}


def test_of_warnings(recall, toys, tmp_path):
    model = copy_model(toys.llama[0], tmp_path / "model")
    (model / f"{ODD}.py").write_text("")
    done = recall("convert", model, tmp_path / "out", "--to", "huggingface", "--quiet")
    assert done.status == 0
    assert done.err.count("\n") == done.err.count("warning: ") == 1
    assert_printable(done)


def test_of_attributes_and_recipes(recall, toys, tmp_path):
    model = copy_model(toys.llama[0], tmp_path / "model", **{ODD: ODD})
    assert_printable(recall("evaluate", model, "--tasks", "text_names"))
    (tmp_path / "r.yml").write_text(json.dumps({"merge_method": "average", ODD: 1, "models": [1]}))
    assert_printable(recall("plan", tmp_path / "r.yml", "--devices", "v5e-16"), "models.0")
