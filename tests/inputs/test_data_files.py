"""Data files: rows as they stand in every format, and each fault with its place."""

import datetime
import json

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.inputs.data import read_rows, write_jsonl
from recall_jax.inputs.shapes import Chat, Fields, Pair, row_content

ROWS = [{"text": "zero"}, {"text": " one,\ttwo "}, {"text": 'say "three"'}]


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(rows, end="\n"):
    return "".join(json.dumps(row) + end for row in rows)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", lines(ROWS)),
        ("rows.JSONL", lines(ROWS, "\r\n")),
        ("rows.jsonl", "\ufeff\n" + lines(ROWS, "\n\n  \t\n").rstrip()),
        ("rows.json", json.dumps(ROWS)),
        ("rows.json", "\ufeff" + json.dumps(ROWS, indent=2)),
        ("rows.csv", 'text\nzero\n" one,\ttwo "\n"say ""three"""\n'),
        ("rows.csv", '\ufefftext\r\n\r\nzero\r\n" one,\ttwo "\r\n"say ""three"""\r\n\r\n'),
        ("rows.txt", 'zero\n one,\ttwo \nsay "three"'),
        ("rows.txt", '\ufeff\r\nzero\r\n\r\n one,\ttwo \r\n   \r\nsay "three"\r\n'),
    ],
)
def test_the_same_rows_from_every_format(tmp_path, name, content):
    assert read_rows(write(tmp_path, name, content)) == ROWS


def test_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    rows = [{"text": "zero", "n": 1}, {"text": None, "n": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert read_rows(path) == rows


def test_only_line_breaks_break_lines(tmp_path):
    text = "a\u2028b\x0bc\x85d\x1ce"
    assert read_rows(write(tmp_path, "rows.txt", text + "\n")) == [{"text": text}]
    row = {"text": text}
    path = write(tmp_path, "rows.jsonl", json.dumps(row, ensure_ascii=False))
    assert read_rows(path) == [row]


def test_a_csv_field_may_hold_line_breaks_and_be_long(tmp_path):
    long = "x" * 200_000
    path = write(tmp_path, "rows.csv", f'text,more\r\n"a\r\nb",{long}\r\n')
    assert read_rows(path) == [{"text": "a\r\nb", "more": long}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.jsonl", '{"text": "a"}\n\n{"text": \n', "line 3 is not JSON: Expecting value at"),
        ("rows.jsonl", '{"text": "a"} {"text": "b"}', "line 1 is not JSON: Extra data at"),
        ("rows.jsonl", '\n["a"]\n', "line 2 is no object"),
        ("rows.json", '[{"text": "a"},]', r"rows\.json is not JSON: .*at character 1[45]"),
        ("rows.json", '[{"text": "a"}, "b"]', "row 1 is no object"),
        ("rows.json", "[" * 100_000, "cannot be read as JSON"),
        ("rows.json", '[{"text": ' + "1" * 5000 + "}]", "cannot be read as JSON"),
        ("rows.json", "", "is not JSON"),
        ("rows.csv", 'text,more\na,b\n"c" d,e\n', "line 3 is not well-formed CSV"),
        ("rows.csv", 'text,more\na,b\n"c,d\n', "line 3 is not well-formed CSV"),
        ("rows.csv", "text,more\na,b\nc\n", "row 1 does not have as many fields"),
        ("rows.csv", "text,more\na,b,c\n", "row 0 does not have as many fields"),
        ("rows.csv", "text,text\na,b\n", "two columns 'text'"),
        ("rows.txt", b"a" * 20_000 + b"\n\xff", r"not UTF-8 text \(byte 20001\)"),
        ("rows.jsonl", lines(ROWS * 900).encode() + b"\xff", "not UTF-8 text"),
        ("rows.csv", b"text\n\xff\n", "not UTF-8 text"),
        ("rows.json", b'["\xff"]', "not UTF-8 text"),
        ("rows.parquet", "PAR1", "is not a Parquet file"),
        ("rows.tsv", "text\na\n", r"use one of \.jsonl, \.json, \.csv, \.txt, \.parquet"),
        ("rows.jsonl", "\n  \n", "holds no rows"),
        ("rows.json", "[]", "holds no rows"),
        ("rows.csv", "text\n", "holds no rows"),
        ("rows.csv", "", "holds no rows"),
        ("rows.txt", "\ufeff", "holds no rows"),
    ],
)
def test_faults_and_their_places(tmp_path, name, content, message):
    path = write(tmp_path, name, content)
    with pytest.raises(InputError, match=message) as caught:
        read_rows(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_no_such_file_and_a_folder(tmp_path):
    (tmp_path / "folder.txt").mkdir()
    for name in ("none.txt", "folder.txt"):
        with pytest.raises(InputError, match="no data file"):
            read_rows(tmp_path / name)


@pytest.mark.parametrize(
    ("row", "field", "text"),
    [
        ({"text": " a "}, None, " a "),
        ({"text": "a", "prompt": "b", "completion": "c", "messages": []}, None, "a"),
        ({"prompt": "Q: ", "completion": " A\n", "messages": []}, None, Pair("Q: ", " A\n")),
        ({"messages": [{"role": "user", "content": "x"}], "n": 1}, None, ...),
        ({"text": "a", "body": "b"}, "body", "b"),
        ({"prompt": "a", "completion": "b"}, "prompt", "a"),
    ],
)
def test_the_text_of_a_row(row, field, text):
    found = row_content(row, "here", Fields(field))
    assert found == (Chat(row["messages"]) if text is ... else text)


@pytest.mark.parametrize(
    ("row", "field", "message"),
    [
        ({"body": "a", "n": 1}, None, r"^here has neither .*it has body, n\).*samples\.field"),
        ({}, None, "it has no fields"),
        ({"prompt": "a"}, None, "neither text, nor prompt and completion"),
        ({"completion": "a"}, None, "neither text, nor prompt and completion"),
        ({"text": "a"}, "body", r"^here has no field 'body' \(it has text\)"),
        ({"text": 3}, None, "^here: field 'text' holds int, not text"),
        ({"text": None, "messages": []}, None, "holds NoneType"),
        ({"prompt": "a", "completion": ["b"]}, None, "'completion' holds list"),
        ({"messages": "hello"}, None, "^here: messages is no list"),
    ],
)
def test_a_row_without_text(row, field, message):
    with pytest.raises(InputError, match=message):
        row_content(row, "here", Fields(field))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.text(), json_values, max_size=4), min_size=1, max_size=5))
def test_rows_written_are_the_rows_read(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    write_jsonl(path, rows)
    assert read_rows(path) == rows


def test_what_json_or_utf8_lack_is_written_as_text(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"day": datetime.date(2026, 1, 2), "half": "\ud83d!", "é": "ü"}])
    assert read_rows(path) == [{"day": "2026-01-02", "half": "\ud83d!", "é": "ü"}]
    assert "é" in path.read_text(encoding="utf-8")
