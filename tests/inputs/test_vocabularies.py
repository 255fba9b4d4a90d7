"""Tokenizers are held to each other by their files: the same ids, or a line on the first other."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from toys import make_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from recall_jax.errors import InputError
from recall_jax.inputs import vocabularies
from recall_jax.inputs.vocabularies import Difference, compare_vocabularies

BPE = {"a": 0, "b": 1, "c": 2, "ab": 3, "bc": 4}
MERGES = [("a", "b"), ("b", "c")]


def save(folder: Path, model, *, added=(), **special) -> Path:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(model), **special)
    fast.add_tokens(list(added))
    fast.save_pretrained(folder)
    return folder


def bpe(folder: Path, vocab=BPE, merges=MERGES, **options) -> Path:
    return save(folder, tokenizers.models.BPE(vocab, merges), **options)


def write(folder: Path, **files: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def between(one: Path, reader: Path) -> Difference | None:
    found = compare_vocabularies("reader", {"one": [one], "reader": [reader]})
    assert len(found) < 2
    return found[0] if found else None


# ----------------------------------------------------------------------------- what files are read


@pytest.mark.parametrize(
    "model",
    [
        tokenizers.models.BPE(BPE, MERGES),
        tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"),
        tokenizers.models.WordLevel({"<unk>": 0, "a": 2, "b": 1}, unk_token="<unk>"),
        tokenizers.models.Unigram([("<unk>", 0.0), ("a", -1.5), ("b", -2.0)], unk_id=0),
    ],
    ids=lambda model: type(model).__name__,
)
def test_the_ids_are_those_that_transformers_gives(model, tmp_path):
    folder = save(tmp_path / "one", model, added=["<x>", "<y>"], eos_token="<end>")
    expected = AutoTokenizer.from_pretrained(folder).get_vocab()
    assert vocabularies._read_vocabulary(folder).ids == expected


def test_older_files_give_the_ids_of_the_newer(tmp_path):
    new = bpe(tmp_path / "new", added=["<x>"])
    merges = "#version: 0.2\na b\nb c\n"
    added = {"<x>": 5}
    old = write(
        tmp_path / "old",
        vocab__json=json.dumps(BPE),
        merges__txt=merges,
        added_tokens__json=json.dumps(added),
    )
    assert between(old, new) is None
    (old / "merges.txt").write_text("#version: 0.2\nb c\na b\n")
    assert between(old, new) == Difference("one", "reader", splits=True)
    words = ["[PAD]", "[UNK]", "the", "##s"]
    wordpiece = tokenizers.models.WordPiece(
        {word: index for index, word in enumerate(words)}, unk_token="[UNK]"
    )
    bert = write(tmp_path / "bert", vocab__txt="\n".join(words) + "\n")
    assert between(bert, save(tmp_path / "fast", wordpiece)) is None


def test_files_that_are_the_same_are_not_parsed(tmp_path, monkeypatch):
    one = bpe(tmp_path / "one")
    other = Path(shutil.copytree(one, tmp_path / "other"))
    monkeypatch.setattr(vocabularies, "_read_vocabulary", lambda folder: 1 / 0)
    assert between(one, other) is None
    (other / "chat_template.jinja").write_text("{{ messages }}")
    assert between(one, other) is None


# -------------------------------------------------------------------------------- what is different


def test_a_token_under_two_ids_is_told_and_no_samples_pass(tmp_path):
    one = bpe(tmp_path / "one", BPE | {"a": 1, "b": 0})
    found = between(one, bpe(tmp_path / "reader"))
    assert found.moved == {"a": (1, 0), "b": (0, 1)}
    said = "the token 'a' has the id 1 in one and 0 in reader, the first of 2 with two ids"
    assert found.warnings() == [f"{said}: embeddings of different tokens are merged"]
    with pytest.raises(InputError, match=r"has the id 1 in one and 0 in .* --ignore-tokenizers"):
        found.check([])


def test_a_token_of_one_alone_matters_where_samples_use_it(tmp_path):
    found = between(bpe(tmp_path / "one"), bpe(tmp_path / "reader", added=["<x>", "<y>"]))
    assert found.unknown == {5: "<x>", 6: "<y>"} and not found.moved
    (line,) = found.warnings()
    assert line == "one does not know 2 tokens, first '<x>' (id 5), of reader"
    found.check([0, 1, 2, 3, 4])
    with pytest.raises(InputError, match=r"samples hold 1 token, first '<y>' \(id 6\), of reader"):
        found.check([0, 6])


def test_a_token_that_only_the_other_has_is_told(tmp_path):
    found = between(bpe(tmp_path / "one", added=["<x>"]), bpe(tmp_path / "reader"))
    (line,) = found.warnings()
    assert line == (
        "reader, whose tokenizer is kept, does not know 1 token, first '<x>' (id 5), of one"
    )
    found.check(range(9))


def test_a_token_in_anothers_place_is_told_as_one_of_each(tmp_path):
    one = bpe(tmp_path / "one", added=["<reserved>"])
    found = between(one, bpe(tmp_path / "reader", added=["<call>"]))
    assert (found.moved, found.unknown, found.more) == ({}, {5: "<call>"}, {"<reserved>": 5})
    assert len(found.warnings()) == 2
    with pytest.raises(InputError, match="<call>"):
        found.check([5])


@pytest.mark.parametrize("pair", [str, list])
def test_other_merges_of_the_same_tokens_are_told_however_they_are_written(pair, tmp_path):
    one = bpe(tmp_path / "one")
    content = json.loads((one / "tokenizer.json").read_text())
    reader = bpe(tmp_path / "reader", merges=MERGES[::-1])
    for order, expected in ((MERGES, False), (MERGES[::-1], True)):
        content["model"]["merges"] = [" ".join(m) if pair is str else list(m) for m in order]
        (one / "tokenizer.json").write_text(json.dumps(content, indent=3))
        assert (between(one, reader) is None) == expected
    found = between(bpe(tmp_path / "again"), reader)
    assert "by different merges or scores" in found.warnings()[0]
    found.check(range(9))


def test_added_tokens_beside_the_same_vocabulary_count(tmp_path):
    for name, decoder in (
        ("one", {"7": {"content": "<x>"}}),
        ("reader", {"8": {"content": "<x>"}}),
    ):
        folder = write(tmp_path / name, tokenizer__model="the same bytes")
        (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    found = between(tmp_path / "one", tmp_path / "reader")
    assert found.moved == {"<x>": (7, 8)}


# ----------------------------------------------------------------------- what cannot be compared


def test_other_kinds_of_files_are_the_same_or_not_compared(tmp_path):
    one, reader = (write(tmp_path / name, spm__model="pieces") for name in ("one", "reader"))
    assert between(one, reader) is None
    fast = bpe(tmp_path / "fast")
    (fast / "spm.model").write_text("pieces")
    assert between(fast, reader) is None  # in one of two forms
    (one / "spm.model").write_text("others")
    (line,) = between(one, reader).warnings()
    assert (
        "different files and were not compared: recall cannot read the tokens in spm.model" in line
    )
    between(one, reader).check([1])


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        "{}",
        '{"model": 3}',
        '{"model": {"vocab": {"a": "b"}}}',
        '{"model": {"vocab": [1]}}',
    ],
)
def test_a_damaged_file_is_told_and_harms_no_merge(content, tmp_path):
    one = write(tmp_path / "one", tokenizer__json=content)
    (line,) = between(one, bpe(tmp_path / "reader")).warnings()
    assert "were not compared" in line and "tokenizer.json" in line and "\n" not in line


def test_models_without_a_tokenizer_are_passed_over(tmp_path):
    folders = {"one": [write(tmp_path / "one")], "reader": [bpe(tmp_path / "reader")]}
    assert compare_vocabularies("reader", folders) == []
    assert compare_vocabularies("one", folders) == []
    assert compare_vocabularies("one", {**folders, "none": [tmp_path / "none"]}) == []


def test_the_tokenizer_of_an_adapter_is_the_models(tmp_path):
    base, adapter = bpe(tmp_path / "base"), bpe(tmp_path / "adapter", added=["<x>"])
    folders = {"one": [base], "reader": [adapter, base]}
    assert compare_vocabularies("reader", folders)[0].unknown == {5: "<x>"}
    folders = {"one": [adapter, base], "reader": [adapter, base]}
    assert compare_vocabularies("reader", folders) == []


def test_the_toys_tokenizer_is_read(tmp_path):
    make_tokenizer().save_pretrained(tmp_path / "toy")
    assert len(vocabularies._read_vocabulary(tmp_path / "toy").ids) == 97
