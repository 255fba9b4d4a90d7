"""Results kept as they come are there again, however the work ended."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import UnfinishedError
from recall_jax.files.results import Results, resume_results

values = st.recursive(
    st.none() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@given(st.dictionaries(st.text(), values, max_size=4), st.data())
def test_whatever_a_kill_leaves_whole_results_are_taken_up(tmp_path_factory, kept, data):
    path = tmp_path_factory.mktemp("results") / "journal.jsonl"
    results = Results(path, {"of": [1]})
    for name, value in kept.items():
        results.keep(name, value)
    assert results.values == kept
    content = path.read_bytes() if kept else b""
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    resumed = resume_results(path, {"of": [1]}, "work")
    whole = max(content[:cut].count(b"\n") - 1, 0)
    assert list(resumed.values.items()) == list(kept.items())[:whole]
    for name, value in kept.items():
        if name not in resumed.values:
            resumed.keep(name, value)
    assert path.read_bytes() == content
    path.unlink()


def test_another_work_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    Results(path, {"recipe": 1}).keep("a", 0.5)
    with pytest.raises(UnfinishedError, match="ablation had other recipe: go back"):
        resume_results(path, {"recipe": 2}, "ablation")
    assert len(path.read_text().splitlines()) == 2


def test_a_value_is_the_same_when_kept_and_when_resumed(tmp_path):
    results = Results(tmp_path / "journal.jsonl", {})
    results.keep("a", (1, {"b": (2.5,)}))
    again = resume_results(results.path, {}, "work")
    assert results.values == again.values == {"a": [1, {"b": [2.5]}]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        results.keep("b", float("nan"))
    assert json.loads(results.path.read_text().splitlines()[-1])["name"] == "a"
