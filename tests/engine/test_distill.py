"""RECALL distilled from recipe to folder: samples, coefficients, interruption, refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
from toys import TIMED, tree, write_rows

from recall_jax.checkpoint.safetensors import SafetensorsFile
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.jobs import merge as job
from recall_jax.methods import refine
from recall_jax.recipes.recipe import make_recipe


@pytest.fixture
def recipe_of(toys):
    base, *experts = toys.qwen2

    def make(models=experts, **more):
        return make_recipe(
            {
                "merge_method": "recall_distill",
                "base_model": base,
                "base_data": toys.data,
                "models": [{"model": model, "data": toys.data} for model in models],
                "parameters": {"steps": 3},
                "samples": {"count": 4, "max_tokens": 16, "batch_size": 4},
                **more,
            }
        )

    return make


def test_an_interrupted_merge_goes_on_to_the_same_bytes(recipe_of, tmp_path):
    recipe = recipe_of()

    def interrupt(doing, done, total, **moved):
        if doing == "layers.1":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.merge(recipe, tmp_path / "out", progress=interrupt)
    heard = []
    report = job.merge(
        recipe,
        tmp_path / "out",
        options=job.MergeOptions(resume=True),
        progress=lambda doing, *at, **moved: heard.append(doing),
    )
    assert not [doing for doing in heard if doing.startswith("distillation")]
    whole = job.merge(recipe, tmp_path / "whole")
    one, other = (
        {name: content for name, content in tree(tmp_path / out).items() if name not in TIMED}
        for out in ("out", "whole")
    )
    assert one == other
    assert report["weights"] == whole["weights"]
    assert np.asarray(report["weights"]).shape == (2, len(report["units"]))
    assert report["loss_curve"] == whole["loss_curve"]
    assert len(report["loss_curve"]) == 4 and report["loss_curve"][-1] < report["loss_curve"][0]
    rows = (tmp_path / "out" / "typical.jsonl").read_text().splitlines()
    assert [json.loads(row)["model"] for row in rows] == [0] * 4 + [1] * 4


def test_without_a_step_the_weights_are_recall_s(recipe_of, toys, tmp_path):
    report = job.merge(recipe_of(parameters={"steps": 0}), tmp_path / "out")
    compared = make_recipe(
        {
            "merge_method": "recall",
            "models": [{"model": model} for model in toys.qwen2[1:]],
            "samples": {"data": toys.data, "count": 4, "max_tokens": 16, "batch_size": 4},
        }
    )
    recall = job.merge(compared, tmp_path / "recall")
    np.testing.assert_allclose(report["weights"], recall["weights"], rtol=1e-5)


def test_models_that_are_the_base_pass_bit_for_bit(recipe_of, toys, tmp_path):
    base = toys.qwen2[0]
    # Named differently, or the recipe takes them for the base that mergekit lists too.
    job.merge(recipe_of([f"{base}/", f"{base}/."]), tmp_path / "out")
    merged, its = (
        SafetensorsFile(tmp_path / "out" / "model.safetensors"),
        SafetensorsFile(Path(base) / "model.safetensors"),
    )
    for name in its.specs:
        assert merged.read(name).tobytes() == its.read(name).tobytes()


def test_what_cannot_be_distilled_is_refused(recipe_of, toys, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="match"):
        recipe_of(parameters={"match": {"mse": 1.0}})
    with pytest.raises(InputError, match="base_model"):
        recipe_of(base_model=None, base_data=None)
    write_rows(tmp_path / "one.jsonl", ["a single row"])
    entries = [{"model": model, "data": str(tmp_path / "one.jsonl")} for model in toys.qwen2[1:]]
    with pytest.raises(InputError, match="are too few or too much alike"):
        job.merge(recipe_of().changed(models=entries), tmp_path / "out")
    write_rows(tmp_path / "one.jsonl", ["a single row"] * 4)
    with pytest.raises(InputError, match="are too few or too much alike for RECALL's weights"):
        job.merge(recipe_of().changed(models=entries), tmp_path / "out")
    monkeypatch.setattr(refine, "refining_bytes", lambda *sizes: 1 << 60)
    with pytest.raises(UnfinishedError, match="keeps the base and all models in memory"):
        job.merge(recipe_of(), tmp_path / "out")
