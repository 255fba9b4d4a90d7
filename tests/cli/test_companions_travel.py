"""What lies beside the newest model's weights is in the output of every command that writes one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import copy_model

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.journal import input_files
from recall_jax.jobs.verify import verify

BESIDE = {
    "spm.model": b"\0pieces",
    "preprocessor_config.json": b"{}",
    "modules.json": b'[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "1_Pooling/config.json": b'{"pooling_mode_mean_tokens": true}',
    "2_Dense/model.safetensors": b"dense",
    "modeling_own.py": b"raise SystemExit",
}
LEFT = {"optimizer.pt": b"x", ".secret": b"x", "trainer_state.json": b"{}"}


def add(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture
def newest(toys, tmp_path) -> Path:
    return add(copy_model(toys.llama[1], tmp_path / "newest"), BESIDE | LEFT)


def assert_whole(out: Path, newest: Path, told: str, *, own: str = "config.json") -> None:
    """All is there, is told, and is held to its checksum."""
    names = [*BESIDE, "tokenizer.json", "tokenizer_config.json", "generation_config.json", own]
    for name in names:
        assert (out / name).read_bytes() == (newest / name).read_bytes(), name
    assert not [name for name in LEFT if (out / name).exists()]
    warnings = [line for line in told.splitlines() if line.startswith("warning:")]
    assert any("modeling_own.py" in line and "was not run" in line for line in warnings)
    sealed = json.loads((out / "checksums.json").read_text())["files"]
    assert {*BESIDE} <= sealed.keys()
    assert verify(out).faults == ()


@pytest.mark.parametrize("to", ["huggingface", "orbax"])
def test_a_merge_takes_them_from_the_newest(to, recall, toys, newest, tmp_path):
    older = add(copy_model(toys.llama[0], tmp_path / "older"), {"spm.model": b"?", "a.json": b"{}"})
    recipe = {"merge_method": "average", "models": [{"model": str(older)}, {"model": str(newest)}]}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "out", "--to", to)
    assert done.status == 0
    assert_whole(tmp_path / "out", newest, done.err)
    assert not (tmp_path / "out" / "a.json").exists()
    report = json.loads((tmp_path / "out" / "recall_report.json").read_text())
    assert len(report["warnings"]) == 1
    assert "modeling_own.py" in (tmp_path / "out" / "README.md").read_text().replace("\\", "")


def test_conversions_take_them_there_and_back(recall, newest, tmp_path):
    for source, out, to in (("newest", "npz", "npz"), ("npz", "back", "huggingface")):
        done = recall("convert", tmp_path / source, tmp_path / out, "--to", to)
        assert done.status == 0
        assert_whole(tmp_path / out, newest, done.err)


def test_a_merge_of_trees_takes_them(recall, toys, newest, tmp_path):
    recall("convert", toys.llama[0], tmp_path / "older", "--to", "npz")
    recall("convert", newest, tmp_path / "tree", "--to", "npz")
    models = [{"model": str(tmp_path / name)} for name in ("older", "tree")]
    tree = {"embed": "embed/**", "layers": "layers/**", "axis": 0}
    recipe = {"merge_method": "average", "models": models, "tree": tree}
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "out")
    assert done.status == 0, done.err
    assert_whole(tmp_path / "out", newest, done.err)


def test_a_companion_that_changes_is_another_input(toys, newest):
    models = [open_checkpoint(toys.llama[0]), open_checkpoint(newest)]
    before = input_files(models, [])
    assert str(newest / "1_Pooling" / "config.json") in before
    (newest / "1_Pooling" / "config.json").write_text("{}")
    assert input_files(models, []) != before


def test_the_tokenizer_of_an_older_model_is_taken_and_told(recall, toys, tmp_path):
    newest = copy_model(toys.llama[1], tmp_path / "newest")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (newest / name).unlink()
    models = [{"model": toys.llama[0]}, {"model": str(newest)}]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "average", "models": models}))
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "out")
    assert done.status == 0
    assert done.err == f"warning: {newest} has no tokenizer: that of {toys.llama[0]} is taken\n"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == Path(toys.llama[0], name).read_bytes()


def test_our_own_output_merged_again_brings_nothing_of_its_first_merge(recall, toys, tmp_path):
    models = [{"model": model} for model in toys.llama]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "average", "models": models}))
    assert recall("merge", tmp_path / "recipe.yml", tmp_path / "first").status == 0
    assert recall("convert", tmp_path / "first", tmp_path / "again").status == 0
    assert not list((tmp_path / "again").glob("recall_*"))
    shutil.copyfile(toys.data, tmp_path / "first" / "typical.jsonl")
    assert recall("convert", tmp_path / "first", tmp_path / "third").status == 0
    assert not (tmp_path / "third" / "typical.jsonl").exists()


def test_a_model_of_sentence_transformers_is_one_still(recall, tmp_path):
    """Its embeddings are those of the average of both models' weights."""
    import sentence_transformers as library
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    modules = library.sentence_transformer.modules
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{c}" for c in "abcd")]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
    )
    torch.manual_seed(0)
    dense = modules.Dense(32, 16)
    folders = [tmp_path / "older", tmp_path / "newest"]
    for folder in folders:
        BertModel(config).save_pretrained(tmp_path / "bert")
        BertTokenizerFast(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path / "bert")
        parts = [modules.Transformer(str(tmp_path / "bert")), modules.Pooling(32), dense]
        library.SentenceTransformer(modules=parts, device="cpu").save(str(folder))
    models = [{"model": str(folder)} for folder in folders]
    (tmp_path / "recipe.yml").write_text(json.dumps({"merge_method": "average", "models": models}))
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "out")
    assert (done.status, done.err) == (0, "")

    def load(folder: Path):
        return library.SentenceTransformer(str(folder), device="cpu")

    expected, other = map(load, folders)
    with torch.no_grad():
        for one, two in zip(expected.parameters(), other.parameters(), strict=True):
            one.copy_((one + two) / 2)
    texts = ["abc def", "hgf", "a b c d e f g h abcd"]
    merged = load(tmp_path / "out").encode(texts)
    assert merged.shape == (3, 16)
    np.testing.assert_allclose(merged, expected.encode(texts), rtol=0, atol=1e-6)
