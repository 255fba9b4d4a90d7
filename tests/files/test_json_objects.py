"""JSON files as they have always been written: any reader's JSON, byte for byte the same."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.files.json_objects import json_text, read_json_object, write_json_object

RECORD = {"name": "é", "values": [0.1, 1e-300, 3], "none": None}
objects = st.dictionaries(
    st.text(),
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
        max_leaves=5,
    ),
)  # fmt: skip


def test_the_bytes_of_a_record_and_of_a_config(tmp_path):
    path = tmp_path / "x.json"
    write_json_object(path, RECORD)
    written = (
        b'{\n "name": "\\u00e9",\n "values": [\n  0.1,\n  1e-300,\n  3\n ],\n "none": null\n}\n'
    )
    assert path.read_bytes() == written
    write_json_object(path, RECORD, indent=2, ensure_ascii=False)
    assert path.read_text() == json.dumps(RECORD, indent=2, ensure_ascii=False) + "\n"


@given(objects, st.booleans())
def test_whatever_is_written_is_read_again(tmp_path_factory, value, ensure_ascii):
    path = tmp_path_factory.mktemp("json") / "x.json"
    write_json_object(path, value, ensure_ascii=ensure_ascii)
    assert read_json_object(path) == value


def test_half_a_surrogate_pair_is_written_as_an_escape(tmp_path):
    path = tmp_path / "x.json"
    write_json_object(path, {"half": "\ud83d"}, ensure_ascii=False)
    assert path.read_text() == '{\n "half": "\\ud83d"\n}\n'
    assert read_json_object(path) == {"half": "\ud83d"}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused_unless_allowed(value, tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json_object(tmp_path / "x.json", {"a": value})
    assert not (tmp_path / "x.json").exists()
    assert json.loads(json_text({"a": [value]}, allow_nan=True))["a"][0] == pytest.approx(
        value, nan_ok=True
    )
