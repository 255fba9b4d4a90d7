"""Recipes of continual learning: what models they plan, and what is refused in a line."""

import json
import shutil
from pathlib import Path

import pytest

from recall_jax.errors import InputError
from recall_jax.experiments.continual.lineage import (
    Given,
    MergedModel,
    Tuned,
    ancestry,
    definition,
    needed,
)
from recall_jax.experiments.continual.plan import plan_runs
from recall_jax.experiments.continual.presets import PRESETS
from recall_jax.experiments.continual.recipe import Protocol, filled
from recall_jax.experiments.continual.run import ContinualOptions, continual
from recall_jax.files.schema import validate
from recall_jax.recipes.recipe import make_recipe


def planned(protocol, **changes):
    runs = plan_runs(validate(Protocol, protocol | changes, "recipe"))
    return {run.name: run for run in runs}


def fault(protocol, **changes) -> str:
    with pytest.raises(InputError) as raised:
        planned(protocol, **changes)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def test_experts_and_chains_share_what_is_made_alike(protocol):
    runs = planned(protocol)
    sequential, average, recall, magmax, joint = runs.values()
    base = Given(protocol["base_model"])
    first = sequential.stages[0]
    assert isinstance(first, Tuned) and first.start == base
    # all begin with the same fine-tuning
    assert average.stages[0].models == recall.stages[0].models == (base, first)
    experts = average.final.models[1:]
    assert experts[0].name == first.name
    assert [model.start for model in experts] == [base] * 3
    assert recall.final.models == average.final.models
    # experts of magmax are the stages of the sequence
    assert [model.name for model in magmax.final.models] == [
        model.name for model in sequential.stages
    ]
    assert magmax.final.base == base and average.final.base is None
    assert joint.stages[:2] == (None, None)
    assert joint.final.data == tuple(task["data"] for task in protocol["tasks"])
    models = ancestry(run.final for run in runs.values()).values()
    assert sum(isinstance(model, Tuned) for model in models) == 3 + 2 + 1


def test_seeds_steer_training_samples_and_paths(protocol):
    assert filled({"a": ["x-{seed}", "{seed}", 3]}, 7) == {"a": ["x-7", 7, 3]}
    runs = planned(protocol, seeds=[3, 4], base_model="suite-{seed}", strategies=["recall", "dare"])
    third, dare = runs["recall-0-3"], runs["dare-0-4"]
    assert (third.base.name, dare.base.name) == ("suite-3", "suite-4")
    assert third.final.models[1].settings.seed == 3
    recipe = third.final.values(lambda model: model.name)
    assert recipe["samples"] == {
        "count": 3,
        "max_tokens": 32,
        "seed": 3,
        "data": protocol["tasks"][2]["data"],
    }
    assert dare.final.values(lambda model: model.name)["parameters"]["seed"] == 4
    assert not {m.name for m in third.stages} & {m.name for m in runs["recall-0-4"].stages}


def test_orders_may_leave_tasks_out_and_joint_training_has_none(protocol):
    runs = planned(
        protocol,
        orders=[["sort", "reverse"], ["reverse", "sort"], ["shift"]],
        strategies=["sequential", "joint"],
    )
    assert [name for name in runs if name.startswith("joint")] == ["joint-0-0", "joint-2-0"]
    assert runs["sequential-2-0"].tasks == ("shift",)
    assert len(runs["joint-0-0"].final.data) == 2
    last = planned(protocol, evaluate={"stages": "last"}, strategies=["average"])["average-0-0"]
    assert last.stages[:2] == (None, None) and isinstance(last.final, MergedModel)


def test_ewc_keeps_the_anchors_of_all_earlier_tasks(protocol):
    ewc = {"finetune": {"method": "ewc", "ewc_strength": 3.0}}
    online = {"finetune": ewc["finetune"] | {"ewc_decay": 0.9}}
    runs = planned(protocol, strategies={"ewc": ewc, "online": online})
    first, second, third = runs["ewc-0-0"].stages
    assert first.settings.method == "full" and first.settings.save_fisher
    assert second.anchors == (first,) and third.anchors == (first, second)
    assert third.settings.ewc_strength == 3.0 and third.start == second
    first, second, third = runs["online-0-0"].stages
    assert third.anchors == (second,) and third.settings.ewc_decay == 0.9


def test_merges_from_and_with_what_was_merged(protocol):
    merge = {"merge_method": "average", "with_base": True}
    runs = planned(
        protocol,
        strategies={
            "both": {"merge": merge, "from": "merged", "keeps": "merged"},
            "regmean": {"like": "regmean", "finetune": {"steps": 5}},
            "experts": {"like": "recall", "merge": {"with_base": False}},
        },
    )
    first, second, _ = runs["both-0-0"].stages
    base = Given(protocol["base_model"])
    assert first.models[0] == base and first.models[1].start == base
    assert second.models[0] == first and second.models[1].start == first
    alone, pair, _ = runs["experts-0-0"].stages
    assert isinstance(alone, Tuned) and pair.models[0] == alone  # recall takes two
    regmean = runs["regmean-0-0"].final
    assert regmean.data == tuple(task["data"] for task in protocol["tasks"])
    assert {model.settings.steps for model in regmean.models} == {5}


