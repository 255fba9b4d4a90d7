"""Files of rows read a piece at a time: the same rows, whatever the pieces, within the memory."""

import datetime
import gzip
import json
import tracemalloc
import warnings

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_data_files import json_values

from recall_jax.errors import InputError
from recall_jax.inputs import row_files
from recall_jax.inputs.data import draw_rows, read_rows
from recall_jax.inputs.row_files import count_rows
from recall_jax.inputs.samples import read_pool

ROWS = [{"text": f"row {number}, é", "n": str(number)} for number in range(200)]


def content_of(kind: str, rows) -> bytes:
    if kind == ".csv":
        return ("text,n\n" + "".join(f'"{r["text"]}",{r["n"]}\n' for r in rows)).encode()
    if kind == ".txt":
        return "".join(f"{row['text']}\n" for row in rows).encode()
    if kind == ".json":
        return json.dumps(rows).encode()
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def written(folder, name, rows=ROWS):
    path = folder / name
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=37)
        return path
    packed = path.suffix.lower() == ".gz"
    kind = (path.with_suffix("") if packed else path).suffix.lower()
    content = content_of(kind, rows)
    path.write_bytes(gzip.compress(content) if packed else content)
    return path


def peak(work) -> int:
    """Bytes of Python's memory that some work takes at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


KINDS = ["r.jsonl", "r.json", "r.csv", "r.txt", "r.parquet"]
PACKED = ["r.jsonl.gz", "r.JSON.GZ", "r.csv.gz", "r.txt.gz"]


@pytest.mark.parametrize("name", [*KINDS, *PACKED])
def test_a_draw_is_that_of_all_rows_in_memory(name, tmp_path):
    path = written(tmp_path, name)
    expected = ROWS if "txt" not in name else [{"text": row["text"]} for row in ROWS]
    assert read_rows(path) == expected and count_rows(path) == 200
    indices, rows = draw_rows(path, 30, 7)
    places = np.sort(np.random.default_rng(7).choice(200, 30, replace=False))
    np.testing.assert_array_equal(indices, places)
    assert rows == [expected[place] for place in places]
    indices, rows = draw_rows(path, 200, 7)
    assert indices.tolist() == [*range(200)] and rows == expected


@given(
    rows=st.lists(st.dictionaries(st.text(), json_values, max_size=3), min_size=1, max_size=6),
    piece=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    in_list=st.booleans(),
)
def test_json_in_pieces_is_json(tmp_path_factory, rows, piece, indent, in_list):
    path = tmp_path_factory.getbasetemp() / "pieces.json"
    separate = "\n".join(json.dumps(row, indent=indent, ensure_ascii=False) for row in rows)
    path.write_text(
        json.dumps(rows, indent=indent) if in_list else separate,
        encoding="utf-8",
        errors="surrogatepass",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(row_files, "_PIECE", piece)
        try:
            path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            with pytest.raises(InputError, match="not UTF-8 text"):
                read_rows(path)
            return
        assert read_rows(path) == rows


@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('[{"text": "a"} {"text": "b"}]', "Expecting ',' delimiter at character 15"),
        ('[{"text": "a"}, {"text" "b"}]', "Expecting ':' delimiter at character 24"),
        ('[{"text": "a"}', "Expecting ',' delimiter at character 14"),
        ('[{"text": "a', "Unterminated string starting at at character 10"),
        ('[{"text": "a"}] {}', "Extra data at character 16"),
        ('{"text": "a"}\n{"text": tru}', "Expecting value at character 23"),
        ('{"text": "\\x"}', "escape.* at character 1[01]"),
    ],
)
def test_a_fault_has_its_place_in_the_file(piece, content, message, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "_PIECE", piece)
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(InputError, match=rf"rows\.json is not JSON: .*{message}$"):
        read_rows(path)


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_a_row_without_end_is_refused_before_it_is_in_memory(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(row_files, "LARGEST_ROW", 1 << 16)
    monkeypatch.setattr(row_files, "_PIECE", 1 << 12)
    start = {"json": b'[{"text": "', "csv": b'text\n"'}.get(kind, b'{"text": "')
    path = tmp_path / f"bomb.{kind}.gz"
    path.write_bytes(gzip.compress(start + b"a" * (1 << 24)))

    def read():
        with pytest.raises(InputError, match=r"bomb.*(over 65,536 characters|field larger than)"):
            read_rows(path)

    assert peak(read) < 1 << 20


@pytest.mark.parametrize("name", KINDS)
def test_no_more_than_the_draw_is_in_memory(name, tmp_path):
    path = written(tmp_path, name, [{"text": "x" * 2000, "n": str(i)} for i in range(4000)])
    draw_rows(path, 2, 0)  # what is imported for it does not count
    assert peak(lambda: draw_rows(path, 20, 0)) < 4_000_000  # of 8 MB


@pytest.mark.parametrize("name", [*KINDS, "r.jsonl.gz"])
def test_rows_beyond_the_memory_are_refused(name, tmp_path):
    path = written(tmp_path, name)
    assert len(read_rows(path, memory=1 << 20)) == 200
    with pytest.raises(InputError, match=r"the rows of .*more than the 0 MiB.*--memory"):
        read_rows(path, memory=9000)
    assert len(draw_rows(path, 10, 0, memory=9000)[1]) == 10
    with pytest.raises(
        InputError, match=r"allow more \(--memory\), or draw fewer rows with samples.pool"
    ):
        draw_rows(path, 100, 0, memory=9000)


@pytest.mark.parametrize("name", PACKED)
def test_damaged_gz(name, tmp_path):
    path = written(tmp_path, name)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = whole[:middle] + bytes([whole[middle] ^ 0xFF]) + whole[middle + 1 :]
    for content in (b"", whole[:-20], b"text", damaged, whole + b"more"):
        path.write_bytes(content)
        with pytest.raises(InputError) as caught:
            read_rows(path)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_kinds_that_are_not_read(tmp_path):
    for name in ("r.parquet.gz", "r.gz", "r.jsonl.bz2", "r.tsv", "r"):
        (tmp_path / name).write_bytes(b"x")
        with pytest.raises(InputError, match=r"use one of .*\.parquet; all but the last may end"):
            read_rows(tmp_path / name)


NANOSECONDS = 1_234_567_890_123_456_789
EXOTIC = {
    "when": pyarrow.array([NANOSECONDS] * 3, pyarrow.timestamp("ns")),
    "took": pyarrow.array([NANOSECONDS] * 3, pyarrow.duration("ns")),
    "clock": pyarrow.array([12_345] * 3, pyarrow.time64("ns")),
    "far": pyarrow.array([2**45] * 3, pyarrow.timestamp("s")),
    "list": pyarrow.array([[NANOSECONDS, None]] * 3, pyarrow.list_(pyarrow.timestamp("ns"))),
    "inside": pyarrow.array(
        [{"at": NANOSECONDS}] * 3, pyarrow.struct([("at", pyarrow.timestamp("ns"))])
    ),
    "bytes": pyarrow.array([b"\xff"] * 3),
    "day": pyarrow.array([datetime.date(2026, 1, 2)] * 3),
}


@pytest.fixture
def exotic(tmp_path):
    path = tmp_path / "rows.parquet"
    texts = pyarrow.array(["zero", "one", "two"])
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, **EXOTIC}), path)
    return path


class Words:
    def encode(self, text, max_tokens, special_tokens):
        return [len(word) for word in text.split()]


def test_columns_that_are_not_asked_for_are_not_converted(exotic, monkeypatch):
    converted = []
    cell = row_files._cell
    monkeypatch.setattr(
        row_files, "_cell", lambda scalar: converted.append(scalar.type) or cell(scalar)
    )
    samples = read_pool(exotic, Words(), max_tokens=9, pool=2, seed=0)
    assert {str(kind) for kind in converted} == {"string"}
    assert samples.rows == ({"text": "one"}, {"text": "two"})
    with warnings.catch_warnings(action="error"):
        rows = samples.take([1]).typical_rows()
    assert rows == [{**read_rows(exotic)[2], "row": 2}] and rows[0].keys() == {
        "text",
        "row",
        *EXOTIC,
    }


def test_what_python_has_no_value_for_is_text(exotic):
    row = read_rows(exotic)[0]
    assert row["text"] == "zero" and row["bytes"] == b"\xff"
    assert row["day"] == datetime.date(2026, 1, 2)
    assert row["when"] == "2009-02-13 23:31:30.123456789"
    assert row["list"] == ["2009-02-13 23:31:30.123456789", None]
    assert row["inside"] == {"at": "2009-02-13 23:31:30.123456789"}
    for name in ("took", "clock", "far"):
        assert isinstance(row[name], str), row[name]
    assert "00:00:00.000012345" in row["clock"]


def test_two_columns_of_one_name_in_parquet(tmp_path):
    table = pyarrow.Table.from_arrays(
        [pyarrow.array(["a"]), pyarrow.array(["b"])], ["text", "text"]
    )
    pyarrow.parquet.write_table(table, tmp_path / "rows.parquet")
    with pytest.raises(InputError, match="two columns 'text'"):
        read_rows(tmp_path / "rows.parquet")


def test_damaged_parquet(exotic):
    whole = exotic.read_bytes()
    for place in range(4, len(whole), 97):
        exotic.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            read_rows(exotic)
        except InputError as error:
            assert "\n" not in str(error) and "rows.parquet" in str(error)
