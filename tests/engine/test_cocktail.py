"""LM-Cocktail's losses and weights against transformers' own loss."""

import json

import numpy as np
import pytest
import torch
from toys import copy_model
from transformers import AutoModelForCausalLM

from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.engine import batching
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import make_recipe

CHARACTERS = {chr(code): code - 30 for code in range(32, 127)}  # of the toys' tokenizer
END = 1


@pytest.fixture(scope="module")
def folders(toys, tmp_path_factory):
    """By kind; models that say what ends a text."""
    folder = tmp_path_factory.mktemp("models")
    copies = {"qwen2": [], "llama": []}
    for kind, models in copies.items():
        for k, source in enumerate(getattr(toys, kind)):
            copy = copy_model(source, folder / f"{kind}-{k}", eos_token_id=END)
            (copy / "generation_config.json").unlink()
            models.append(str(copy))
    return copies


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """(file, rows): prompts with completions, and a text of more tokens than exist at a time."""
    draws = np.random.default_rng(0)

    def text(length):
        return "".join(draws.choice(list("abcdefgXYZ"), length))

    rows = [{"prompt": text(n) + "=", "completion": text(m)} for n, m in [(3, 9), (12, 1), (7, 7)]]
    rows.append({"text": text(140)})
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path, rows


def mean_loss(folder, rows):
    """Of the completions' and texts' tokens and the end of text, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder).float().eval()
    total, number = 0.0, 0
    for row in rows:
        prompt = row.get("prompt", "")
        whole = prompt + row.get("completion", row.get("text", ""))
        ids = [*(CHARACTERS[character] for character in whole), END]
        labels = torch.tensor([[-100] * len(prompt) + ids[len(prompt) :]])
        with torch.no_grad():
            loss = model(torch.tensor([ids]), labels=labels).loss
        counted = int((labels[:, 1:] != -100).sum())
        total, number = total + float(loss) * counted, number + counted
    return total / number


@pytest.mark.parametrize("kind", ["qwen2", "llama"])  # untied and bfloat16, tied and float32
def test_weights_are_the_softmax_of_the_losses(kind, folders, rows, tmp_path):
    path, examples = rows
    models = folders[kind]
    recipe = {
        "merge_method": "lm_cocktail",
        "models": [{"model": folder} for folder in models],
        "parameters": {"temperature": 0.5},
        "samples": {"data": str(path), "batch_size": 3},
    }
    report = job.merge(make_recipe(recipe), tmp_path / "out")
    losses = np.asarray([mean_loss(folder, examples) for folder in models])
    np.testing.assert_allclose(report["losses"], losses, rtol=1e-5)
    assert np.ptp(losses) > 0.01
    weights = np.exp(-losses / 0.5) / np.exp(-losses / 0.5).sum()
    assert np.asarray(report["weights"]).shape == (len(models), len(report["units"]))
    np.testing.assert_allclose(np.asarray(report["weights"]).T, [weights] * 5, rtol=1e-5)
    assert report["typical_samples"] == [0, 1, 2, 3]


def test_as_many_examples_are_drawn_as_asked(toys, folders, tmp_path):
    recipe = {
        "merge_method": "lm_cocktail",
        "models": [{"model": folder} for folder in folders["llama"]],
        "samples": {"data": toys.data, "count": 5, "seed": 3},
    }
    report = job.merge(make_recipe(recipe), tmp_path / "out")
    assert len(report["typical_samples"]) == 5
    assert (tmp_path / "out" / "typical.jsonl").read_text().count("\n") == 5


def test_a_merge_goes_on_with_the_losses_and_batches_it_knows(folders, rows, tmp_path, monkeypatch):
    path, _ = rows
    recipe = make_recipe(
        {
            "merge_method": "lm_cocktail",
            "models": [{"model": folder} for folder in folders["llama"]],
            "samples": {"data": str(path)},
        }
    )

    def interrupt(doing, done, total, **moved):
        if doing == "layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.merge(recipe, tmp_path / "out", progress=interrupt)
    heard = []
    options = job.MergeOptions(resume=True)
    with monkeypatch.context() as patch:  # however much memory there is by now
        patch.setattr(batching, "fit_batching", None)
        job.merge(
            recipe, tmp_path / "out", options=options, progress=lambda *at, **_: heard.append(at)
        )
    assert not [doing for doing, *_ in heard if "loss" in doing]
    job.merge(recipe, tmp_path / "whole")
    resumed, whole = (
        SafetensorsFile(tmp_path / out / "model.safetensors") for out in ("out", "whole")
    )
    for name in whole.specs:
        np.testing.assert_array_equal(resumed.read(name), whole.read(name))


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ({"data": "{rows}", "max_tokens": 5}, "row 1 .* has no token to predict within 5 tokens"),
        ({"source": "random"}, "lm_cocktail weighs by labelled examples"),
    ],
)
def test_examples_without_a_label_are_refused(samples, said, folders, rows, tmp_path):
    samples = {key: str(rows[0]) if value == "{rows}" else value for key, value in samples.items()}
    recipe = {
        "merge_method": "lm_cocktail",
        "models": [{"model": folder} for folder in folders["llama"]],
        "samples": samples,
    }
    with pytest.raises(InputError, match=said):
        job.merge(make_recipe(recipe), tmp_path / "out")
