"""Where parameters live on a mesh: what their axes are, how these are cut, and which mesh fits."""

import math
from dataclasses import replace

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from recall_jax.errors import InputError
from recall_jax.models.architecture import LAYERS, Architecture, Rope
from recall_jax.models.axes import HEADS, HIDDEN, MLP, VOCAB, logical_axes, tensor_axes
from recall_jax.models.convert import tensor_shapes
from recall_jax.models.forward import init_params
from recall_jax.parallel.mesh import (
    AXES,
    choose_mesh,
    format_mesh,
    gathered,
    make_mesh,
    parameter_shardings,
    parse_mesh,
    partition_spec,
)
from recall_jax.training.optimizer import adamw
from recall_jax.training.step import init_state

pytestmark = pytest.mark.eight_devices

BARE = Architecture(
    family="llama",
    vocab_size=37,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=5,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=6,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=False,
    rope=Rope(),
    windows=(None,) * 5,
)
LENGTHS = {LAYERS: {5}, VOCAB: {37}, HIDDEN: {16}, MLP: {24}, HEADS: {36, 18}, None: {6}}
MODELS = {
    "llama": replace(BARE, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral": replace(BARE, family="mistral"),
    "qwen2": replace(BARE, family="qwen2", qkv_bias=True, tie_word_embeddings=True),
    "qwen3": replace(BARE, family="qwen3", qk_norm=True),
}


def mesh_of(data=1, fsdp=1, tensor=1):
    return AbstractMesh((1, data, fsdp, tensor), AXES)


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_decoder_has_the_axes_of_its_dimensions(name):
    arch = MODELS[name]
    tree = jax.eval_shape(lambda: init_params(arch, jax.random.key(0)))
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        keys = [key.key for key in path]
        axes = found[tuple(keys)] = logical_axes(keys)
        assert len(axes) == leaf.ndim, keys
        assert all(size in LENGTHS[axis] for size, axis in zip(leaf.shape, axes, strict=True)), keys
    assert found["layers", "self_attn", "o_proj", "kernel"] == (LAYERS, HEADS, HIDDEN)
    for name, shape in tensor_shapes(arch).items():
        axes = tensor_axes(arch.family, name)
        assert all(size in LENGTHS[axis] for size, axis in zip(shape, axes, strict=True)), name


def test_what_is_laid_out_as_parameters_is_cut_as_they_are():
    params = jax.eval_shape(lambda: init_params(MODELS["llama"], jax.random.key(0)))
    state = jax.eval_shape(lambda tree: init_state(tree, adamw(lambda step: step)), params)
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    own, found = parameter_shardings(params, mesh), parameter_shardings(state, mesh)
    adam = next(part for part in found.optimizer_state if hasattr(part, "mu"))
    assert found.trainable == adam.mu == adam.nu == own
    assert adam.count.spec == found.step.spec == P()
    flat = {"layers": {"self_attn/q_proj/kernel": np.zeros((5, 16, 36))}, "strength": np.zeros(8)}
    specs = jax.tree.map(lambda sharding: sharding.spec, parameter_shardings(flat, mesh))
    assert specs == {
        "layers": {"self_attn/q_proj/kernel": P(None, "fsdp", "tensor")},
        "strength": P(),
    }


@pytest.mark.parametrize(
    ("axes", "shape", "sizes", "spec"),
    [
        ((VOCAB, HIDDEN), (64, 16), (2, 2), P("tensor", "fsdp")),
        ((VOCAB, HIDDEN), (37, 16), (2, 2), P(None, ("fsdp", "tensor"))),  # the vocabulary is odd
        ((HIDDEN, HEADS), (16, 21), (2, 2), P(("fsdp", "tensor"), None)),
        ((HEADS, HIDDEN), (24, 9), (2, 4), P(("tensor", "fsdp"), None)),
        ((HEADS, HIDDEN), (12, 9), (2, 4), P("tensor", None)),  # and no room for another
        ((HEADS, HIDDEN), (24, 9), (3, 4), P("tensor", "fsdp")),
        # tensor has its own dimension before fsdp has any other
        ((HIDDEN, MLP), (7, 8), (2, 8), P(None, "tensor")),
        ((LAYERS, HIDDEN, MLP), (8, 7, 5), (2, 2), P(None, None, None)),  # layers stay whole
        ((LAYERS, None), (8, 6), (2, 2), P(None, None)),
        ((HEADS,), (18,), (4, 2), P("tensor")),
        ((HIDDEN,), (16,), (1, 8), P(None)),
    ],
)
def test_an_axis_that_does_not_divide_its_dimension_cuts_another(axes, shape, sizes, spec):
    fsdp, tensor = sizes
    assert partition_spec(axes, shape, mesh_of(2, fsdp, tensor)) == spec


shapes = st.lists(
    st.tuples(st.sampled_from([VOCAB, HEADS, MLP, HIDDEN, LAYERS, None]), st.integers(1, 96)),
    max_size=4,
)
sizes = st.sampled_from([1, 2, 3, 4, 8])


@given(shapes, sizes, sizes, sizes)
def test_whatever_the_shape_it_is_cut_evenly_and_by_each_axis_once(dimensions, data, fsdp, tensor):
    axes, shape = (tuple(each[i] for each in dimensions) for i in (0, 1))
    mesh = mesh_of(data, fsdp, tensor)
    cuts = [by if isinstance(by, tuple) else (by,) for by in partition_spec(axes, shape, mesh)]
    names = [[name for name in by if name is not None] for by in cuts]
    parts = [math.prod(mesh.shape[name] for name in by) for by in names]
    assert all(length % n == 0 for length, n in zip(shape, parts, strict=True))
    used = [name for by in names for name in by]
    assert len(used) == len(set(used)) and set(used) <= {"fsdp", "tensor"}
    assert not any(by for by, axis in zip(names, axes, strict=True) if axis in (LAYERS, None))


@given(shapes, st.permutations(range(8)))
def test_the_order_of_the_devices_changes_no_rule(dimensions, order):
    axes, shape = (tuple(each[i] for each in dimensions) for i in (0, 1))
    straight = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    mixed = Mesh(straight.devices.reshape(-1)[list(order)].reshape(1, 2, 2, 2), AXES)
    assert partition_spec(axes, shape, mixed) == partition_spec(axes, shape, straight)


def test_what_is_gathered_stays_cut_by_tensor_alone():
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,tensor=2"))
    tree = {"embedding": np.arange(37 * 16.0, dtype=np.float32).reshape(37, 16), "x": np.ones(2)}
    tree |= {"scale": np.ones(16, np.float32)}
    found = jax.jit(lambda tree: gathered(tree, mesh))(tree)
    np.testing.assert_array_equal(found["embedding"], tree["embedding"])
    shards = {name: array.sharding.shard_shape(array.shape) for name, array in found.items()}
    assert shards == {"embedding": (37, 8), "scale": (16,), "x": (2,)}


@pytest.mark.parametrize(
    ("asked", "sizes"),
    [
        # (devices, parameters, gathered, memory, rows): data, fsdp, tensor
        ((1, 10, 4, 10, 8), (1, 1, 1)),
        ((8, 10, 4, 10, 8), (8, 1, 1)),  # a copy on each
        ((8, 10, 4, 9, 8), (4, 2, 1)),  # 10 / 2 + 4
        ((8, 10, 4, 6, 8), (1, 8, 1)),  # 10 / 4 + 4 is too much
        ((8, 10, 4, 5, 8), (4, 1, 2)),  # 10 / 8 + 4 too
        ((8, 10, 4, 4, 8), (1, 4, 2)),  # 10 / 8 + 4 / 2
        ((8, 10, 4, 10, 4), (4, 1, 2)),  # rows for four alone
        ((8, 10, 4, 10, 1), (1, 1, 8)),
        ((6, 10, 4, 8, 5), (3, 1, 2)),
        ((7, 10, 4, 6, 8), (1, 7, 1)),
    ],
)
def test_the_mesh_that_is_chosen(asked, sizes):
    devices, parameters, held, memory, rows = asked
    found = choose_mesh(devices, parameters=parameters, gathered=held, memory=memory, rows=rows)
    assert found == dict(zip(AXES, (1, *sizes), strict=True))


@given(*[st.integers(1, 64)] * 2, st.integers(0, 64), *[st.integers(1, 64)] * 2)
def test_a_chosen_mesh_fits_and_none_has_less_tensor_or_then_fsdp(
    devices, parameters, gathered, memory, rows
):
    def fits(tensor, fsdp):
        if devices % (tensor * fsdp) or devices // tensor > rows:
            return False
        held = parameters / (tensor * fsdp) + (gathered / tensor if fsdp > 1 else 0)
        return held <= memory

    smaller = ((t, f) for t in range(1, devices + 1) for f in range(1, devices + 1) if fits(t, f))
    best = min(smaller, default=None)
    limits = {"parameters": parameters, "gathered": gathered, "memory": memory, "rows": rows}
    if best is None:
        with pytest.raises(InputError, match=f"^{devices} devices with .* whatever the mesh"):
            choose_mesh(devices, **limits)
    else:
        found = choose_mesh(devices, **limits)
        assert (found["tensor"], found["fsdp"]) == best
        assert math.prod(found.values()) == devices and found["model"] == 1


def test_a_mesh_is_read_and_said():
    sizes = parse_mesh(" fsdp = 4 ,data=2")
    assert sizes == {"model": 1, "data": 2, "fsdp": 4, "tensor": 1}
    assert format_mesh(sizes) == "data=2,fsdp=4,tensor=1"
    assert parse_mesh(format_mesh(sizes | {"model": 2})) == sizes | {"model": 2}
    mesh = make_mesh({"tensor": 4})
    assert (mesh.axis_names, dict(mesh.shape)) == (AXES, parse_mesh("tensor=4"))


@pytest.mark.parametrize(
    "text",
    ["fsdp", "data=0", "data=2,expert=4", "data=two", "data=2,data=4", "", "auto", "data=2,"],
)
def test_a_mesh_that_is_none_is_refused_in_a_line(text):
    with pytest.raises(InputError, match=r"write it such as data=2,fsdp=4,tensor=1$") as error:
        parse_mesh(text)
    assert "\n" not in str(error.value)


def test_a_mesh_larger_than_the_machine_is_refused():
    with pytest.raises(InputError, match=r"fsdp=4,tensor=1 needs 16 devices; there are 8"):
        make_mesh(parse_mesh("data=4,fsdp=4"))
