"""The recipe of an ablation: what is varied, and every fault in one line."""

from pathlib import Path

import pytest
import yaml

from recall_jax.errors import InputError
from recall_jax.experiments.ablation.axes import AXES, label
from recall_jax.experiments.ablation.plan import plan_ablation
from recall_jax.experiments.ablation.recipe import Ablation, read_ablation, variants
from recall_jax.recipes.recipe import Recipe

ROOT = Path(__file__).parents[3]
PLAIN = {
    "merge_method": "recall",
    "models": [{"model": "base"}, {"model": "fine"}],
    "samples": {"data": "rows.jsonl"},
    "tasks": ["strings_sort", "strings_swap"],
}


def read(tmp_path, **changes) -> Ablation:
    values = {k: v for k, v in (PLAIN | changes).items() if v is not None}
    path = tmp_path / "ablation.yml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return read_ablation(path)


def found(ablation, check=lambda recipe: None):
    """Labels by axis, the recipe's own in brackets; and what is left out."""
    axes, left_out = variants(ablation, check)
    return {
        name: [f"[{label(each.value)}]" if each.in_recipe else label(each.value) for each in values]
        for name, values in axes.items()
    }, left_out


@pytest.mark.parametrize("ablate", [None, list(AXES), dict.fromkeys(AXES)])
def test_every_axis_has_values_of_its_own(tmp_path, ablate):
    axes, left_out = found(read(tmp_path, ablate=ablate))
    assert list(axes) == list(AXES) and left_out == []
    for values in axes.values():
        assert len(values) >= 3 and sum(value.startswith("[") for value in values) == 1


def test_the_recipes_own_value_takes_its_place(tmp_path):
    asked = {
        "count": [50, 5, 5],
        "sigma": ["median", 2.5],
        "temperature": 0.5,
        "similarity": [{"rbf": 1, "cosine": 0.5}],
        "threshold": [0.5],
    }
    axes, _ = found(read(tmp_path, ablate=asked, parameters={"sigma": "dim"}))
    assert axes == {
        "count": ["5", "[20]", "50"],
        "sigma": ["[dim]", "median", "2.5"],
        "temperature": ["0.5", "[1]"],
        "similarity": ["[rbf]", "1 rbf + 0.5 cosine"],
        "threshold": ["[none]", "0.5"],
    }


def test_a_variant_is_the_recipe_with_one_value_changed(tmp_path):
    ablation = read(tmp_path, parameters={"sigma": 3.0}, out_dtype="float32")
    own = ablation.recipe
    assert type(own) is Recipe and own.parameters.sigma == 3.0 and own.out_dtype == "float32"
    axes, _ = variants(ablation, lambda recipe: None)
    names = set()
    for name, values in axes.items():
        for each in values:
            assert AXES[name].value_in(each.recipe) == each.value
            assert each.in_recipe == (each.recipe == own)
            names.add(each.name)
    assert len(names) == sum(map(len, axes.values())) - len(axes) + 1
    (generated,) = (each for each in axes["source"] if each.value == "generated")
    assert generated.recipe.samples.data is None


def refuse(recipe):
    if recipe.parameters.alignment == "procrustes":
        raise InputError("no procrustes today")


def test_a_default_value_that_does_not_fit_is_left_out_and_one_asked_for_is_not(tmp_path):
    axes, left_out = found(read(tmp_path, ablate="alignment"), refuse)
    assert axes == {"alignment": ["[none]", "center"]}
    assert left_out == ["alignment procrustes: no procrustes today"]
    with pytest.raises(InputError, match=r"^ablate.alignment, procrustes: no procrustes today$"):
        found(read(tmp_path, ablate={"alignment": ["procrustes"]}), refuse)


def test_given_samples_leave_nothing_to_choose(tmp_path):
    given = {"samples": {"typical": "typical.jsonl"}}
    axes, left_out = found(read(tmp_path, **given))
    assert "count" not in axes and "unit" not in axes and "source" not in axes
    assert [line.split(":")[0] for line in left_out] == [
        f"ablate.{name}" for name in ("count", "unit", "source")
    ]
    with pytest.raises(InputError, match=r"^ablate.count: samples.typical are taken as given"):
        found(read(tmp_path, **given, ablate={"count": [5]}))