def test_lora_keeps_adapters_apart_and_shared_settings_out(protocol):
    shared = protocol["finetune"] | {"lora": {"r": 2}, "out_dtype": "bfloat16"}
    runs = planned(protocol, finetune=shared, strategies=["lora", "sequential"])
    lora, full = runs["lora-0-0"].final.settings, runs["sequential-0-0"].final.settings
    assert (lora.method, lora.lora.r, lora.lora.alpha, lora.out_dtype) == ("lora", 2, 32.0, None)
    assert (full.method, full.lora, full.out_dtype) == ("full", None, "bfloat16")


def test_what_is_needed_is_what_exists_on_the_way(protocol):
    run = planned(protocol, strategies=["recall_sequential"])["recall_sequential-0-0"]
    first, second, third = run.stages
    made = {run.base.name, second.name, *(model.name for model in first.models)}
    wanted = needed([third], lambda model: model.name in made)
    assert set(wanted) == {second.name}  # and not what `second` was made from
    assert set(needed([first], lambda model: model.name in made)) >= {first.models[1].name}


def test_presets_give_recipes_that_merge_takes(protocol):
    for name in PRESETS:
        run = planned(protocol, strategies=[name])[f"{name}-0-0"]
        if isinstance(run.final, MergedModel):
            recipe = make_recipe(run.final.values(lambda model: model.name))
            assert len(recipe.models) >= 2
            assert json.loads(json.dumps(definition(run.final))) == definition(run.final)
        assert run.final.name.startswith(run.final.label)


def test_wrong_recipes_are_refused_in_a_line(protocol, tmp_path):
    assert "no strategy 'recal': choose from sequential" in fault(protocol, strategies=["recal"])
    assert fault(protocol, strategies={"a": {"from": "base"}}) == (
        "recipe: strategies.a: from and keeps go with merge: add it, or remove them"
    )
    assert "joint trains once" in fault(
        protocol, strategies={"a": {"joint": True, "merge": {"merge_method": "average"}}}
    )
    assert "orders.0: no task 'swap' among reverse, sort, shift" in fault(
        protocol, orders=[["swap"]]
    )
    assert "did you mean learning_rate?" in fault(protocol, finetune={"learning_rat": 1e-3})
    assert "did you mean alpha?" in fault(
        protocol, strategies={"a": {"finetune": {"method": "lora", "lora": {"alfa": 1}}}}
    )
    assert "strategies.a: finetune.epochs 0: it must be at least 1" in fault(
        protocol, strategies={"a": {"finetune": {"epochs": 0}}}
    )
    assert "no merge_method 'mean'" in fault(
        protocol, strategies={"a": {"merge": {"merge_method": "mean"}}}
    )
    assert "method ewc needs finetune.ewc_strength" in fault(
        protocol, strategies={"a": {"finetune": {"method": "ewc"}}}
    )
    assert "orders.1 is given twice" in fault(protocol, orders=[["sort"], ["sort"]])
    assert "no strategy ['lora']" in fault(protocol, strategies={"a": {"like": ["lora"]}})
    assert "finetune.ewc_strength" not in fault(protocol, finetune={"data": "rows.jsonl"})


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_model": "nowhere/base"}, "nowhere/base"),
        ({"unseen": ["strings_sort"]}, "strings_sort is among the tasks that are learnt"),
        ({"unseen": ["strings_sorted"]}, "no task 'strings_sorted'"),
        ({"tasks": [{"name": "a", "data": "no.jsonl", "task": "strings_sort"}]}, "no data file"),
        (
            {"strategies": {"a": {"merge": {"merge_method": "ties", "parameters": {"x": 1}}}}},
            "unknown key parameters.x",
        ),
        ({"unseen": ["strings_swap", "strings_swap"]}, "strings_swap is named already"),
        ({"strategies": {"a": {"merge": {"merge_method": "ties"}}}}, "give it parameters.weight"),
        ({"samples": {"data": "no.jsonl"}}, "no data file no.jsonl"),
        ({"samples": {"source": "generated", "prompts": "no.txt"}}, "no data file no.txt"),
        ({"samples": {"unit": "middle"}}, "'middle' is not a unit"),
        ({"samples": {"source": "random"}, "strategies": ["lm_cocktail"]}, "labelled examples"),
        ({"finetune": {"field": "body"}}, "row 0 .* has no field 'body'"),
        (
            {"strategies": {"a": {"like": "recall", "merge": {"parameters": {"reference": 9}}}}},
            "reference 9",
        ),
        (
            {
                "strategies": {
                    "a": {"like": "lora", "finetune": {"lora": {"target_modules": ["x"]}}}
                }
            },
            "no linear layer 'x'",
        ),
    ],
)
def test_a_run_that_cannot_end_well_never_begins(protocol, tmp_path, changes, line):
    asked = validate(Protocol, protocol | changes, "recipe")
    with pytest.raises(InputError, match=line):
        continual(asked, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_no_input_is_replaced(protocol, tmp_path):
    base = Path(shutil.copytree(protocol["base_model"], tmp_path / "base"))
    asked = validate(Protocol, protocol | {"base_model": str(base)}, "recipe")
    with pytest.raises(InputError, match="holds the input"):
        continual(asked, base, options=ContinualOptions(force=True))
    assert (base / "model.safetensors").exists()
