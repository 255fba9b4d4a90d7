"""Recipes of task vectors from file to file, against float64: values by tensor, seeds, reports."""

import re

import float64_merges as float64
import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from toys import LAYERS, copy_model

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.errors import InputError
from recall_jax.jobs import merge as job
from recall_jax.recipes.recipe import make_recipe, read_recipe


def tensors(folder):
    model = open_checkpoint(folder)
    return {name: model.read(name) for name in model.specs}


def merged(toys, out, method, parameters, *own, **more):
    models = [{"model": m, "parameters": p} for m, p in zip(toys.qwen2[1:], own, strict=True)]
    values = {
        "merge_method": method,
        "base_model": toys.qwen2[0],
        "models": [{"model": toys.qwen2[0]}, *models],  # mergekit's recipes list the base too
        "parameters": parameters,
        "out_dtype": "float32",
        **more,
    }
    return job.merge(make_recipe(values), out)


def depth_of(name):
    if match := re.search(r"layers\.(\d+)\.", name):
        return int(match[1]) / (LAYERS - 1)
    return 0.0 if "embed" in name else 1.0


def assert_each(toys, out, expected):
    """Each tensor in OUT is `expected(name, models, base)`, in float64."""
    base, *models = [
        {name: array.astype(np.float64) for name, array in tensors(model).items()}
        for model in toys.qwen2
    ]
    found = tensors(out)
    assert found.keys() == base.keys()
    for name, array in found.items():
        wanted = expected(name, [model[name] for model in models], base[name])
        np.testing.assert_allclose(array, wanted, rtol=0, atol=1e-6, err_msg=name)


def test_task_arithmetic_with_gradients_and_filters_and_what_it_reports(toys, tmp_path):
    filters = [{"filter": "mlp", "value": 0.25}, {"value": [1.0, 0.5]}]
    report = merged(
        toys,
        tmp_path / "out",
        "task_arithmetic",
        {"lambda": [0.5, 1.0], "weight": 0.75, "normalize": True, "density": 0.5},
        {"weight": filters},
        {},
    )

    def weights_and_lambda(name):
        depth = depth_of(name)
        return [0.25 if "mlp" in name else 1 - depth / 2, 0.75], 0.5 + depth / 2

    def expected(name, models, base):
        return float64.task_arithmetic(models, base, *weights_and_lambda(name), normalize=True)

    assert_each(toys, tmp_path / "out", expected)
    weights, lambda_ = weights_and_lambda("model.embed_tokens.weight")
    effective = lambda_ * np.asarray(weights) / sum(weights)
    np.testing.assert_allclose([row[0] for row in report["weights"]], effective, rtol=1e-6)
    assert report["models"] == toys.qwen2[1:] and report["base_model"] == toys.qwen2[0]


def test_ties_by_its_own_recipe_again(toys, tmp_path):
    own = {"weight": 0.5, "density": [0.3, 0.6]}, {"weight": 1.0}
    merged(toys, tmp_path / "out", "ties", {"density": 0.5, "lambda": 0.75}, *own)

    def expected(name, models, base):
        densities = [0.3 + 0.3 * depth_of(name), 0.5]
        return float64.ties(models, base, [0.5, 1.0], densities, 0.75)

    assert_each(toys, tmp_path / "out", expected)
    recipe = read_recipe(tmp_path / "out" / "recall_recipe.yml")
    assert recipe.model_dump(mode="json")["parameters"]["lambda"] == 0.75
    job.merge(recipe, tmp_path / "again")
    again, weights = tmp_path / "again", "model.safetensors"
    assert (again / weights).read_bytes() == (tmp_path / "out" / weights).read_bytes()


def test_dare_draws_by_the_seed_the_tensor_and_the_model(toys, tmp_path):
    outs = {}
    for name, seed in (("one", 3), ("same", 3), ("other", 4)):
        parameters = {"density": 0.5, "rescale": False, "seed": seed}
        own = {"weight": 1.0}, {"weight": 0.0}
        merged(toys, tmp_path / name, "dare_linear", parameters, *own)
        outs[name] = tensors(tmp_path / name)
    base, model = tensors(toys.qwen2[0]), tensors(toys.qwen2[1])
    shares, kept = [], {}
    for name, array in outs["one"].items():
        assert array.tobytes() == outs["same"][name].tobytes()
        moved = base[name].astype(np.float32) != model[name].astype(np.float32)
        kept[name] = (array != base[name].astype(np.float32))[moved]
        if kept[name].size > 500:
            other = (outs["other"][name] != base[name].astype(np.float32))[moved]
            shares += [kept[name].mean(), (kept[name] == other).mean()]
    np.testing.assert_allclose(shares, 0.5, atol=0.1)
    alike = [kept[f"model.layers.{i}.mlp.up_proj.weight"] for i in (0, 1)]
    same_length = min(map(len, alike))
    assert abs((alike[0][:same_length] == alike[1][:same_length]).mean() - 0.5) < 0.1


