"""RECALL on trees in memory, recomputed from the report by plain numpy."""

import json
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.special import softmax

import recall_jax as rj
from recall_jax.models.config import read_architecture
from recall_jax.models.forward import forward, init_params
from recall_jax.representations.pooling import masked_mean
from recall_jax.representations.typical import select_typical

K, LAYERS, E, VOCABULARY = 3, 4, 8, 12
UNITS = ["embed", *(f"layers.{i}" for i in range(LAYERS)), "head"]
U = len(UNITS)
KEYS = {
    "format",
    "method",
    "models",
    "reference",
    "units",
    "typical_samples",
    "sigma",
    "similarity",
    "weights",
    "adjacent",
    "losses",
    "loss_curve",
    "weight_rises_with_depth",
    "typical",
    "warnings",
    "settings",
}


def network(params, batch, xp=jnp):
    """U hidden states (B, T, E), the same in jax and in numpy."""
    states = [params["embed"][batch["input_ids"]]]
    for layer in params["layers"]:
        states.append(states[-1] + xp.tanh(states[-1] @ layer["kernel"]))
    return (*states, states[-1] * params["head"]["scale"][None, None, :])


def tree_of(seed):
    """Fine-tunes of one ancestor that drift further apart with depth."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed + 1)

    def drawn(drift, *shape):
        values = base.standard_normal(shape) + drift * own.standard_normal(shape)
        return (values / np.sqrt(shape[-1])).astype(np.float32)

    return {
        "embed": drawn(0.1, VOCABULARY, E),
        "layers": [{"kernel": drawn(0.2 + 0.2 * i, E, E)} for i in range(LAYERS)],
        "head": {"scale": drawn(0.1, E)},
    }


def batches_of(num_rows=50, batch_size=16, length=6):
    """Texts of a few kinds, so that there are clusters; the last batch is not full."""
    rng = np.random.default_rng(0)
    kinds = 3 * (np.arange(num_rows) % 4)[:, None]
    ids = (kinds + rng.integers(0, 3, (num_rows, length))).astype(np.int32)
    mask = (np.arange(length)[None] < rng.integers(2, length + 1, (num_rows, 1))).astype(np.int32)
    return [
        {"input_ids": ids[at : at + batch_size], "attention_mask": mask[at : at + batch_size]}
        for at in range(0, num_rows, batch_size)
    ]


TREES = [tree_of(seed) for seed in range(K)]
BATCHES = batches_of()
merge = partial(rj.recall_merge, apply_fn=network, batches=BATCHES, unit_of=rj.unit_of_path)


def representations64(tree):
    """(U, n, E) in float64."""
    wide = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)
    pooled = []
    for batch in BATCHES:
        mask = batch["attention_mask"][:, :, None]
        states = network(wide, batch, np)
        pooled.append([(state * mask).sum(axis=1) / mask.sum(axis=1) for state in states])
    return np.concatenate(pooled, axis=1)


def check_report(merged, report, trees=TREES, reference=K - 1, temperature=1.0):
    """Similarity, sigma, weights, adjacent layers and every merged leaf, from the typical rows."""
    rows = report["typical_samples"]
    reps = np.stack([representations64(tree)[:, rows] for tree in trees])
    similarity, sigma = np.empty((len(trees), U)), np.empty(U)
    for u in range(U):
        sigma[u] = np.sqrt(0.5 * np.median(pdist(reps[reference, u]) ** 2))
        squared = ((reps[:, u] - reps[reference, u]) ** 2).sum(axis=-1)
        similarity[:, u] = np.exp(-squared / (2 * sigma[u] ** 2)).mean(axis=1)
    weights = softmax(similarity / temperature, axis=0)
    np.testing.assert_allclose(report["sigma"], sigma, rtol=1e-5)
    np.testing.assert_allclose(report["similarity"], similarity, atol=1e-5)
    np.testing.assert_allclose(report["weights"], weights, atol=1e-5)
    steps = ((reps[-1, 1:] - reps[-1, :-1]) ** 2).sum(axis=-1)
    adjacent = np.exp(-steps / (2 * sigma[:-1, None] ** 2)).mean(axis=1)[:-1]
    np.testing.assert_allclose(report["adjacent"], adjacent, atol=1e-5)

    def expected(path, *leaves):
        unit = UNITS.index(rj.unit_of_path(path))
        return np.tensordot(weights[:, unit], np.stack(leaves).astype(np.float64), axes=1)

    chex.assert_trees_all_close(
        merged, jax.tree_util.tree_map_with_path(expected, *trees), atol=2e-5, rtol=0
    )


def test_a_merge_recomputed_from_its_report():
    merged, report = merge(TREES, count=10)
    check_report(merged, report)
    assert set(report) == KEYS
    assert report["format"] == 1 and report["method"] == "recall"
    assert report["reference"] == K - 1 and report["units"] == UNITS
    assert report["settings"]["sigma"] == "median" and report["settings"]["temperature"] == 1.0
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    # The typical rows are those of the reference's last block.
    expected = select_typical(representations64(TREES[-1])[-2].astype(np.float32), 10)
    assert report["typical_samples"] == expected.rows.tolist()
    assert report["typical"]["cluster_sizes"] == expected.cluster_sizes.tolist()
    assert report["typical"]["silhouette"] == pytest.approx(expected.silhouette, abs=1e-4)


def test_given_typical_rows_merge_as_chosen_ones():
    merged, report = merge(TREES, count=10, seed=3)
    shuffled = report["typical_samples"][::-1] + report["typical_samples"][:2]
    again, given = merge(TREES, typical=shuffled)
    assert given["typical_samples"] == report["typical_samples"] and given["typical"] is None
    chex.assert_trees_all_equal(merged, again)
    for key in ("sigma", "similarity", "weights", "adjacent"):
        assert given[key] == report[key]


@pytest.mark.parametrize("typical", [[1, 2, 3], [16, 17], [5, 49], [48, 49]])
def test_typical_rows_of_some_batches(typical):
    merged, report = merge(TREES, typical=np.array(typical))
    assert report["typical_samples"] == typical
    check_report(merged, report)


@pytest.mark.parametrize("reference", [0, -2])
def test_another_reference_and_temperature(reference):
    merged, report = merge(TREES, reference=reference, temperature=0.3, count=10)
    assert report["reference"] == reference % K
    check_report(merged, report, reference=reference, temperature=0.3)


def test_units_can_be_left_to_the_newest():
    _, whole = merge(TREES, count=10)
    merged, report = merge(TREES, count=10, merged_units="first")
    weights = np.asarray(report["weights"])
    np.testing.assert_array_equal(weights[:, 0], np.asarray(whole["weights"])[:, 0])
    assert (weights[:-1, -1] == 0).all() and weights[-1, -1] == 1
    chex.assert_trees_all_equal(merged["head"], TREES[-1]["head"])
    assert report["settings"]["merged_units"] == "first"
    newest, report = merge(TREES, count=10, threshold=1.5)
    chex.assert_trees_all_equal(newest, TREES[-1])
    assert report["settings"]["threshold"] == 1.5


def test_pairwise_has_no_reference():
    merged, report = merge(TREES, reference="pairwise", typical=range(12))
    assert report["reference"] is None
    reps = np.stack([representations64(tree)[:, :12] for tree in TREES])
    for u in range(U):
        pairs = np.concatenate([pdist(reps[k, u]) ** 2 for k in range(K)])
        sigma = np.sqrt(0.5 * np.median(pairs))
        kernel = np.exp(-((reps[:, None, u] - reps[None, :, u]) ** 2).sum(-1) / (2 * sigma**2))
        similarity = (kernel.mean(axis=-1).sum(axis=0) - 1) / (K - 1)
        assert report["sigma"][u] == pytest.approx(sigma, rel=1e-5)
        np.testing.assert_allclose(np.array(report["similarity"])[:, u], similarity, atol=1e-5)
    weights = np.array(report["weights"])
    np.testing.assert_allclose(weights, softmax(np.array(report["similarity"]), axis=0), atol=1e-6)
    embeds = np.tensordot(weights[:, 0], np.stack([tree["embed"] for tree in TREES]), axes=1)
    np.testing.assert_allclose(merged["embed"], embeds, atol=1e-6)


@pytest.mark.parametrize("reference", [-1, "pairwise"])
def test_identical_trees_merge_to_themselves(reference):
    merged, report = merge([TREES[0]] * 3, reference=reference)
    chex.assert_trees_all_equal(merged, TREES[0])
    np.testing.assert_allclose(report["weights"], 1 / 3, atol=1e-6)
    assert any("all models look the same" in warning for warning in report["warnings"])


def test_permuted_trees_with_the_reference_moved_along():
    merged, report = merge(TREES, typical=range(12))
    order = [2, 0, 1]
    moved, permuted = merge([TREES[k] for k in order], typical=range(12), reference=0)
    chex.assert_trees_all_close(moved, merged, atol=1e-5)
    np.testing.assert_allclose(permuted["weights"], np.array(report["weights"])[order], atol=1e-6)


@pytest.mark.parametrize(("reference", "step"), [(0, 0), (1, 1), ("pairwise", K - 1)])
def test_a_step_count_is_the_references(reference, step):
    trees = [{**tree, "step": np.int32(k)} for k, tree in enumerate(TREES)]
    merged, _ = merge(trees, reference=reference, typical=range(12))
    assert merged["step"] == step


@pytest.mark.parametrize("backend", ["shard_map", "pmap"])
def test_backends_agree(backend):
    merged, report = merge(TREES, count=10)
    other, same = merge(TREES, count=10, backend=backend)
    assert same["typical_samples"] == report["typical_samples"]
    np.testing.assert_allclose(same["weights"], report["weights"], atol=1e-6)
    chex.assert_trees_all_close(other, merged, atol=1e-6)


def test_other_measures_are_weighed_the_same_way():
    _, report = merge(TREES, similarity={"cosine": 1.0, "linear_cka": 1.0}, alignment="center")
    assert report["sigma"] is None
    np.testing.assert_allclose(report["similarity"][-1], 1, atol=1e-6)
    assert json.dumps(report, allow_nan=False)


def test_a_decoder_of_the_repository_stacked_and_layer_by_layer():
    arch = read_architecture(
        {
            "model_type": "qwen2",
            "vocab_size": VOCABULARY,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    keys = (jax.random.key(seed, impl="rbg") for seed in range(2))
    trees = [jax.tree.map(lambda leaf: leaf * 5, init_params(arch, key)) for key in keys]

    def stacked_apply(tree, batch):
        pool = partial(masked_mean, attention_mask=batch["attention_mask"])
        return forward(arch, tree, **batch, observe=pool)[0]

    def stacked_unit(path):
        return {"layers": ("stacked", 0, 1)}.get(path[0].key, path[0].key)

    def apart(tree):
        layers = {
            f"layers_{i}": jax.tree.map(lambda leaf, i=i: leaf[i], tree["layers"]) for i in range(3)
        }
        return {"embed": tree["embed"], **layers, "head": tree["head"]}

    def stacked(tree):
        layers = [tree[f"layers_{i}"] for i in range(3)]
        joined = jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)
        return {"embed": tree["embed"], "layers": joined, "head": tree["head"]}

    merged, report = rj.recall_merge(trees, stacked_apply, BATCHES, unit_of=stacked_unit, count=9)
    one_by_one, same = rj.recall_merge(
        [apart(tree) for tree in trees],
        lambda tree, batch: stacked_apply(stacked(tree), batch),
        BATCHES,
        unit_of=rj.unit_of_path,
        count=9,
    )
    assert report["units"] == ["embed", "layers.0", "layers.1", "layers.2", "head"]
    assert same["typical_samples"] == report["typical_samples"]
    np.testing.assert_allclose(same["weights"], report["weights"], atol=1e-6)
    chex.assert_trees_all_close(one_by_one, apart(merged), atol=1e-6)
    assert np.isfinite(rj.extract(stacked_apply, merged, BATCHES)).all()


def test_few_units():
    """A model of two units, `embed` and `head`: no layers, no adjacent ones."""
    trees = [{"embed": tree["embed"]} for tree in TREES]
    merged, report = rj.recall_merge(
        trees,
        lambda params, batch: [params["embed"][batch["input_ids"]]] * 2,
        BATCHES,
        unit_of=rj.unit_of_path,
    )
    assert report["units"] == ["embed", "head"] and report["adjacent"] == []
    assert report["weight_rises_with_depth"] is False
    assert merged["embed"].shape == (VOCABULARY, E)


def bad_tree(value):
    tree = tree_of(0)
    tree["layers"][1]["kernel"][0, 0] = value
    return tree


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"trees": TREES[:1]}, "only one tree: RECALL merges at least two"),
        ({"reference": 3}, "reference 3 is none of the 3 models"),
        ({"reference": "newest"}, "reference 'newest' is none of the 3 models"),
        ({"batches": []}, "no batch to extract from"),
        ({"typical": []}, "typical names rows outside the 50 rows"),
        ({"typical": [3, 50]}, "typical names rows outside the 50 rows"),
        ({"typical": [-1]}, "typical names rows outside the 50 rows"),
        ({"typical": [7]}, "one sample has no pairs to take a median bandwidth from"),
        ({"similarity": "euclid"}, "unknown similarity 'euclid'"),
        ({"alignment": "rotate"}, "unknown alignment 'rotate'"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"merged_units": "some"}, "merged_units is 'some': choose from all, first"),
        ({"count": 0}, "cannot make 0 clusters"),
        ({"unit_of": lambda path: "neck"}, r"unit_of gave 'neck' for \['embed'\]"),
        ({"trees": [bad_tree(np.nan), *TREES[1:]]}, "model 0 hold NaN or infinity in unit 2"),
    ],
)
def test_what_cannot_be_merged(arguments, message):
    options = {"trees": TREES, "typical": range(12), **arguments}
    if "count" in arguments:
        del options["typical"]
    with pytest.raises(rj.InputError, match=message):
        merge(options.pop("trees"), **options)


def test_samples_that_are_all_alike_name_the_units():
    same = [{name: leaf[:1].repeat(8, axis=0) for name, leaf in BATCHES[0].items()}]
    with pytest.raises(rj.InputError, match=r"zero in unit embed, layers\.0, .*head: "):
        merge(TREES, batches=same, typical=range(8))
