"""A model in memory: what is read, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.errors import InputError
from recall_jax.evaluation.resident import load_resident
from recall_jax.evaluation.stop_strings import before_any, stops_at
from recall_jax.experiments.demo.material import BASE, CHECKPOINTS
from recall_jax.generation.end_of_text import end_of_text
from recall_jax.models.convert import from_flax


@pytest.fixture
def copy(tmp_path):
    shutil.copytree(CHECKPOINTS / BASE, tmp_path / "model")
    return tmp_path / "model"


def edit(folder, name, **values):
    config = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(config | values))


def test_adapters_are_folded_in(toys):
    spec = f"{toys.llama[0]}+{toys.adapter}"
    resident = load_resident(spec)
    checkpoint, base = open_checkpoint(spec), open_checkpoint(toys.llama[0])
    tensors = from_flax(resident.arch, resident.params)
    assert tensors.keys() == {name for name in checkpoint.specs if name != "lm_head.weight"}
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(tensor, checkpoint.read(name))
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert np.abs(tensors[changed] - base.read(changed)).max() > 0.01
    assert resident.max_length == 64


def test_the_generation_config_says_where_a_text_ends(copy):
    edit(copy, "generation_config.json", eos_token_id=[3, 5])
    assert load_resident(copy).eos_token_ids == (3, 5)
    (copy / "generation_config.json").unlink()
    assert end_of_text(open_checkpoint(copy)) == (256,)
    edit(copy, "config.json", eos_token_id=None)
    with pytest.raises(InputError, match="eos_token_id"):
        load_resident(copy)


def test_tensors_that_do_not_fit_the_config_are_refused(copy):
    edit(copy, "config.json", intermediate_size=200)
    with pytest.raises(InputError, match=r"mlp\.gate_proj"):
        load_resident(copy)


def test_stop_strings_are_looked_for_in_the_text(copy):
    tokenizer = load_resident(copy).tokenizer
    ids = tokenizer.encode("abc\nQ: d", 99, False)
    assert stops_at(tokenizer, []) is None
    stop = stops_at(tokenizer, ["\nQ", "zz"])
    assert [stop(ids[:n]) for n in range(len(ids))] == [False] * 5 + [True] * (len(ids) - 5)
    assert before_any("abc\nQ: d", ["Q", "\n", "zz"]) == "abc"
    assert before_any("abc", ["Q", "z"]) == "abc"
    assert before_any("", []) == ""