def test_the_weights_of_an_earlier_comparison(toys, tmp_path):
    """Those of each unit, as RECALL's report holds them, in place of the recipe's."""
    weights = zip(toys.qwen2[1:], (1, [1, 3]), strict=True)
    models = [{"model": model, "parameters": {"weight": weight}} for model, weight in weights]
    job.merge(make_recipe({"merge_method": "linear", "models": models}), tmp_path / "linear")
    own = {"weight": 5.0, "density": 0.5}, {"density": 0.5}
    report = merged(
        toys,
        tmp_path / "out",
        "task_arithmetic",
        {"lambda": 0.8},
        *own,
        weights=str(tmp_path / "linear" / "recall_report.json"),
    )
    shares = {}
    for name in tensors(toys.qwen2[0]):
        second = 1 + 2 * depth_of(name)
        shares[name] = [1 / (1 + second), second / (1 + second)]

    def expected(name, models, base):
        return float64.task_arithmetic(models, base, shares[name], 0.8)

    assert_each(toys, tmp_path / "out", expected)
    np.testing.assert_allclose([row[0] for row in report["weights"]], [0.4, 0.4], rtol=1e-6)


def test_magmax(toys, tmp_path):
    merged(toys, tmp_path / "out", "magmax", {"lambda": 0.5}, {}, {})
    assert_each(toys, tmp_path / "out", lambda name, *both: float64.magmax(*both, 0.5))


def test_opcm_scales_the_whole_model_and_projects_linear_layers_alone(toys, tmp_path):
    merged(toys, tmp_path / "out", "opcm", {"alpha": 0.3}, {}, {})
    base, *models = [
        {name: array.astype(np.float64) for name, array in tensors(model).items()}
        for model in toys.qwen2
    ]
    # What is no matrix is added as it stands; so are embeddings.
    flat = [
        {n: a.ravel() if "embed" in n else a for n, a in model.items()} for model in (base, *models)
    ]
    expected, _ = float64.opcm(flat[1:], flat[0], 0.3)
    assert_each(toys, tmp_path / "out", lambda name, _, b: expected[name].reshape(b.shape))


@pytest.mark.parametrize(
    ("parameters", "own", "message"),
    [
        ({"density": 30}, {"weight": 1}, "parameters.density: should be a share from 0 to 1"),
        ({}, {"weight": 1, "density": [0, 2]}, "models.1.parameters.density: should be a share"),
        ({"lamda": 1}, {"weight": 1}, "unknown key parameters.lamda; did you mean lambda?"),
        ({"rescale": "density"}, {"weight": 1}, "parameters.rescale should be"),
        ({}, {}, "has no weight for"),
    ],
)
def test_what_cannot_be_meant(parameters, own, message, toys, tmp_path):
    with pytest.raises(InputError) as raised:
        merged(toys, tmp_path / "out", "ties", parameters, own, {"weight": 1.0})
    assert message in str(raised.value)


@pytest.mark.parametrize("method", ["ties", "dare_linear", "dare_ties", "opcm"])
def test_nan_is_told_where_it_is_and_never_dropped(method, toys, tmp_path):
    broken = copy_model(toys.qwen2[1], tmp_path / "broken")
    name = "model.layers.1.mlp.up_proj.weight"
    weights = load_file(broken / "model.safetensors")
    weights[name][3, 4] = float("nan")
    save_file(weights, broken / "model.safetensors")
    values = {
        "merge_method": method,
        "base_model": toys.qwen2[0],
        "models": [{"model": str(broken)}, {"model": toys.qwen2[2]}],
        "parameters": {} if method == "opcm" else {"weight": 1.0, "density": 0.1},
    }
    with pytest.raises(InputError, match=f"broken: tensor {name} holds NaN"):
        job.merge(make_recipe(values), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]
