"""`tree` and `forward` in a recipe, and which leaf they make which unit."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.units import unit_of_tensor
from recall_jax.errors import InputError
from recall_jax.jobs.trees.places import Place, place_leaves, slice_specs
from recall_jax.recipes.recipe import make_recipe, read_recipe
from recall_jax.recipes.tree_patterns import TreePatterns, match_leaf

RECALL = {
    "merge_method": "recall",
    "models": [{"model": "a"}, {"model": "b"}],
    "tree": {"embed": "emb/**", "layers": "layers_{i}/**"},
    "forward": "package.module:Class.apply",
    "samples": {"data": "rows.jsonl", "tokenizer": "folder"},
}


def test_a_recipe_of_trees_is_read_and_written_again(tmp_path):
    recipe = make_recipe(RECALL)
    assert recipe.tree == TreePatterns(embed=("emb/**",), layers=("layers_{i}/**",))
    (tmp_path / "recipe.yml").write_text(recipe.to_yaml())
    assert read_recipe(tmp_path / "recipe.yml") == recipe
    both = make_recipe(RECALL | {"tree": {"layers": ["dense/**", "moe/**"], "axis": -1}})
    assert (both.tree.layers, both.tree.axis) == (("dense/**", "moe/**"), -1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tree": None}, ["forward is for JAX trees"]),
        ({"tree": None, "forward": None}, ["samples.tokenizer is for JAX trees"]),
        ({"forward": None}, ["add forward: MODULE:FUNCTION"]),
        ({"forward": "apply"}, ["'apply'", "MODULE:FUNCTION"]),
        ({"forward": "a:b; import c"}, ["MODULE:FUNCTION"]),
        ({"tree": {"layers": "layers/**"}}, ["no {i}", "axis"]),
        ({"tree": {"layers": "l_{i}/**", "axis": 0}}, ["remove axis"]),
        ({"tree": {"layers": "l_{i}/{i}"}}, ["{i} more than once"]),
        ({"tree": {"layers": []}}, ["tree.layers"]),
        ({"tree": {"embed": "e"}}, ["tree.layers is missing"]),
        ({"tree": {"layers": "/l_{i}/**"}}, ["is not a path"]),
        ({"tree": {"layers": "a**/{i}"}}, ["is not a path"]),
        ({"tree": {"layers": "l/{j}/**"}}, ["is not a path"]),
        ({"tree": {"layers": "l/{i}", "embed": "e/{i}"}}, ["{i} is for layers"]),
        ({"tree": {"layers": "l/{i}", "root": "a/*"}}, ["without *"]),
        ({"tree": {"layers": "l/{i}", "head": "h"}}, ["unknown key tree.head"]),
        ({"tree": {"layers": "l/**", "axis": True}}, ["tree.axis"]),
        ({"merge_method": "regmean", "samples": None, "forward": None}, ["known families", "ties"]),
        ({"merge_method": "average", "samples": None}, ["remove forward"]),
        ({"compute_dtype": "float32"}, ["compute_dtype is not for JAX trees"]),
        ({"samples": {"source": "random"}}, ["samples.source"]),
    ],
)
def test_a_fault_of_a_recipe_is_one_line(changes, words):
    values = {key: value for key, value in (RECALL | changes).items() if value is not None}
    with pytest.raises(InputError) as caught:
        make_recipe(values)
    line = str(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("a/**", "a/b/c", True),
        ("a/**", "a", True),
        ("a/**", "ab", False),
        ("**/c", "c", True),
        ("**/c", "a/b/c", True),
        ("**/c", "a/bc", False),
        ("a/**/c", "a/c", True),
        ("a/*/c", "a/b/c", True),
        ("a/*/c", "a/b/b/c", False),
        ("a/w*", "a/wi.0", True),
        ("a.b", "aXb", False),
        ("**", "a/b", True),
    ],
)
def test_patterns_match_whole_names(pattern, name, matches):
    assert (match_leaf(pattern, name) is not None) == matches


@pytest.mark.parametrize(
    ("pattern", "name", "number"),
    [
        ("h/{i}/**", "h/12/k", "12"),
        ("*{i}/k", "layer_12/k", "12"),
        ("**/*{i}*/k", "a/1/block12_a/k", "12"),
        ("enc2{i}/k", "enc213/k", "13"),
        ("*{i}*", "a1b23", "23"),
        ("h/{i}/k", "h/x/k", None),
        ("h/{i}/k", "h//k", None),
    ],
)
def test_the_number_of_a_layer_is_whole(pattern, name, number):
    assert match_leaf(pattern, name) == number


def as_regex(pattern: str) -> str:
    meanings = {"**/": "(?:[^/]+/)*", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*"}
    parts = re.split(r"(^\*\*$|/\*\*$|\*\*/|\*)", pattern)
    return "".join(meanings.get(part) or re.escape(part) for part in parts)


words = st.text("ab*", min_size=1, max_size=3).filter(lambda word: "**" not in word)


@given(
    st.lists(st.just("**") | words, min_size=1, max_size=4).map("/".join),
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=4).map("/".join),
)
def test_patterns_match_what_regular_expressions_match(pattern, name):
    assert (match_leaf(pattern, name) is None) == (not re.fullmatch(as_regex(pattern), name))


@pytest.mark.timeout(10)
def test_no_pattern_matches_for_ever():
    name = "a/" * 200 + "a" * 600
    for pattern in ("**/" * 50 + "*a" * 50 + "b", "*a" * 300 + "{i}", "**/*/" * 60 + "b/**"):
        assert match_leaf(pattern, name) is None


def specs(**shapes) -> dict[str, TensorSpec]:
    return {
        name.replace("__", "/"): TensorSpec(np.dtype(np.float32), shape)
        for name, shape in shapes.items()
    }


def units(places) -> dict[str, tuple]:
    return {name: place.units for name, place in places.items()}


def test_stacks_follow_each_other_in_depth():
    leaves = specs(dense__k=(4, 2), moe__k=(4, 3), moe__e=(5, 3, 6), emb=(7, 4), norm=(4,))
    patterns = TreePatterns(layers=("dense/**", "moe/**"), embed=("emb",), axis=1)
    places = place_leaves(leaves, patterns, "model")
    assert units(places) == {
        "dense/k": ("layers.0", "layers.1"),
        "moe/k": ("layers.2", "layers.3", "layers.4"),
        "moe/e": ("layers.2", "layers.3", "layers.4"),
        "emb": ("embed",),
        "norm": ("head",),
    }
    slices = slice_specs(leaves, places)
    assert slices["layers.3.moe/e"].shape == (5, 6)
    assert [unit_of_tensor(name) for name in slices] == sorted(
        (unit_of_tensor(name) for name in slices), key=lambda u: (u == "head", u != "embed", u)
    )


def test_numbers_start_anywhere_and_have_no_gap():
    names = {f"block_{i}__k": (2,) for i in (3, 4, 5)}
    patterns = TreePatterns(layers=("block_{i}/**",))
    places = place_leaves(specs(**names), patterns, "model")
    assert list(units(places).values()) == [("layers.0",), ("layers.1",), ("layers.2",)]
    with pytest.raises(InputError, match="layers 3 to 5 but no 4"):
        place_leaves(specs(block_3__k=(2,), block_5__k=(2,)), patterns, "model")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("far", ["1000000000", "9" * 900])
def test_a_layer_s_number_makes_nothing_of_its_size(far):
    leaves = specs(**{"embed__k": (2,), "l_0__w": (2,), f"l_{far}__w": (2,)})
    with pytest.raises(InputError, match=r"layers 0 to .* but no 1: ") as caught:
        place_leaves(leaves, TreePatterns(layers=("l_{i}/w",)), "model")
    assert len(str(caught.value)) < 300
    guessed = specs(**{"embed__k": (2,), "layers_0__w": (2,), f"layers_{far[:9]}__w": (2,)})
    with pytest.raises(InputError, match=r"layers 0 to .* but no 1: "):
        place_leaves(guessed, None, "model")


@pytest.mark.timeout(10)
@pytest.mark.parametrize("shape", [(10**12, 0), (0, 10**12), (10**12, 3)])
def test_a_stack_of_layers_makes_no_names_out_of_nothing(shape):
    patterns = TreePatterns(layers=("l/**",), axis=shape.index(10**12))
    with pytest.raises(InputError, match="would stack 1000000000000 layers"):
        place_leaves(specs(l__w=shape, norm=(2,)), patterns, "model")


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["wte", "h/0/k", "h/1/k", "ln_f"], ["embed", "layers.0", "layers.1", "head"]),
        (["embedding/k", "Transformer/encoderblock_0/k", "head/k"], ["embed", "layers.0", "head"]),
        (["embed/k", "layers/a", "layers/b/c", "head/n"], ["embed", *["layers"] * 2, "head"]),
    ],
)
def test_layouts_that_need_no_patterns(names, expected):
    leaves = {name: TensorSpec(np.dtype(np.float32), (2, 3)) for name in names}
    places = place_leaves(leaves, None, "model")
    stacked = Place(("layers.0", "layers.1"), 0)
    wanted = [stacked if unit == "layers" else Place((unit,)) for unit in expected]
    assert list(places.values()) == wanted


WORDS = st.text("ab.{}_0", min_size=1, max_size=4)


@given(st.lists(WORDS, min_size=1, max_size=4), st.integers(0, 12), st.integers(1, 3))
def test_the_name_of_a_slice_tells_its_unit(words, first, count):
    leaf = "/".join(words)
    for unit in ("embed", "head"):
        assert [unit_of_tensor(n) for n in Place((unit,)).slice_names(leaf)] == [unit]
    layers = tuple(f"layers.{first + i}" for i in range(count))
    names = Place(layers, 0).slice_names(leaf)
    assert tuple(map(unit_of_tensor, names)) == layers
