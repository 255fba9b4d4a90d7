"""A merge written as the Flax tree, over a mesh, holds what the one in safetensors holds."""

import json

import jax
import numpy as np
import pytest
import yaml

from recall_jax.checkpoint.folder import open_checkpoint
from recall_jax.checkpoint.orbax import load_orbax
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.plan import in_forward_order
from recall_jax.engine.pod.tree_writer import TreeWriter
from recall_jax.jobs.verify import verify
from recall_jax.models.config import read_architecture
from recall_jax.models.convert import to_flax
from recall_jax.parallel.mesh import make_mesh, parse_mesh

pytestmark = pytest.mark.eight_devices


def flat(tree):
    return {jax.tree_util.keystr(p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("mesh", [[], ["--mesh", "fsdp=2,tensor=4"]])
@pytest.mark.parametrize("kind", ["qwen2", "llama"])  # an untied head, and a tied one
def test_the_tree_is_the_model(recall, toys, tmp_path, kind, mesh):
    models = getattr(toys, kind)[:2]
    recipe = {"merge_method": "linear", "models": [{"model": model} for model in models]}
    recipe["parameters"] = {"weight": 0.5}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    assert recall("merge", tmp_path / "recipe.yml", tmp_path / "model").status == 0
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "tree", "--to", "orbax", *mesh)
    assert done.status == 0, done.err
    model = open_checkpoint(tmp_path / "model")
    arch = read_architecture(model.config)
    expected = flat(to_flax(arch, {name: model.read(name) for name in model.specs}))
    found = flat(load_orbax(tmp_path / "tree"))
    assert found.keys() == expected.keys()
    for path, leaf in found.items():
        assert leaf.dtype == expected[path].dtype
        np.testing.assert_array_equal(leaf, expected[path], err_msg=path)
    assert not verify(tmp_path / "tree").faults
    report = json.loads((tmp_path / "tree" / "recall_report.json").read_text())
    assert report["bytes"]["written"] == sum(leaf.nbytes for leaf in found.values())


def test_each_device_keeps_its_part_alone(toys, tmp_path):
    model = open_checkpoint(toys.qwen2[0])
    arch, mesh = read_architecture(model.config), make_mesh(parse_mesh("fsdp=8"))
    specs = in_forward_order(model.specs)
    with TreeWriter(tmp_path, arch, specs, mesh) as writer:
        for name in specs:
            elements = model.read(name).reshape(-1)
            for start in range(0, elements.size, 100):
                writer.write_piece(name, elements[start : start + 100])
        parts = [part for leaf in writer._kept.values() for part in leaf.values()]
        held = sum(part.nbytes for part in parts)
        repeated = model.read("model.embed_tokens.weight").dtype.itemsize * 0
    assert held + repeated <= 1.01 * sum(spec.nbytes for spec in specs.values())
    assert flat(load_orbax(tmp_path)).keys()


def test_a_tensor_left_out_is_our_fault(toys, tmp_path):
    model = open_checkpoint(toys.qwen2[0])
    arch = read_architecture(model.config)
    specs = {
        name: TensorSpec(s.dtype, s.shape) for name, s in in_forward_order(model.specs).items()
    }
    with (
        pytest.raises(ValueError, match="was never written"),
        TreeWriter(tmp_path, arch, specs, make_mesh({})),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (["--to", "gguf"], "a merge cannot be written to 'gguf': use huggingface or orbax"),
        (["--parts"], "--parts is for several processes: add --distributed, or leave it out"),
    ],
)
def test_what_cannot_be_is_refused(recall, toys, tmp_path, options, why):
    recipe = {"merge_method": "average", "models": [{"model": model} for model in toys.llama]}
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    done = recall("merge", tmp_path / "recipe.yml", tmp_path / "out", *options)
    assert (done.status, done.err) == (2, f"recall: {why}\n")
