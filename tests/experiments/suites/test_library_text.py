"""Passages of Python's library: what they hold, the two splits, and where they come from."""

import ast
import hashlib
import platform
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.errors import InputError
from recall_jax.evaluation import library_text
from recall_jax.evaluation.generators import GENERATORS
from recall_jax.evaluation.library_text import DOMAINS, PASSAGE_BYTES, draw_passages, split_passages
from recall_jax.evaluation.rows import load_rows
from recall_jax.evaluation.task import find_task


@pytest.mark.parametrize("domain", DOMAINS)
def test_no_passage_to_be_tested_is_ever_trained_on(domain):
    held_out = load_rows(find_task(f"text_{domain}"), None).rows
    trained = draw_passages(domain, 512, 3)
    texts = [{row["text"] for row in rows} for rows in (held_out, trained)]
    assert list(map(len, texts)) == [128, 512]
    assert not texts[0] & texts[1]
    assert not texts[0] & {row["text"] for row in library_text._passages(domain, False)}
    documents = [{row["document"] for row in rows} for rows in (held_out, trained)]
    assert not documents[0] & documents[1]
    assert all(len(text.encode()) in PASSAGE_BYTES for text in texts[0] | texts[1])


def test_drawing_follows_its_seed():
    draw = GENERATORS["text"]
    assert draw("names", 20, 1) == draw("names", 20, 1) != draw("names", 20, 2)


def test_source_and_docstrings_are_told_apart():
    code, docs = (dict(library_text._documents(domain)) for domain in ("source", "docstrings"))
    assert code.keys() == docs.keys()
    assert "class TextWrapper:" in code["textwrap.py"]
    assert "Object for wrapping/filling text." in docs["textwrap.py"]
    assert "Object for wrapping/filling text." not in code["textwrap.py"]
    kept = {line.strip() for line in code["json/encoder.py"].splitlines()}
    whole = Path(library_text._library(), "json/encoder.py").read_text()
    module = ast.parse(whole)
    documented = [
        node for node in ast.walk(module)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node)
    ]  # fmt: skip
    assert len(documented) > 5
    for node in documented:
        assert ast.get_docstring(node) in docs["json/encoder.py"]
        first = ast.get_docstring(node).splitlines()[0]
        assert not any(first in line for line in kept)
    assert not any(name.startswith(("test/", "encodings/", "idlelib/")) for name in code)


def test_names_are_those_of_characters():
    blocks = dict(DOMAINS["names"]())
    assert blocks["U+0300"].splitlines()[0] == "COMBINING GRAVE ACCENT"
    assert blocks["U+4E00"] == ""
    assert "TANGUT IDEOGRAPH" not in "".join(blocks.values())


@given(st.text(st.characters(codec="utf-8"), max_size=2000))
def test_passages_are_pieces_of_a_text_in_order(text):
    place = 0
    for passage in split_passages(text):
        assert len(passage.encode()) in PASSAGE_BYTES
        found = text.find(passage, place)
        assert found >= place
        place = found + len(passage)


def test_lines_stay_whole_where_they_fit():
    lines = [f"line {number} " + "x" * 40 for number in range(60)]
    passages = list(split_passages("\n".join(lines)))
    assert "\n".join(passages).splitlines() == lines
    assert all(len(passage) > 180 for passage in passages[:-1])


def test_provenance_is_a_digest_of_each_document():
    found = library_text.provenance(["topics"])
    assert found["python"] == platform.python_version()
    documents = dict(DOMAINS["topics"]())
    assert found["documents"]["topics"] == {
        name: hashlib.sha256(text.encode()).hexdigest() for name, text in documents.items()
    }


def test_what_cannot_be_drawn_is_one_line():
    with pytest.raises(InputError, match="no domain 'poems' of text: choose from source, docs"):
        draw_passages("poems", 1, 0)
    with pytest.raises(InputError, match=r"Python 3\S+ has \d+ passages of topics, not 99999: ask"):
        draw_passages("topics", 99999, 0)
