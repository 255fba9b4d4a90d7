"""The recipes that are shipped plan runs that could begin, were their models and rows there."""

from pathlib import Path

import pytest

from recall_jax.experiments.continual.inputs import find_columns
from recall_jax.experiments.continual.lineage import MergedModel, Tuned, ancestry
from recall_jax.experiments.continual.plan import plan_runs
from recall_jax.experiments.continual.presets import PRESETS
from recall_jax.experiments.continual.recipe import read_protocol
from recall_jax.recipes.recipe import make_recipe

CONFIGS = Path(__file__).parents[3] / "configs"
RECIPES = sorted([*CONFIGS.glob("continual/*.yml"), *CONFIGS.glob("paper/*.yml")])


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_shipped_recipe_plans_whole_runs(path):
    protocol = read_protocol(path)
    columns = find_columns(protocol)
    runs = plan_runs(protocol)
    models = ancestry(model for run in runs for model in run.stages if model is not None)
    for model in models.values():
        if isinstance(model, MergedModel):
            make_recipe(model.values(lambda part: part.name))
    for run in runs:
        assert len(columns) > len(run.tasks) or "sequence" in path.stem  # some are unseen
    tuned = [model.settings for model in models.values() if isinstance(model, Tuned)]
    if path.parent.name == "paper":
        assert {(s.lora.r, s.lora.alpha, s.lora.dropout) for s in tuned} == {(8, 32.0, 0.1)}
    else:
        assert set(protocol.strategies) >= PRESETS.keys() - {"recall_sequential"}
        assert len(protocol.seeds) == 3 and len(protocol.orders) == 2


def test_the_paper_has_three_scenarios_of_two_models():
    assert [path.stem for path in RECIPES if path.parent.name == "paper"] == [
        f"{model}-{scenario}"
        for model in ("llama2", "qwen2")
        for scenario in ("multi", "sequence", "single")
    ]
