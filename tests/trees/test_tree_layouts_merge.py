"""The same weights in the layouts of Linen, MaxText and NNX merge to the same numbers."""

import json

import jax
import numpy as np
import orbax.checkpoint as orbax_v0
import pytest
from flax import nnx
from orbax.checkpoint import v1 as ocp
from tree_layouts import FORWARD, TREE, UNITS, Nnx, maxtext, plain, save_models, weights

from recall_jax.checkpoint.orbax import load_orbax
from recall_jax.jobs.trees.on_disk import merge_trees_on_disk
from recall_jax.recipes.recipe import make_recipe


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return {layout: save_models(folder, layout) for layout in TREE}


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rng = np.random.default_rng(5)
    lines = [
        json.dumps({"input_ids": rng.integers(0, 23, size=int(n)).tolist()})
        for n in rng.integers(3, 12, size=17)
    ]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def merge(out, layout, names, mesh=None, **keys):
    entries = [name if isinstance(name, dict) else {"model": name} for name in names]
    recipe = make_recipe({"models": entries, "tree": TREE[layout], **keys})
    report = merge_trees_on_disk(recipe, out, mesh=mesh)
    return plain(layout, load_orbax(out)), report


def assert_equal(first, second):
    assert first.keys() == second.keys()
    for name, array in first.items():
        assert array.dtype == second[name].dtype
        np.testing.assert_array_equal(array, second[name], err_msg=name)


WEIGHTS = [0.7, [0.1, 0.9, 0.2], [{"filter": "mlp", "value": 0.3}, {"filter": "*", "value": 0.6}]]


@pytest.mark.parametrize("method", ["linear", "ties"])
def test_layouts_merge_alike_by_a_recipe(method, models, tmp_path):
    found = {}
    for layout, names in models.items():
        keys = {"parameters": {"density": 0.4, "lambda": [0.5, 1.0]}, "base_model": names[0]}
        entries = [
            {"model": name, "parameters": {"weight": weight}}
            for name, weight in zip(names, WEIGHTS, strict=True)
        ]
        found[layout], report = merge(
            tmp_path / layout,
            layout,
            entries,
            merge_method=method,
            **(keys if method == "ties" else {}),
        )
        assert report["units"] == UNITS
    assert_equal(found["linen"], found["maxtext"])
    assert_equal(found["linen"], found["nnx"])


def test_layouts_merge_alike_by_recall(models, rows, tmp_path):
    found, reports = {}, {}
    for layout, names in models.items():
        found[layout], reports[layout] = merge(
            tmp_path / layout,
            layout,
            names,
            merge_method="recall",
            forward=FORWARD[layout],
            samples={"data": rows, "count": 5},
        )
    for layout in ("maxtext", "nnx"):
        first, second = reports["linen"], reports[layout]
        assert first["typical_samples"] == second["typical_samples"]
        for key in ("weights", "similarity", "sigma"):
            np.testing.assert_allclose(first[key], second[key], rtol=1e-5, atol=1e-6)
        for name, array in found["linen"].items():
            np.testing.assert_allclose(array, found[layout][name], rtol=1e-5, atol=1e-6)
    weights = np.asarray(reports["linen"]["weights"])
    assert weights.shape == (3, len(UNITS))
    assert np.ptp(weights[-1]) > 0.01, "weights differ over the units, or nothing is tested"


def test_a_mesh_changes_nothing(models, rows, tmp_path):
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    keys = {
        "merge_method": "recall",
        "forward": FORWARD["maxtext"],
        "samples": {"data": rows, "count": 5},
    }
    names = models["maxtext"]
    alone, report = merge(tmp_path / "alone", "maxtext", names, **keys)
    spread, same = merge(tmp_path / "spread", "maxtext", names, mesh=mesh, **keys)
    np.testing.assert_allclose(report["weights"], same["weights"], rtol=1e-6)
    for name, array in alone.items():
        np.testing.assert_allclose(array, spread[name], rtol=1e-6, atol=1e-7)


def test_what_is_no_parameter_is_the_newest_model_s(models, tmp_path):
    merge(tmp_path / "out", "maxtext", models["maxtext"], merge_method="average")
    merged, newest = load_orbax(tmp_path / "out"), maxtext(weights(2))
    assert jax.tree.structure(merged) == jax.tree.structure(newest)
    assert int(merged["step"]) == 41
    for key in ("opt_state", "step"):
        jax.tree.map(np.testing.assert_array_equal, merged[key], newest[key])


def test_nnx_takes_its_merged_state_back(models, tmp_path):
    merged, _ = merge(tmp_path / "out", "nnx", models["nnx"], merge_method="average")
    graph, abstract = nnx.split(nnx.eval_shape(lambda: Nnx(nnx.Rngs(0))))
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), abstract
    )
    model = nnx.merge(graph, ocp.load(tmp_path / "out" / "tree", abstract))
    np.testing.assert_array_equal(model.layers[1].mlp.wi.kernel[...], merged["1.wi"])


def test_older_readers_of_orbax_take_it_too(models, tmp_path):
    """As MaxText reads parameters: the folder of the tree, by the older interface."""
    with orbax_v0.CheckpointManager(tmp_path / "run") as manager:
        save = orbax_v0.args.StandardSave(maxtext(weights(1)))
        manager.save(0, args=orbax_v0.args.Composite(items=save))
    names = [models["maxtext"][0], str(tmp_path / "run" / "0" / "items")]
    merge(tmp_path / "out", "maxtext", names, merge_method="average")
    arguments = orbax_v0.checkpoint_utils.construct_restore_args(maxtext(weights(1)))
    with orbax_v0.PyTreeCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "out" / "tree" / "items", restore_args=arguments)
    assert_equal(plain("maxtext", restored), plain("maxtext", load_orbax(tmp_path / "out")))
