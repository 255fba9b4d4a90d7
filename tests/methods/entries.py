"""Every merge method of the registry, three as a user would write them, and recipes for them."""

import json
from pathlib import Path

import numpy as np
from deep_models import write_model

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.engine.needs import Needs, Observation, never
from recall_jax.methods.registry import METHODS
from recall_jax.recipes.plugins import load_plugins
from recall_jax.recipes.recipe import make_recipe

OWN = sorted((Path(__file__).parent / "own").glob("*.py"))
load_plugins(OWN)
OWN_METHODS = {path.stem: METHODS.pop(path.stem) for path in OWN}  # of no other test
ENTRIES = METHODS | OWN_METHODS
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
GIVEN = {"weight": 1.0, "density": 0.5, "steps": 2}  # of the methods that have such a parameter


def write_models(template, folder, **sizes):
    """Four models of two layers in float32, the first of them the base."""
    return [
        str(write_model(template, folder / str(k), np.float32, seed=k, **{**SIZES, **sizes}))
        for k in range(4)
    ]


def write_labelled_rows(path):
    """Rows of a prompt and its completion, which serve methods that need no label too."""
    texts = ["abcdef", "hXYZ01 a", "f0f1", "gh a", "0101", "ZYX hg", "b", "aa bb"]
    lines = [json.dumps({"prompt": text, "completion": text[::-1]}) for text in texts]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def values_of_recipe(name, models, rows, base, **keys):
    """A recipe's values, with what the method declares that it needs."""
    method = ENTRIES[name]
    needs, known = method.needs, method.parameters.model_fields
    values = {
        "merge_method": name,
        "models": [{"model": model} for model in models],
        "parameters": {key: value for key, value in GIVEN.items() if key in known},
    }
    if needs.base:
        values["base_model"] = base
    if needs.samples == "newest":
        values["samples"] = {"data": rows, "count": 4}
    if needs.samples == "each":
        values["samples"] = {"count": 4}
        values["models"] = [{"model": model, "data": rows} for model in models]
        if needs.base:
            values["base_data"] = rows
    return values | keys


def recipe_of(name, models, rows, base, **keys):
    return make_recipe(values_of_recipe(name, models, rows, base, **keys))


def representatives():
    """The first method of each combination of needs."""
    first: dict[Needs, str] = {}
    for name, method in ENTRIES.items():
        first.setdefault(method.needs, name)
    return list(first.values())


def tensors(folder):
    model = open_checkpoint(str(folder))
    return {name: model.read(name) for name in model.specs}


SUMS = 2e-5  # of the largest element, where sums are taken in another order


def tolerance(needs):
    """Return how far a mesh may be from one device, as a share of a tensor's largest element.

    A solution with a Gram matrix multiplies the rounding of sums by its condition, which is some
    thousands for the few rows of these tests.
    """
    if Observation.LINEAR_INPUTS in needs.observes:
        return 1e-3
    return SUMS if needs.observes or needs.full_tensors is not never else 0.0


def assert_near(found, expected, near):
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for name, right in expected.items():
        largest = np.abs(right).max()
        np.testing.assert_allclose(found[name], right, rtol=0, atol=near * largest, err_msg=name)
