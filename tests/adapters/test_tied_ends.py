"""Adapters on the embedding or the head of a model that ties them: the model that was trained.

peft changes one use of the weight while it trains, and both when it merges; so what is folded is
held to the logits of the model beside whose base the adapter stands.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from peft_models import (
    adapted,
    config,
    load,
    logits,
    recipe,
    save_adapter,
    save_base,
    tensors,
)
from safetensors.numpy import save_file
from toys import copy_model

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. . LoRA tensor.s. have invalid shape"),
]

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"
BOTH = ["embed_tokens", "lm_head"]
LINEAR = ["q_proj", "v_proj"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Tied, in float32."""
    return save_base(tmp_path_factory.mktemp("tied") / "base", tied=True)


def rows(**indices: list[int]) -> dict[str, object]:
    return {"target_modules": LINEAR, "trainable_token_indices": indices}


APART = {
    "embedding": {"target_modules": ["embed_tokens"]},
    "head": {"target_modules": ["lm_head"]},
    "both": {"target_modules": BOTH},
    "both, with dora": {"target_modules": BOTH, "use_dora": True},
    "head, with rslora": {"target_modules": ["lm_head", *LINEAR], "use_rslora": True},
    "embedding saved": {"target_modules": LINEAR, "modules_to_save": ["embed_tokens"]},
    "head saved": {"target_modules": LINEAR, "modules_to_save": ["lm_head"]},
    "both saved": {"target_modules": LINEAR, "modules_to_save": BOTH},
    "embedding, head saved": {"target_modules": ["embed_tokens"], "modules_to_save": ["lm_head"]},
    "head, embedding saved": {"target_modules": ["lm_head"], "modules_to_save": ["embed_tokens"]},
    "rows of the head": rows(lm_head=[2, 3]),
    "rows of each": rows(lm_head=[2, 3], embed_tokens=[7, 3]),
}
TOGETHER = {
    "layers alone": {"target_modules": LINEAR},
    "embedding": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "head": {"target_modules": ["lm_head"], "ensure_weight_tying": True},
    "both": {"target_modules": BOTH, "ensure_weight_tying": True},
    "embedding saved": {
        "target_modules": LINEAR,
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rows": rows(embed_tokens=[7, 3]),
    "the same rows of each": rows(lm_head=[7, 3], embed_tokens=[7, 3]),
}
DORA = {"target_modules": BOTH, "use_dora": True, "ensure_weight_tying": True}


def assert_as_trained(base: str, adapter: str, out: Path, tied: bool, tokens: int | None) -> None:
    trained = adapted(base, adapter, tokens)
    assert_allclose(logits(load(out)), logits(trained), rtol=0, atol=1e-5)
    assert config(out)["tie_word_embeddings"] is tied
    assert (HEAD in tensors(out)) is not tied
    assert config(out)["vocab_size"] == len(tensors(out)[EMBED])


@pytest.mark.parametrize("tokens", [None, 101], ids=["", "resized"])
@pytest.mark.parametrize("options", APART.values(), ids=APART.keys())
def test_one_use_that_changes_parts_from_the_other(base, options, tokens, tmp_path, run) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", vocab_size=tokens, **options)
    out = run("convert", f"{base}+{adapter}", "out")
    assert_as_trained(base, adapter, out, tied=False, tokens=tokens)


@pytest.mark.parametrize("tokens", [None, 101], ids=["", "resized"])
@pytest.mark.parametrize("options", TOGETHER.values(), ids=TOGETHER.keys())
def test_uses_that_change_together_stay_tied(base, options, tokens, tmp_path, run) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", vocab_size=tokens, **options)
    out = run("convert", f"{base}+{adapter}", "out")
    assert_as_trained(base, adapter, out, tied=True, tokens=tokens)


def test_dora_parts_them_even_where_they_are_to_be_tied(base, tmp_path, run) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **DORA)
    out = run("convert", f"{base}+{adapter}", "out")
    assert_as_trained(base, adapter, out, tied=False, tokens=None)


def test_a_second_adapter_finds_the_head_that_the_first_has_parted(base, tmp_path, run) -> None:
    first = save_adapter(base, tmp_path / "first", target_modules=["lm_head"])
    parted = run("convert", f"{base}+{first}", "parted")
    second = save_adapter(str(parted), tmp_path / "second", target_modules=BOTH)
    out = run("convert", f"{base}+{first}+{second}", "out")
    assert_allclose(logits(load(out)), logits(adapted(str(parted), second)), rtol=0, atol=1e-5)
    reverse = run("convert", f"{base}+{first}", "--to", "orbax", "tree")
    assert_array_equal(tensors(run("convert", reverse, "back"))[HEAD], tensors(parted)[HEAD])


def test_a_head_of_a_bfloat16_base_begins_as_its_embedding(tmp_path, run) -> None:
    base = save_base(tmp_path / "half", tied=True, dtype=torch.bfloat16)
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=["embed_tokens"])
    out = tensors(run("convert", f"{base}+{adapter}", "out"))
    assert_array_equal(out[HEAD], tensors(base)[EMBED])
    assert out[HEAD].dtype.name == out[EMBED].dtype.name == "bfloat16"
    assert np.any(out[EMBED] != out[HEAD])


@pytest.mark.parametrize("change", [0, 0.5], ids=["tied", "apart"])
def test_a_base_that_stores_both_ends(change, base, tmp_path, run) -> None:
    stored = copy_model(base, tmp_path / "stored")
    arrays = tensors(stored)
    arrays[HEAD] = arrays[EMBED] + np.float32(change)
    save_file(arrays, stored / "model.safetensors", {"format": "pt"})
    adapter = save_adapter(str(stored), tmp_path / "adapter", target_modules=["lm_head", *LINEAR])
    out = run("convert", f"{stored}+{adapter}", "out")
    assert_as_trained(str(stored), adapter, out, tied=False, tokens=None)


# ------------------------------------------------------------------------------ merged with tied


def test_a_tied_model_is_merged_once_its_head_is_written_apart(base, tmp_path, recall, run) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", target_modules=BOTH)
    refused = recall("merge", recipe("average", base, f"{base}+{adapter}"), "merged")
    assert refused.status == 2 and refused.err.count("\n") == 1
    assert f"{base} ties its output head" in refused.err
    assert f"recall convert --untie makes of {base}" in refused.err
    assert not Path("merged").exists()

    untied = run("convert", "--untie", base, "untied")
    assert_array_equal(tensors(untied)[HEAD], tensors(base)[EMBED])
    assert_allclose(logits(load(untied)), logits(load(base)), rtol=0, atol=1e-6)
    run("merge", recipe("average", str(untied), f"{base}+{adapter}"), "merged")
    parts = tensors(base)[EMBED], tensors(run("convert", f"{base}+{adapter}", "whole"))
    for name in (EMBED, HEAD):
        assert_allclose(tensors("merged")[name], (parts[0] + parts[1][name]) / 2, atol=1e-7)
    again = recall("convert", "--untie", untied, "again")
    assert again.status == 2 and "leave --untie out" in again.err


def test_a_folded_model_is_untied_whole(base, tmp_path, run) -> None:
    adapter = save_adapter(base, tmp_path / "adapter", **TOGETHER["embedding"])
    out = tensors(run("convert", "--untie", f"{base}+{adapter}", "out"))
    assert_array_equal(out[HEAD], out[EMBED])
    assert_allclose(logits(load("out")), logits(adapted(base, adapter)), rtol=0, atol=1e-5)
