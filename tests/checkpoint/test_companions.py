"""Config, tokenizer and chat template go with the weights; code and weights do not."""

import json
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from recall_jax.checkpoint.companions import copy_companions
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
}
LEFT = {
    "model.safetensors": "weights",
    "modeling_llama.py": "import os",
    "README.md": "theirs",
    "recall_report.json": "{}",
    "optimizer.pt": "x",
    "additional_chat_templates/code.py": "import os",
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
    copy_companions(fill(tmp_path / "source", COPIED | LEFT), target)
    assert files(target) == COPIED


def test_links_are_copied_as_what_they_point_to(tmp_path, target):
    source = tmp_path / "source"
    source.mkdir()
    for name in fill(tmp_path / "blobs", {"config.json": "{}", "tokenizer.json": "{ }"}).iterdir():
        (source / name.name).symlink_to(name)
    copy_companions(source, target)
    assert files(target) == {"config.json": "{}", "tokenizer.json": "{ }"}
    assert not any(path.is_symlink() for path in target.iterdir())


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


def test_pipes_and_folders_of_the_same_names_are_left(tmp_path, target):
    source = fill(tmp_path / "source", {"config.json": "{}"})
    os.mkfifo(source / "tokenizer.json")
    (source / "merges.txt").mkdir()
    copy_companions(source, target)
    assert files(target) == {"config.json": "{}"}


def test_a_target_that_cannot_be_written_is_the_users_error(tmp_path):
    source = fill(tmp_path / "source", {"config.json": "{}"})
    with pytest.raises(InputError, match=r"cannot copy .*config\.json"):
        copy_companions(source, tmp_path / "none")
