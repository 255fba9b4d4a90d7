"""What lies beside the weights goes with them; weights, training state and what is ours do not."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from recall_jax.checkpoint.companions import companions, copy_companions
from recall_jax.errors import InputError

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
COPIED = {
    "config.json": '{"model_type": "llama"}',
    "generation_config.json": "{}",
    "tokenizer.json": "{ }",
    "tokenizer_config.json": "{}",
    "special_tokens_map.json": "{}",
    "added_tokens.json": "{}",
    "vocab.json": "{}",
    "merges.txt": "a b",
    "tokenizer.model": "\0binary",
    "chat_template.jinja": "{{ messages }}",
    "additional_chat_templates/tool.jinja": "{{ tools }}",
    # of other families, and of libraries
    "spm.model": "\0",
    "source.spm": "\0",
    "target.spm": "\0",
    "qwen.tiktoken": "IQ== 0",
    "preprocessor_config.json": "{}",
    "modules.json": '[{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]',
    "sentence_bert_config.json": "{}",
    "1_Pooling/config.json": "{}",
    "LICENSE": "as it was",
    "notices/of/others.txt": "and theirs",
}
LEFT = {
    "model.safetensors": "weights",
    "model.safetensors.index.json": "{}",
    "pytorch_model.bin": "weights",
    "tf_model.h5": "weights",
    "flax_model.msgpack": "weights",
    "Model-Q4.GGUF": "weights",
    "optimizer.pt": "x",
    "optimizer.json": "x",
    "scheduler.pt": "x",
    "rng_state_0.pth": "x",
    "training_args.bin": "x",
    "vocab.pkl": "x",
    "trainer_state.json": "{}",
    "all_results.json": "{}",
    "train.log": "x",
    "runs/now/events.out.tfevents.1": "x",
    "README.md": "theirs",
    "recall_report.json": "{}",
    "recall_recipe.yml": "{}",
    "checksums.json": "{}",
    "typical.jsonl": "{}",
    ".gitattributes": "x",
    ".git/config": "x",
    "onnx/model.onnx": "weights",
    "onnx/config.json": "of another model",
    "checkpoint-500/model.safetensors": "weights",
    "checkpoint-500/tokenizer.json": "of another model",
    "adapters/french/adapter_config.json": "of an adapter",
    "tree/d/0/data": "weights",
    "state/manifest.ocdbt": "weights",
}


def fill(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def target(tmp_path):
    (tmp_path / "target").mkdir()
    return tmp_path / "target"


def test_what_makes_a_model_is_copied_and_nothing_else(tmp_path, target):
    assert copy_companions(fill(tmp_path / "source", COPIED | LEFT), target) == []
    assert files(target) == COPIED


# --------------------------------------------------------------------------- links and large files


def test_links_are_left_whatever_they_point_to(tmp_path, target):
    fill(tmp_path, {"secret/config.json": '{"a": 1}', "secret/vocab.txt": "x"})
    source = fill(tmp_path / "source", {"tokenizer.json": "{ }"})
    for name in ("config.json", "vocab.txt"):
        (source / name).symlink_to(tmp_path / "secret" / name)
    (source / "1_Pooling").symlink_to(tmp_path / "secret")
    (source / "round.txt").symlink_to("round.txt")
    (source / "model.safetensors").symlink_to(tmp_path / "secret" / "vocab.txt")
    (line,) = copy_companions(source, target)
    assert line == f"links in {source} are not copied: 1_Pooling, round.txt, vocab.txt"
    # the config is read, and written as what it says
    assert files(target) == {"tokenizer.json": "{ }", "config.json": '{\n  "a": 1\n}\n'}
    assert not any(path.is_symlink() for path in target.iterdir())


def test_links_of_the_hubs_cache_are_copied_as_what_they_point_to(tmp_path, target):
    root = fill(tmp_path / "models--org--name", {"blobs/1": "{}", "blobs/2": "{ }"})
    fill(tmp_path, {"secret": "x"})
    source = root / "snapshots" / "0123"
    (source / "1_Pooling").mkdir(parents=True)
    (source / "config.json").symlink_to("../../blobs/1")
    (source / "1_Pooling" / "config.json").symlink_to("../../../blobs/2")
    (root / "blobs" / "3").symlink_to(tmp_path / "secret")
    (source / "tokenizer.json").symlink_to("../../blobs/3")
    (tmp_path / "linked").symlink_to(source)
    (line,) = copy_companions(tmp_path / "linked", target)
    assert "links in" in line and line.endswith(": tokenizer.json")
    assert files(target) == {"config.json": "{}", "1_Pooling/config.json": "{ }"}
    assert not any(path.is_symlink() for path in target.rglob("*"))


def test_a_file_too_large_for_a_companion_is_left_and_named(tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}", "less.txt": "", "rows.jsonl": ""})
    os.truncate(source / "less.txt", (64 << 20) - 1)
    os.truncate(source / "rows.jsonl", 64 << 20)
    (line,) = copy_companions(source, target)
    assert line == f"files of {source} of 64 MiB and more are not copied: rows.jsonl"
    assert sorted(path.name for path in target.iterdir()) == ["config.json", "less.txt"]


def test_pipes_and_folders_of_the_same_names_are_left(tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}"})
    os.mkfifo(source / "tokenizer.json")
    (source / "merges.txt").mkdir()
    assert copy_companions(source, target) == []
    assert files(target) == {"config.json": "{}"}


# ------------------------------------------------------------------------------ code and modules


def test_code_is_copied_named_and_not_run(tmp_path, target):
    code = {"modeling_x.py": "raise SystemExit", "parts/rope.py": "raise SystemExit"}
    source = fill(tmp_path / "source", {"config.json": "{}"} | code)
    (line,) = copy_companions(source, target)
    assert "modeling_x.py, parts/rope.py" in line and "was not run" in line
    assert files(target) == {"config.json": "{}"} | code


def test_weights_of_modules_go_along_and_are_named_where_they_are_of_one_model_alone(
    tmp_path, target
):
    model = {
        "config.json": "{}",
        "modules.json": '[{"path": ""}, {"path": "2_Dense"}]',
        "2_Dense/model.safetensors": "dense",
        "3_Dense/model.safetensors": "of no module",
    }
    newest = fill(tmp_path / "newest", model)
    same = fill(tmp_path / "same", model)
    plain = fill(tmp_path / "plain", {"config.json": "{}"})
    other = fill(tmp_path / "other", model | {"2_Dense/model.safetensors": "others"})
    assert copy_companions(newest, target) == []
    assert files(target).keys() == {"config.json", "modules.json", "2_Dense/model.safetensors"}
    assert companions(newest, older=[same, plain]).warnings == ()
    (line,) = companions(newest, older=[same, other]).warnings
    assert line == (
        f"weights of {newest} that are not merged are copied: 2_Dense/model.safetensors"
    )


def test_pickled_weights_of_a_module_are_left_and_named(tmp_path, target):
    model = {"modules.json": '[{"path": "2_Dense"}]', "2_Dense/pytorch_model.bin": "x"}
    (line,) = copy_companions(fill(tmp_path / "source", {"config.json": "{}"} | model), target)
    assert line.endswith("save them as safetensors: 2_Dense/pytorch_model.bin")
    assert files(target).keys() == {"config.json", "modules.json"}


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"path": 1}', "null", '[{"path": ["a"]}]', "[" * 9999]
)
def test_modules_that_cannot_be_read_are_copied_as_they_are(content, tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}", "modules.json": content})
    assert copy_companions(source, target) == []
    assert files(target)["modules.json"] == content


# -------------------------------------------------------------------------------------- tokenizers


def test_the_tokenizer_of_an_adapter_stands_in_for_all_of_the_models(tmp_path, target):
    adapter = {"tokenizer.json": "new", "chat_template.jinja": "new", "adapter_config.json": "{}"}
    folder = fill(tmp_path / "adapter", adapter)
    source = fill(tmp_path / "source", COPIED)
    assert copy_companions(source, target, tokenizers=[folder, source]) == []
    found = files(target)
    assert (found["tokenizer.json"], found["chat_template.jinja"]) == ("new", "new")
    assert not {"vocab.json", "spm.model", "additional_chat_templates/tool.jinja"} & found.keys()
    assert {"1_Pooling/config.json", "preprocessor_config.json"} <= found.keys()
    assert "adapter_config.json" not in found


def test_of_what_an_adapter_has_beside_its_tokenizer_nothing_is_taken_or_told(tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}", "vocab.txt": "old"})
    folder = fill(tmp_path / "adapter", {"vocab.txt": "new", "train.py": "1", "rows/a.txt": "1"})
    (folder / "base").symlink_to(source)
    (source / "merges.txt").symlink_to(folder / "vocab.txt")
    assert copy_companions(source, target, tokenizers=[folder, source]) == []
    assert files(target) == {"config.json": "{}", "vocab.txt": "new"}
    (folder / "merges.txt").symlink_to(source / "vocab.txt")
    (line,) = companions(source, [folder, source]).warnings
    assert line == f"links in {folder} are not copied: merges.txt"


def test_folders_within_folders_end_somewhere(tmp_path, target):
    deep = "/".join("a" * 100)
    source = fill(tmp_path / "source", {"config.json": "{}", f"{deep}/b.txt": "deep"})
    assert copy_companions(source, target) == []
    assert files(target)[f"{deep}/b.txt"] == "deep"
    (source / deep / "a").mkdir()
    with pytest.raises(InputError, match="has folders 100 deep"):
        companions(source)


@pytest.mark.parametrize("vocabulary", ["tokenizer.json", "spm.model", "vocab.txt", "source.spm"])
def test_where_the_newest_has_no_tokenizer_an_older_models_is_taken(vocabulary, tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}", "tokenizer_config.json": "{}"})
    older = fill(tmp_path / "older", {"config.json": "no", vocabulary: "v", "merges.txt": "m"})
    oldest = fill(tmp_path / "oldest", {vocabulary: "no"})
    none = fill(tmp_path / "none", {"config.json": "no"})
    (line,) = copy_companions(source, target, older=[none, older, oldest])
    assert line == f"{source} has no tokenizer: that of {older} is taken"
    assert files(target) == {"config.json": "{}", vocabulary: "v", "merges.txt": "m"}


# ----------------------------------------------------------------------------------------- configs


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"a": 1, "dtype": "float32"}, {"a": 1, "dtype": "bfloat16"}),
        ({"torch_dtype": "float32", "a": 1}, {"torch_dtype": "bfloat16", "a": 1}),
        ({"a": "é"}, {"a": "é", "dtype": "bfloat16"}),
        (
            {"dtype": "float32", "torch_dtype": "float32"},
            {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        ),
    ],
)
def test_the_config_names_the_output_dtype(config, expected, tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": json.dumps(config)})
    copy_companions(source, target, dtype=BFLOAT16)
    assert list(json.loads((target / "config.json").read_text("utf-8")).items()) == list(
        expected.items()
    )


@pytest.mark.parametrize("dtype", [None, BFLOAT16])
@pytest.mark.parametrize("content", [{}, {"config.json": "[]"}, {"config.json": "{"}])
def test_a_missing_or_malformed_config_is_the_users_error(content, dtype, tmp_path, target):
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match=r"config\.json"):
        copy_companions(fill(tmp_path / "source", content), target, dtype=dtype)


def test_a_target_that_cannot_be_written_is_the_users_error(tmp_path):
    source = fill(tmp_path / "source", {"config.json": "{}"})
    target = fill(tmp_path, {"file": ""}) / "file"
    with pytest.raises(InputError, match=r"cannot copy .*config\.json"):
        copy_companions(source, target)
