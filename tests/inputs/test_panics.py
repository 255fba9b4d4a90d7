"""Tokenizers that make their library panic: one line, and no word of the library's."""

import json
import os
import threading

import pytest

from recall_jax.errors import InputError
from recall_jax.inputs.panics import silenced_panics
from recall_jax.inputs.tokens import load_tokenizer

VOCABULARY = {character: index for index, character in enumerate(["<pad>", "<eos>", *" abcdefgh"])}


def template(name):
    """Put around a text what the vocabulary may lack."""
    return {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": name, "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    }


def pieces(merges, **options):
    return {"type": "BPE", "vocab": VOCABULARY, "merges": merges, **options}


WORDS = {"type": "WordLevel", "vocab": VOCABULARY, "unk_token": "<pad>"}
PANICS = {
    "a normaliser's map that is none": {
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAA("}
    },
    "a normaliser without its map": {"normalizer": {"type": "Precompiled"}},
    "a template of a token that is not there": {"post_processor": template("<none>")},
    "a decoder that strips more than there is": {
        "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}
    },
    "a merge shorter than its prefix": {
        "model": pieces([["a", "b"]], continuing_subword_prefix="a longer prefix")
    },
}
REFUSED = {
    "a merge of what is not there": {"model": pieces([["a", "zz"]])},
    "an id beyond all": {"model": {**WORDS, "vocab": VOCABULARY | {"a": 2**40}}},
    "an id below zero": {"model": {**WORDS, "vocab": VOCABULARY | {"a": -1}}},
    "no word for what is unknown": {"model": {**WORDS, "unk_token": "<none>"}},
    "an unknown piece beyond the vocabulary": {
        "model": {"type": "Unigram", "unk_id": 9, "vocab": [["a", 0.0]]}
    },
    "a bad expression": {
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"Regex": "("},
            "behavior": "Isolated",
            "invert": False,
        }
    },
    "no model": {"model": None},
}


def write(folder, part):
    whole = {"version": "1.0", "added_tokens": [], "model": WORDS, **part}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


@pytest.mark.parametrize("kind", ["llama", "a kind that transformers alone reads"])
@pytest.mark.parametrize("case", PANICS | REFUSED)
def test_a_tokenizer_that_is_none_is_one_line(case, kind, tmp_path, capfd):
    write(tmp_path, (PANICS | REFUSED)[case])
    with pytest.raises(InputError) as caught:
        tokenizer = load_tokenizer([tmp_path], kind)
        tokenizer.decode(tokenizer.encode("a b zz ab", 99, True))
        tokenizer.decode([*VOCABULARY.values(), 2**31])
    assert str(tmp_path) in str(caught.value)
    assert ("Panic" in str(caught.value)) == (case in PANICS)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 300 + len(str(tmp_path))
    assert capfd.readouterr() == ("", "")


def test_options_that_the_library_does_not_know_are_not_printed(tmp_path, capfd):
    write(tmp_path, {})
    token = {"__type": "AddedToken", "content": "<pad>", "a\u202eb": 1}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    load_tokenizer([tmp_path], "a kind that transformers alone reads")
    assert capfd.readouterr() == ("", "")


def test_all_else_that_is_printed_is_heard(capfd):
    with silenced_panics():
        os.write(2, b"of this thread\n")
        other = threading.Thread(target=os.write, args=(2, b"of another\n"))
        other.start()
        other.join()
    with pytest.raises(ValueError), silenced_panics():
        os.write(2, b"of an exception\n")
        raise ValueError
    with pytest.raises(BaseException, match="panic"), silenced_panics():
        os.write(2, b"thread panicked\n")
        raise BaseException("panic")
    os.write(2, b"end\n")
    assert capfd.readouterr().err == "of this thread\nof another\nof an exception\nend\n"
