"""Whose samples a method looks at, and samples drawn from models without any data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from toys import make_tokenizer, write_rows

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.drawn_samples import draw_samples
from recall_jax.engine.inputs import common_architecture
from recall_jax.errors import InputError
from recall_jax.inputs.samples import read_typical
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.tokens import load_tokenizer
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import make_recipe

COUNT = 5


@pytest.fixture(scope="module")
def newest(toys):
    return open_checkpoint(toys.llama[-1])


@pytest.fixture(scope="module")
def draw(newest):
    arch = common_architecture([newest])
    tokenizer = load_tokenizer(newest.tokenizer_folders, arch.family)

    def drawn(place=0, **settings):
        settings = Samples(**{"count": COUNT, "max_tokens": 12, **settings})
        return draw_samples(settings, newest, arch, tokenizer, place), tokenizer

    return drawn


def lines(path):
    return [json.loads(row) for row in Path(path).read_text().splitlines()]


def merged(models, tmp_path, **samples):
    recipe = make_recipe(
        {
            "merge_method": "regmean",
            "models": models,
            "samples": {"count": COUNT, "max_tokens": 12, "batch_size": 4, **samples},
        }
    )
    job.merge(recipe, tmp_path / "out")
    rows = lines(tmp_path / "out" / "typical.jsonl")
    return [[row for row in rows if row["model"] == k] for k in range(len(models))]


def test_each_model_has_its_data_its_own_rows_or_those_of_samples(toys, tmp_path):
    older = tmp_path / "older"
    shutil.copytree(toys.llama[0], older)
    write_rows(older / "typical.jsonl", ["as", "they", "stand", "all", "of", "them"])
    models = [
        {"model": toys.llama[0], "data": toys.data},
        {"model": str(older)},
        {"model": toys.llama[1]},
    ]
    chosen, given, last = merged(models, tmp_path, data=toys.data)
    texts = [row["text"] for row in lines(toys.data)]
    assert [texts[row["row"]] for row in chosen] == [row["text"] for row in chosen]
    assert len(chosen) == len(last) == COUNT
    assert [row["text"] for row in given] == ["as", "they", "stand", "all", "of", "them"]
    # The rows of all travel with the merged model, and all of them are then its own.
    models = [{"model": str(tmp_path / "out")}, {"model": toys.llama[1], "data": toys.data}]
    again, _ = merged(models, tmp_path / "next")
    texts = [row["text"] for rows in (chosen, given, last) for row in rows]
    assert sorted(row["text"] for row in again) == sorted(texts)


def test_a_model_without_samples_is_named(toys, tmp_path):
    models = [{"model": toys.llama[0]}, {"model": toys.llama[1], "data": toys.data}]
    with pytest.raises(InputError, match=r"llama/0 has no samples of its own: add data"):
        merged(models, tmp_path)


@pytest.mark.parametrize("source", ["generated", "random"])
def test_drawn_samples_hang_on_seed_and_place_and_can_be_read_again(source, draw, tmp_path):
    samples, tokenizer = draw(source=source)
    again, _ = draw(source=source)
    assert samples.token_ids == again.token_ids
    for other in (draw(source=source, seed=1), draw(place=1, source=source)):
        assert samples.token_ids != other[0].token_ids
    path = tmp_path / "typical.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in samples.typical_rows()))
    read = read_typical(path, tokenizer, max_tokens=12)
    assert read.token_ids == samples.token_ids
    assert all(ids[0] == 1 and len(ids) <= 12 for ids in samples.token_ids)  # its bos_token_id


def test_generated_tokens_are_as_likely_as_the_model_says(draw, newest):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(newest.folder, dtype=torch.float32)
    with torch.no_grad():
        chances = torch.softmax(model(torch.tensor([[1]])).logits[0, -1], dim=-1).numpy()
    samples, _ = draw(source="generated", count=3000, max_tokens=2, batch_size=3000)
    first = [ids[1] if len(ids) > 1 else 2 for ids in samples.token_ids]  # 2 ends a text
    shares = np.bincount(first, minlength=len(chances)) / len(first)
    assert 0.5 * np.abs(shares - chances).sum() < 0.1  # 0.07 is what 3,000 of 97 kinds leave


def test_random_tokens_are_uniform_over_those_of_text(draw):
    samples, _ = draw(source="random", count=600)
    tokens = np.concatenate([ids[1:] for ids in samples.token_ids])
    special = make_tokenizer().all_special_ids
    assert not set(special) & set(tokens.tolist())
    counts = np.bincount(tokens, minlength=97)[2:]
    expected = len(tokens) / len(counts)
    assert ((counts - expected) ** 2 / expected).sum() < 140  # chi-square of 94: 0.1 %


def test_prompts_begin_what_is_generated(draw, tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [{"prompt": "ab"}, {"prompt": "XYZ", "completion": "not this"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples, tokenizer = draw(source="generated", prompts=str(path))
    starts = [tokenizer.encode(text, 99, True) for text in ("ab", "XYZ")]
    for place, (row, ids) in enumerate(zip(samples.rows, samples.token_ids, strict=True)):
        assert row["prompt"] == ("ab", "XYZ")[place % 2]
        assert ids[: len(starts[place % 2])] == starts[place % 2]
    with pytest.raises(InputError, match="leaves no room for an answer within 3"):
        draw(source="generated", prompts=str(path), max_tokens=3)


@pytest.mark.parametrize("source", ["generated", "random"])
def test_recall_compares_on_drawn_samples_too(source, toys, tmp_path):
    recipe = make_recipe(
        {
            "merge_method": "recall",
            "models": [{"model": model} for model in toys.llama],
            "samples": {"source": source, "count": COUNT, "max_tokens": 12},
        }
    )
    report = job.merge(recipe, tmp_path / "out")
    assert report["typical_samples"] == list(range(COUNT))
    np.testing.assert_allclose(np.sum(report["weights"], axis=0), 1, rtol=1e-5)