def test_groups_of_tasks(tmp_path):
    assert read(tmp_path).groups == {"all": ("strings_sort", "strings_swap")}
    seen = {"seen": ["strings_sort"], "unseen": ["strings_swap", "strings_tree"]}
    assert read(tmp_path, tasks=seen).groups == {
        "all": ("strings_sort", "strings_swap", "strings_tree"),
        "seen": ("strings_sort",),
        "unseen": ("strings_swap", "strings_tree"),
    }


FAULTS = {
    "no such axis": ({"ablate": ["sigm"]}, "ablate: no axis 'sigm': choose from count, unit"),
    "no such axis with values": ({"ablate": {"rank": [1]}}, "ablate: no axis 'rank'"),
    "an axis without a value": ({"ablate": {"count": []}}, "ablate.count should be a list with"),
    "a number for names": ({"ablate": 5}, "ablate: give names of axes, or a mapping"),
    "no tasks": ({"tasks": None}, "tasks is missing"),
    "seen without unseen": ({"tasks": {"seen": ["sst2"]}}, "tasks.unseen is missing"),
    "a misspelt key": ({"domain": {}}, "unknown key domain; did you mean domains"),
    "one domain": ({"domains": {"a": "a.jsonl"}}, "domains should be"),
    "another method": (
        {"merge_method": "average", "samples": None},
        "an ablation needs merge_method recall, not average",
    ),
    "weights": ({"weights": "w.json"}, "weights would fix what is to be varied: remove them"),
    "no limit": ({"evaluate": {"limit": 0}}, "evaluate.limit should be"),
}


@pytest.mark.parametrize(("changes", "message"), FAULTS.values(), ids=FAULTS)
def test_faults_are_one_line_with_the_file_and_the_key(tmp_path, changes, message):
    with pytest.raises(InputError) as raised:
        read(tmp_path, **changes)
    line = str(raised.value)
    assert message in line and line.startswith(f"{tmp_path}/ablation.yml: ") and "\n" not in line


BAD_VALUES = {
    "a count below one": ({"count": [0]}, r"ablate.count, 0: .*samples.count"),
    "a measure that is none": ({"similarity": ["rbff"]}, "ablate.similarity, rbff: .*choose from"),
    "a reference that is none": ({"reference": [7]}, "ablate.reference, 7: .*none of the 4 models"),
    "a unit that is none": (
        {"unit": ["layers.77"]},
        "ablate.unit, layers.77: .*not a unit of this",
    ),
    "one sample": ({"count": [1]}, "ablate.count, 1: one sample has no pairs"),
    "a sigma in words": ({"sigma": ["wide"]}, "ablate.sigma, wide: .*parameters.sigma"),
    "a third that is none": ({"merged_units": ["most"]}, "ablate.merged_units, most: .*'first'"),
}


@pytest.mark.parametrize(("ablate", "message"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_wrong_value_is_refused_before_anything_is_merged(ablate, message, monkeypatch):
    monkeypatch.chdir(ROOT)
    shipped = read_ablation(Path("configs/ablation.yml"))
    with pytest.raises(InputError, match=message):
        plan_ablation(
            shipped.model_copy(update={"ablate": {k: tuple(v) for k, v in ablate.items()}})
        )


def test_the_shipped_recipe_can_be_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    plan = plan_ablation(read_ablation(Path("configs/ablation.yml")))
    assert list(plan.axes) == list(AXES) and plan.left_out == []
    assert list(plan.runs)[:4] == ["newest", "base", "average", "own"]
    assert len(plan.runs) == 4 + sum(
        not each.in_recipe for values in plan.axes.values() for each in values
    )
    assert all(len(rows) == 64 for rows in plan.domains.values()) and len(plan.domains) > 2
