"""Which tensor is the head of a model and which its embedding, and whether they are one."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from safetensors.numpy import save_file

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.ties import is_embedding, is_head
from recall_jax.errors import InputError

ROWS = np.arange(12, dtype=np.float32).reshape(4, 3)
TIED = {"tie_word_embeddings": True}


def make(folder: Path, config: dict[str, object], **tensors: np.ndarray) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    arrays = {"h.0.output.weight": ROWS, **tensors}
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(
    ("head", "embeddings"),
    [
        ("lm_head.weight", ["model.embed_tokens.weight"]),
        ("lm_head.weight", ["transformer.wte.weight"]),
        ("lm_head.weight", ["wte.weight"]),
        ("embed_out.weight", ["gpt_neox.embed_in.weight"]),
        ("output.weight", ["model.tok_embeddings.weight"]),
        ("transformer.output_layer.weight", ["transformer.embedding.word_embeddings.weight"]),
        ("cls.predictions.decoder.weight", ["bert.embeddings.word_embeddings.weight"]),
        ("lm_head.decoder.weight", ["roberta.embeddings.word_embeddings.weight"]),
        ("language_model.lm_head.weight", ["language_model.model.embed_tokens.weight"]),
        ("lm_head.weight", ["shared.weight", "encoder.embed_tokens.weight"]),
    ],
)
def test_the_ends_of_many_families(head: str, embeddings: list[str], tmp_path: Path) -> None:
    assert is_head(head) and not is_embedding(head)
    assert all(is_embedding(name) and not is_head(name) for name in embeddings)
    tensors = dict.fromkeys(embeddings, ROWS)
    same = open_checkpoint(make(tmp_path / "same", TIED, **tensors, **{head: ROWS.copy()}))
    assert head not in same.specs and embeddings[0] in same.specs
    assert (same.config, same.warnings) == (TIED, [])
    other = open_checkpoint(make(tmp_path / "other", TIED, **tensors, **{head: ROWS + 1}))
    assert other.config == {"tie_word_embeddings": False}
    assert_array_equal(other.read(head), ROWS + 1)
    (line,) = other.warnings
    assert head in line and any(name in line for name in embeddings)


def test_names_that_are_neither() -> None:
    for name in (
        "h.0.output.weight",
        "model.layers.0.attention.output.weight",
        "model.norm.weight",
        "transformer.wpe.weight",
        "lm_head.bias",
        "decoder.layers.0.fc1.weight",
        "lm_head.lora_A.weight",
    ):
        assert not is_head(name) and not is_embedding(name), name


def test_the_text_part_of_a_config_is_told_too(tmp_path: Path) -> None:
    config = {"text_config": {"tie_word_embeddings": True, "x": 1}, "vision_config": {"y": 2}}
    tensors = {"model.embed_tokens.weight": ROWS, "lm_head.weight": ROWS + 1}
    model = open_checkpoint(make(tmp_path / "model", config, **tensors))
    assert model.config == {
        "text_config": {"tie_word_embeddings": False, "x": 1},
        "vision_config": {"y": 2},
        "tie_word_embeddings": False,
    }


@pytest.mark.parametrize("other", [ROWS[:3], ROWS.astype(np.float64), ROWS.reshape(3, 4), -ROWS])
def test_what_is_not_the_same_to_the_bit_is_another_head(other, tmp_path: Path) -> None:
    """-ROWS has the one -0.0, and all others differ too."""
    tensors = {"model.embed_tokens.weight": ROWS, "lm_head.weight": np.ascontiguousarray(other)}
    model = open_checkpoint(make(tmp_path / "model", TIED, **tensors))
    assert model.config["tie_word_embeddings"] is False
    assert_array_equal(model.read("lm_head.weight"), other)


def test_nan_is_the_same_as_itself(tmp_path: Path) -> None:
    tensors = {"model.embed_tokens.weight": ROWS * np.nan, "lm_head.weight": ROWS * np.nan}
    model = open_checkpoint(make(tmp_path / "model", TIED, **tensors))
    assert "lm_head.weight" not in model.specs and model.warnings == []


def test_a_model_of_two_embeddings_is_not_untied(tmp_path: Path) -> None:
    tensors = {"shared.weight": ROWS, "encoder.embed_tokens.weight": ROWS + 1}
    model = open_checkpoint(make(tmp_path / "model", TIED, **tensors))
    with pytest.raises(InputError, match="which is the base's input embedding"):
        model.untie()


@pytest.mark.parametrize("model_type", ["t5", "umt5"])
def test_a_family_whose_tie_scales_the_head_s_input_is_not_untied(model_type, tmp_path) -> None:
    config = TIED | {"model_type": model_type}
    tensors = {"shared.weight": ROWS, "lm_head.weight": ROWS + 1}
    with pytest.raises(
        InputError, match=f"a {model_type} model cannot have a head .* scales what the"
    ):
        open_checkpoint(make(tmp_path / "model", config, **tensors))
    same = make(tmp_path / "same", config, **tensors | {"lm_head.weight": ROWS})
    with pytest.raises(InputError, match="scales what the head reads"):
        open_checkpoint(same).untie()


def test_an_untied_model_reads_its_head_in_rows(tmp_path: Path) -> None:
    model = open_checkpoint(make(tmp_path / "model", TIED, **{"wte.weight": ROWS}))
    model.untie()
    assert (
        model.specs["lm_head.weight"] == model.stored["lm_head.weight"] == model.specs["wte.weight"]
    )
    assert_array_equal(model.read("lm_head.weight"), ROWS)
    assert_array_equal(model.read_rows("lm_head.weight", 1, 3), ROWS[1:3])
    model.drop("lm_head.weight")
    with pytest.raises(InputError, match="separate output head"):
        model.untie()
