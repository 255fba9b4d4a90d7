"""Merging trees: any pytree, per-layer or stacked leaves, and each misfit by its leaf's name."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from flax.core import freeze
from hypothesis import given
from hypothesis import strategies as st
from jax.tree_util import DictKey, GetAttrKey, SequenceKey

from recall_jax.errors import InputError
from recall_jax.jobs.trees.merge_trees import merge_trees, unit_of_path

L = 3
UNITS = L + 2
STACKED = {"first": ("stacked", 0, 1), "last": ("stacked", -1, "layers.0")}


def weights_of(num_models=3, num_units=UNITS, seed=0):
    raw = np.random.default_rng(seed).uniform(0.1, 1, (num_models, num_units))
    return (raw / raw.sum(axis=0)).astype(np.float32)


def stacked_tree(seed):
    """Layers stacked on the first axis of one leaf and the last of another."""
    rng = np.random.default_rng(seed)

    def normal(*shape, dtype=np.float32):
        return rng.standard_normal(shape).astype(dtype)

    return {
        "embed": {"embedding": normal(11, 6, dtype=ml_dtypes.bfloat16)},
        "layers": {"first": normal(L, 6, 5), "last": normal(6, L, dtype=np.float16)},
        "head": [normal(6), {"kernel": normal(6, 11)}],
    }


def per_layer_tree(stacked):
    first, last = stacked["layers"]["first"], stacked["layers"]["last"]
    layers = {f"layers_{i}": {"first": first[i], "last": last[..., i]} for i in range(L)}
    return {"embed": stacked["embed"], **layers, "head": stacked["head"]}


def unit_of_stacked(path):
    names = [key.key for key in path if isinstance(key, DictKey)]
    return STACKED[names[1]] if names[0] == "layers" else names[0]


def expected_leaf(leaves, weights, reference=-1):
    """theta_N + sum of w_k (theta_k - theta_N) in float64."""
    wide = [np.asarray(leaf, np.float64) for leaf in leaves]
    anchor = wide[reference]
    return anchor + sum(w * (leaf - anchor) for w, leaf in zip(weights, wide, strict=True))


def assert_same(tree, other):
    """Structure, dtypes and every bit."""
    chex.assert_trees_all_equal_shapes_and_dtypes(tree, other)
    for one, two in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(one).tobytes(), np.asarray(two).tobytes())


def test_each_leaf_with_the_weights_of_its_unit():
    trees = [per_layer_tree(stacked_tree(seed)) for seed in range(3)]
    weights = weights_of()
    merged = merge_trees(trees, weights, unit_of=unit_of_path, reference=1)
    assert jax.tree.structure(merged) == jax.tree.structure(trees[0])
    columns = {"embed": 0, **{f"layers_{i}": i + 1 for i in range(L)}, "head": UNITS - 1}
    for name, unit in columns.items():
        parts = zip(*(jax.tree.leaves(tree[name]) for tree in trees), strict=True)
        for leaf, leaves in zip(jax.tree.leaves(merged[name]), parts, strict=True):
            assert isinstance(leaf, jax.Array) and leaf.dtype == leaves[0].dtype
            tolerance = {2: 1e-2, 4: 1e-6}[leaf.dtype.itemsize]
            expected = expected_leaf(leaves, weights[:, unit])
            np.testing.assert_allclose(np.asarray(leaf, np.float64), expected, atol=tolerance)


@given(st.integers(0, 2**32 - 1), st.integers(-3, 2))
def test_stacked_layers_merge_as_layers_one_by_one(seed, reference):
    trees = [stacked_tree(seed + k) for k in range(3)]
    weights = weights_of(seed=seed)
    options = {"reference": reference}
    stacked = merge_trees(trees, weights, unit_of=unit_of_stacked, **options)
    apart = merge_trees(
        [per_layer_tree(tree) for tree in trees], weights, unit_of=unit_of_path, **options
    )
    assert_same(per_layer_tree(stacked), apart)


def test_identical_trees_merge_to_themselves():
    tree = stacked_tree(0)
    tree["layers"]["first"][0] = -0.0
    tree["layers"]["last"][:2] = np.float16(6e-8)  # subnormal
    for reference in (-1, 0):
        merged = merge_trees([tree] * 3, weights_of(), unit_of=unit_of_stacked, reference=reference)
        assert_same(merged, tree)


def test_numpy_and_jax_leaves_in_tuples_lists_and_none():
    trees = [
        (np.full(2, k, np.float32), [jnp.full((), k, jnp.bfloat16), None], {"scale": float(k)})
        for k in range(2)
    ]
    weights = np.float32([[0.25, 0.75], [0.75, 0.25]])
    merged = merge_trees(trees, weights, unit_of=lambda path: 1 if path[0].idx else 0)
    np.testing.assert_array_equal(merged[0], [0.75, 0.75])
    assert merged[1][0].dtype == jnp.bfloat16 and merged[1][0] == 0.25 and merged[1][1] is None
    assert merged[2]["scale"] == 0.25
    chex.assert_trees_all_equal_structs(merged, trees[0])


def test_the_dtype_is_the_references():
    kinds = (np.float32, ml_dtypes.bfloat16, np.float16)
    trees = [{"w": np.full(3, k, kind)} for k, kind in enumerate(kinds)]
    weights = np.full((3, 1), 1 / 3, np.float32)
    for reference, kind in enumerate(kinds):
        merged = merge_trees(trees, weights, unit_of=lambda path: 0, reference=reference)
        assert merged["w"].dtype == kind
        np.testing.assert_allclose(np.asarray(merged["w"], np.float32), 1, rtol=1e-2)


def test_what_is_not_floating_point_is_the_references():
    trees = [
        {"step": np.int32(k), "flag": np.array([k > 0]), "key": jax.random.key(k), "w": np.ones(2)}
        for k in range(3)
    ]
    merged = merge_trees(trees, weights_of(num_units=1), unit_of=lambda path: 0, reference=1)
    assert merged["step"] == 1 and merged["flag"].all()
    assert merged["key"] == jax.random.key(1)


def test_integers_beside_floats_are_refused():
    trees = [{"w": np.ones(2, kind)} for kind in (np.float32, np.float32, np.int8)]
    for reference in range(3):
        with pytest.raises(InputError, match=r"'w'.* is float32 in tree 0 and int8 in tree 2"):
            merge_trees(trees, weights_of(num_units=1), unit_of=lambda path: 0, reference=reference)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, ids):
        hidden = nn.Embed(7, 4)(ids)
        for _ in range(L):
            hidden = hidden + Block()(hidden)
        return nn.Dense(7, name="lm_head")(nn.LayerNorm()(hidden))


class Block(nn.Module):
    @nn.compact
    def __call__(self, hidden):
        return nn.Dense(4)(nn.LayerNorm()(hidden))


@pytest.mark.parametrize("frozen", [False, True])
def test_linen_parameters(frozen):
    keys = [jax.random.key(seed, impl="rbg") for seed in range(2)]
    trees = [Decoder().init(key, np.zeros((1, 3), np.int32)) for key in keys]
    trees = [freeze(tree) if frozen else tree for tree in trees]
    weights = weights_of(2)
    merged = merge_trees(trees, weights, unit_of=unit_of_path)
    assert type(merged) is type(trees[0])
    places = {"Embed_0": 0, **{f"Block_{i}": i + 1 for i in range(L)}}
    places |= {"LayerNorm_0": UNITS - 1, "lm_head": UNITS - 1}
    assert set(merged["params"]) == set(places)
    for name, unit in places.items():
        parts = [jax.tree.leaves(tree["params"][name]) for tree in (*trees, merged)]
        for *leaves, leaf in zip(*parts, strict=True):
            np.testing.assert_allclose(leaf, expected_leaf(leaves, weights[:, unit]), atol=1e-6)
    Decoder().apply(merged, np.zeros((1, 3), np.int32))


class Network(nnx.Module):
    def __init__(self, rngs):
        self.embed = nnx.Embed(5, 4, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(L)])
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)

    def __call__(self, ids):
        hidden = self.embed(ids)
        for layer in self.layers:
            hidden = self.dropout(jax.nn.relu(layer(hidden)))
        return self.norm(hidden)


def test_nnx_state():
    networks = [Network(nnx.Rngs(seed)) for seed in range(3)]
    graph, _ = nnx.split(networks[0])
    states = [nnx.state(network) for network in networks]
    weights = weights_of()
    state = merge_trees(states, weights, unit_of=unit_of_path, reference=1)
    assert isinstance(state, nnx.State)
    merged = nnx.merge(graph, state)
    for unit, get in enumerate(
        [lambda n: n.embed.embedding, *(lambda n, i=i: n.layers[i].kernel for i in range(L))]
    ):
        leaves = [np.asarray(get(network)[...]) for network in networks]
        expected = expected_leaf(leaves, weights[:, unit])
        np.testing.assert_allclose(get(merged)[...], expected, atol=1e-6)
    # Random state is the reference's.
    assert merged.dropout.rngs.key[...] == networks[1].dropout.rngs.key[...]
    assert merged(np.zeros((2,), np.int32)).shape == (2, 4)


@pytest.mark.parametrize(
    ("path", "unit"),
    [
        ("embed.kernel", "embed"),
        ("params.Embed_0.embedding", "embed"),
        ("model.embed_tokens.weight", "embed"),
        ("token_embed.embedding", "embed"),
        ("pos_embedding", "embed"),
        ("transformer.wte.weight", "embed"),
        ("layers_3.mlp.kernel", "layers.3"),
        ("layers.3.mlp.kernel", "layers.3"),
        ("model.layers.12.input_layernorm.weight", "layers.12"),
        ("params.Block_0.Dense_1.kernel", "layers.0"),
        ("params.TransformerBlock_11.scale", "layers.11"),
        ("encoder.layer_2.w", "layers.2"),
        ("h.4.attn.w", "layers.4"),
        ("h_4.attn.w", "layers.4"),
        ("blocks.5.embed_norm.scale", "layers.5"),
        ("path_3.w", "head"),
        ("unembed.kernel", "head"),
        ("LayerNorm_0.scale", "head"),
        ("lm_head.kernel", "head"),
        ("norm", "head"),
    ],
)
def test_units_by_the_names_on_a_path(path, unit):
    keys = [int(name) if name.isdigit() else name for name in path.split(".")]
    assert unit_of_path(tuple(map(DictKey, keys))) == unit
    mixed = [SequenceKey(key) if isinstance(key, int) else GetAttrKey(key) for key in keys]
    assert unit_of_path(tuple(mixed)) == unit


TREE = {"a": {"b": np.ones((2, 3), np.float32)}}
LEAF = r"\['a'\]\['b'\]"


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        ("layers.3", f"unit_of gave 'layers.3' for {LEAF}, which is none of the 5 units"),
        ("layers.x", f"unit_of gave 'layers.x' for {LEAF}"),
        ("norm", f"unit_of gave 'norm' for {LEAF}"),
        (5, f"unit_of gave 5 for {LEAF}, which is none of the 5 units"),
        (-1, f"unit_of gave -1 for {LEAF}"),
        (None, f"unit_of gave None for {LEAF}"),
        (1.5, f"unit_of gave 1.5 for {LEAF}"),
        (True, f"unit_of gave True for {LEAF}"),
        (("stacked", 0), rf"unit_of gave .* for {LEAF}: give \(\"stacked\", axis, first_unit\)"),
        (("rows", 0, 1), f"unit_of gave .* for {LEAF}: give"),
        (("stacked", 2, 1), rf"{LEAF} of shape \(2, 3\) has no axis 2"),
        (("stacked", None, 1), rf"{LEAF} of shape \(2, 3\) has no axis None"),
        (("stacked", 1, 3), f"{LEAF} stacks 3 units from unit 3 on, but the weights have 5 units"),
        (("stacked", 0, "layers.7"), f"unit_of gave 'layers.7' for {LEAF}"),
    ],
)
def test_a_unit_that_does_not_fit_is_named_with_its_leaf(unit, message):
    with pytest.raises(InputError, match=message):
        merge_trees([TREE] * 3, weights_of(), unit_of=lambda path: unit)


def test_a_number_has_no_axis_to_stack_units_on():
    with pytest.raises(InputError, match=r"\['s'\] of shape \(\) has no axis 0"):
        merge_trees(
            [{"s": np.float32(1)}] * 3, weights_of(), unit_of=lambda path: ("stacked", 0, 1)
        )


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"a": {"c": np.ones((2, 3), np.float32)}},
            r"tree 1 is built unlike .* only in tree 0 \[.*'b'.*\], only in tree 1 \[.*'c'.*\]",
        ),
        ({"a": {**TREE["a"], "c": np.ones(1)}}, r"only in tree 0 \[\], only in tree 1 \[.*'c'.*\]"),
        (freeze(TREE), "tree 1 is built unlike tree 0: same leaves, other containers"),
        (
            {"a": {"b": np.ones((3, 2), np.float32)}},
            rf"{LEAF} has shape \(2, 3\) in tree 0 and \(3, 2\) in tree 1",
        ),
    ],
)
def test_trees_that_do_not_fit(other, message):
    with pytest.raises(InputError, match=message) as caught:
        merge_trees([TREE, other, TREE], weights_of(), unit_of=lambda path: 0)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (weights_of(2), r"weights have shape \(2, 5\), but there are 3 models: give \(K, U\)"),
        (weights_of()[:, 0], r"weights have shape \(3,\)"),
        (weights_of() * 1.01, "must sum to 1 over the models in every unit"),
        (np.full((3, 5), np.nan), "hold NaN or infinity"),
        (np.array([[np.inf], [-np.inf], [1.0]]), "hold NaN or infinity"),
    ],
)
def test_weights_that_are_none(weights, message):
    with pytest.raises(InputError, match=message):
        merge_trees([TREE] * 3, weights, unit_of=lambda path: 0)


@pytest.mark.parametrize("reference", [3, -4])
def test_a_reference_that_is_no_tree(reference):
    with pytest.raises(InputError, match=f"reference {reference} is none of the 3 trees"):
        merge_trees([TREE] * 3, weights_of(), unit_of=lambda path: 0, reference=reference)


def test_no_trees():
    with pytest.raises(InputError):
        merge_trees([], np.zeros((0, 5)), unit_of=lambda path: 0)
