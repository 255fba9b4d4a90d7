"""What the documents say works: the README's example, the recipes in configs/, the scripts."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.jobs.merge import merge
from recall_jax.recipes.recipe import read_recipe

ROOT = Path(__file__).parent.parent
CONFIGS = sorted({*(ROOT / "configs").glob("*.yml")} - {ROOT / "configs" / "ablation.yml"})


def test_the_example_of_the_readme_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL).group(1)
    assert len([line for line in code.splitlines() if line.strip()]) == 12
    names = {}
    with jax.numpy_rank_promotion("allow"):  # a user's own code, under JAX's defaults
        exec(compile(code, "README.md", "exec"), names)
    weights = np.asarray(names["report"]["weights"])
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, atol=1e-6)
    assert (weights[1] > weights[0]).all()
    first = names["model"](0)["embed"] * weights[0, 0]
    second = names["model"](1)["embed"] * weights[1, 0]
    np.testing.assert_allclose(names["merged"]["embed"], first + second, atol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_merges(config, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(config)
    if "steps" in type(recipe.parameters).model_fields:  # a few show that it runs
        few = recipe.parameters.model_copy(update={"steps": 3})
        recipe = recipe.model_copy(update={"parameters": few})
    if recipe.samples is not None:  # and they are chosen from few rows
        few = recipe.samples.model_copy(update={"pool": 64})
        recipe = recipe.model_copy(update={"samples": few})
    report = merge(recipe, tmp_path / "out")
    merged, newest = open_checkpoint(tmp_path / "out"), open_checkpoint(report["models"][-1])
    assert {n: s.shape for n, s in merged.specs.items()} == {
        n: s.shape for n, s in newest.specs.items()
    }
    if report["base_model"] is None:  # else they are of task vectors, and of any sum
        np.testing.assert_allclose(np.asarray(report["weights"]).sum(axis=0), 1.0, atol=1e-6)


def test_the_documents_name_only_files_that_exist():
    for document in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)#]+)\)", document.read_text()):
            assert (document.parent / target).exists(), f"{document.name} points to {target}"
