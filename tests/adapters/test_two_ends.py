"""A head that lies beside the embedding which the config says it is: what transformers 5 loads.

So peft with transformers 4 leaves models whose head was trained apart, and torch every tied .bin.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from peft_models import config, load, logits, our_logits, recipe, save_base, tensors
from safetensors.numpy import load_file, save_file
from toys import copy_model
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config

from recall_jax.checkpoint import folder as folder_module
from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.evaluation.resident import load_resident

EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """Tied, in float32."""
    return save_base(tmp_path_factory.mktemp("two") / "base", tied=True)


def with_head(base: str | Path, folder: Path, change: float, **changed: object) -> str:
    """A copy of the base with a head in its files, which differs in its last row by `change`."""
    copy_model(base, folder, **changed)
    arrays = load_file(folder / "model.safetensors")
    ends = ("embed_tokens.weight", "wte.weight")
    embedding = next(name for name in arrays if name.endswith(ends))
    arrays[HEAD] = arrays[embedding].copy()
    arrays[HEAD][-1] += change
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    return str(folder)


@pytest.fixture
def parted(base, tmp_path) -> str:
    """Its head was trained apart, and its config does not know."""
    return with_head(base, tmp_path / "parted", 0.5)


def test_a_head_that_differs_is_kept_and_told(base, parted, recall, run) -> None:
    expected = logits(load(parted))
    assert np.abs(expected - logits(load(base))).max() > 0.1
    done = recall("convert", parted, "out")
    assert done.status == 0
    assert done.err.startswith(f"warning: {parted}: its config ties lm_head.weight")
    assert config("out")["tie_word_embeddings"] is False
    assert_array_equal(tensors("out")[HEAD], tensors(parted)[HEAD])
    assert_array_equal(logits(load("out")), expected)
    assert recall("convert", "out", "again").err == ""


def test_a_head_that_is_the_same_is_left_out(base, tmp_path, recall, run) -> None:
    twice = with_head(base, tmp_path / "twice", 0)
    done = recall("convert", twice, "out")
    assert (done.status, done.err) == (0, "")
    assert config("out") == config(twice)
    assert tensors("out").keys() == tensors(base).keys()
    assert recall("verify", twice).status == 0
    assert json.loads(recall("inspect", "--json", twice).out)["tied"] is True


@pytest.mark.parametrize("to", ["orbax", "npz"])
def test_a_tree_has_the_head_too(to, parted, run) -> None:
    run("convert", parted, "--to", to, "tree")
    assert config("tree")["tie_word_embeddings"] is False
    assert_array_equal(logits(load(run("convert", "tree", "back"))), logits(load(parted)))


def test_what_is_merged_has_the_head(base, parted, tmp_path, recall, run) -> None:
    other = with_head(base, tmp_path / "other", -1.5)
    done = recall("merge", recipe("average", parted, other), "merged")
    assert done.status == 0
    assert [line.split(": ")[1] for line in done.err.splitlines()] == [parted, other]
    assert config("merged")["tie_word_embeddings"] is False
    mean = (tensors(parted)[HEAD] + tensors(other)[HEAD]) / 2
    assert_allclose(tensors("merged")[HEAD], mean, rtol=0, atol=1e-7)
    assert_array_equal(tensors("merged")[EMBED], tensors(base)[EMBED])
    report = json.loads(Path("merged", "recall_report.json").read_text())
    assert len(report["warnings"]) == 2
    refused = recall("merge", recipe("average", base, parted), "mixed")
    assert refused.status == 2 and f"recall convert --untie makes of {base}" in refused.err


def test_what_runs_the_model_runs_the_head(parted, recall) -> None:
    found = json.loads(recall("inspect", "--json", parted).out)
    assert found["tied"] is False and found["recall_can_run"] and "two" in found["warnings"][0]
    resident = load_resident(parted)
    ours = our_logits(resident.arch, resident.params)
    assert_allclose(ours, logits(load(parted)), rtol=0, atol=1e-5)


def test_verify_does_not_call_it_good(parted, recall, run) -> None:
    done = recall("verify", parted)
    assert done.status == 1
    assert "good" not in done.out and "its config ties lm_head.weight" in done.out
    assert recall("verify", run("convert", parted, "out")).status == 0


def test_a_bin_that_holds_both(base, tmp_path, recall, run) -> None:
    state = dict(load(base).state_dict())
    for head, tied in ((state[EMBED], True), (state[EMBED] * 2, False)):
        source = copy_model(base, tmp_path / str(tied))
        (source / "model.safetensors").unlink()
        torch.save(state | {HEAD: head}, source / "pytorch_model.bin")
        run("convert", source, f"out-{tied}")
        assert config(f"out-{tied}")["tie_word_embeddings"] is tied
        assert_array_equal(logits(load(f"out-{tied}")), logits(load(source)))


@pytest.mark.parametrize(
    "family",
    [
        GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32),
        Gemma2Config(
            vocab_size=40,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
        ),
    ],
    ids=["gpt2", "gemma2"],
)
def test_families_whose_class_ties_where_the_config_is_silent(family, tmp_path, run) -> None:
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(family).save_pretrained(tmp_path / "base")
    ids = torch.arange(8)[None]
    for change, tied in ((0.0, True), (0.5, False)):
        silent = {"tie_word_embeddings": None}
        source = with_head(tmp_path / "base", tmp_path / str(tied), change, **silent)
        out = run("convert", source, f"out-{tied}")
        assert config(out).get("tie_word_embeddings") is (None if tied else False)
        assert (HEAD in tensors(out)) is not tied
        with torch.no_grad():
            found, expected = (load(model)(input_ids=ids).logits for model in (out, source))
        assert torch.equal(found, expected)


def test_no_more_is_read_than_tells(parted, base, tmp_path, monkeypatch) -> None:
    size = tensors(base)[EMBED].nbytes
    assert open_checkpoint(base).bytes_read == 0
    assert open_checkpoint(parted).bytes_read == 2 * size
    monkeypatch.setattr(folder_module, "_COMPARED", 1000)
    early = with_head(base, tmp_path / "early", 0)
    arrays = load_file(Path(early, "model.safetensors"))
    arrays[HEAD][0] += 1
    save_file(arrays, Path(early, "model.safetensors"))
    assert open_checkpoint(early).bytes_read < 2000
    assert open_checkpoint(with_head(base, tmp_path / "same", 0)).bytes_read == 2 * size


def test_a_head_of_another_dtype_is_another(base, tmp_path) -> None:
    folder = with_head(base, tmp_path / "wide", 0)
    arrays = load_file(Path(folder, "model.safetensors"))
    arrays[HEAD] = arrays[HEAD].astype(np.float64)
    save_file(arrays, Path(folder, "model.safetensors"))
    model = open_checkpoint(folder)
    assert HEAD in model.specs and model.config["tie_word_embeddings"] is False


def test_a_config_that_does_not_tie_them_is_believed(base, tmp_path) -> None:
    model = open_checkpoint(with_head(base, tmp_path / "two", 0, tie_word_embeddings=False))
    assert HEAD in model.specs and model.warnings == []
    assert model.bytes_read == 0
