"""k-means and the silhouette against scikit-learn, the nearest members against numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import silhouette_score

from recall_jax.errors import InputError
from recall_jax.inputs.batches import make_batches
from recall_jax.models.config import read_architecture
from recall_jax.models.forward import forward, init_params
from recall_jax.representations import kmeans as module
from recall_jax.representations.extract import extract
from recall_jax.representations.kmeans import kmeans, mean_silhouette
from recall_jax.representations.pooling import masked_mean
from recall_jax.representations.typical import POOR_SILHOUETTE, select_typical


def blobs(num_rows, num_blobs, width, spread, seed=0):
    """Rows around `num_blobs` centres, the first of each blob by blob."""
    rng = np.random.default_rng(seed)
    centers = rng.standard_normal((num_blobs, width))
    rows = centers[np.arange(num_rows) % num_blobs] + spread * rng.standard_normal(
        (num_rows, width)
    )
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def representations():
    """The last block's pooled states of 400 random texts in a random decoder."""
    arch = read_architecture(
        {
            "model_type": "llama",
            "vocab_size": 40,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
        }
    )
    params = init_params(arch, jax.random.key(0, impl="rbg"))
    params = jax.tree.map(lambda leaf: leaf * 8 if leaf.ndim > 1 else leaf, params)
    rng = np.random.default_rng(0)
    # Texts of several kinds: each draws its tokens from its own part of the vocabulary.
    texts = [
        rng.integers(5 * (row % 6), 5 * (row % 6) + 12, rng.integers(1, 16)) for row in range(400)
    ]

    def apply_fn(params, batch):
        pool = partial(masked_mean, attention_mask=batch["attention_mask"])
        return forward(arch, params, **batch, observe=pool)[0]

    made = make_batches(texts, 40)
    reps = extract(apply_fn, params, [batch.as_dict() for batch in made.batches])
    return reps[-2][made.order]


def scikit_learns_inertia(points, num_clusters):
    """The mean over seeds, which differ by some percent where clusters are not clear."""
    runs = [KMeans(num_clusters, n_init=10, random_state=seed).fit(points) for seed in range(3)]
    return np.mean([run.inertia_ for run in runs])


def check_clustering(points, result):
    """What must hold of any clustering, in float64."""
    points, centroids = points.astype(np.float64), result.centroids.astype(np.float64)
    distances = ((points[:, None] - centroids[None]) ** 2).sum(axis=-1)
    own = distances[np.arange(len(points)), result.assignments]
    scale = ((points - points.mean(axis=0)) ** 2).sum(axis=1).max()
    # A centroid is given in float32, which tells where it is to half a unit in the last place.
    placed = 2.0**-24 * np.abs(points).max() * np.sqrt(points.shape[1])
    rounding = 2 * np.sqrt(own.max()) * placed + placed**2
    # No other centroid is nearer, but for the rounding of the Gram form.
    assert (own <= distances.min(axis=1) + 1e-5 * scale + rounding).all()
    np.testing.assert_allclose(result.inertia, own.sum(), rtol=1e-4, atol=len(own) * rounding)
    num_clusters = len(centroids)
    np.testing.assert_array_equal(
        result.sizes, np.bincount(result.assignments, minlength=num_clusters)
    )
    for cluster in range(num_clusters):
        members = np.flatnonzero(result.assignments == cluster)
        if not len(members):
            assert result.nearest[cluster] == -1
            continue
        assert result.nearest[cluster] in members
        closest = own[members].min()
        # Members that tie within a ten-thousandth count as equally near.
        tie = 1.1e-8 * ((points - points.mean(axis=0)) ** 2).sum(axis=1).mean()
        assert own[result.nearest[cluster]] <= closest * (1 + 2.1e-4) + 2 * tie + 2 * rounding


@pytest.mark.parametrize(("num_blobs", "spread"), [(20, 0.05), (20, 0.7), (12, 0.3)])
def test_inertia_of_blobs_within_one_percent_of_scikit_learn(num_blobs, spread):
    points = blobs(500, num_blobs, 16, spread)
    result = kmeans(points, 20)
    assert result.inertia <= 1.01 * scikit_learns_inertia(points, 20)
    check_clustering(points, result)


def test_inertia_of_representations_within_one_percent_of_scikit_learn(representations):
    assert representations.shape == (400, 32)
    inertia = scikit_learns_inertia(representations, 20)
    for seed in range(5):
        result = kmeans(representations, 20, seed=seed)
        assert result.inertia <= 1.01 * inertia
        check_clustering(representations, result)
    assert mean_silhouette(representations, result.assignments) > 0.05


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([1e-4, 1e-2, 1.0]),
    st.sampled_from([0.0, 1.0, 1000.0]),
)
def test_clusters_of_any_tightness_and_offset(seed, spread, offset):
    points = blobs(60, 6, 5, spread, seed) + np.float32(offset)
    check_clustering(points, kmeans(points, 7, seed=seed))


def test_a_seed_decides_and_two_seeds_differ():
    points = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)
    first, again, other = (kmeans(points, 15, seed=seed) for seed in (3, 3, 4))
    for one, two in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, two)
    assert not np.array_equal(first.assignments, other.assignments)


@pytest.mark.parametrize(("num_rows", "block"), [(96, 32), (100, 32), (97, 96)])
def test_blocks_of_rows_change_nothing(monkeypatch, num_rows, block):
    points = blobs(num_rows, 6, 5, 0.1)
    whole = kmeans(points, 6)
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    blocked = kmeans(points, 6)
    check_clustering(points, blocked)
    # The draws may differ where the last block is filled up, the best clustering not.
    np.testing.assert_array_equal(np.sort(blocked.nearest), np.sort(whole.nearest))
    np.testing.assert_array_equal(np.sort(blocked.sizes), np.sort(whole.sizes))
    assert blocked.inertia == pytest.approx(whole.inertia, rel=1e-5)


def test_seeds_are_points_and_never_the_rows_that_fill_a_block():
    points = blobs(20, 4, 3, 0.1) + 1
    blocks = np.zeros((3, 16, 3), np.float32)
    blocks.reshape(-1, 3)[:20] = points
    valid = (np.arange(48) < 20).reshape(3, 16)
    seeding = jax.jit(module._plus_plus, static_argnames="k")
    for seed in range(10):
        centroids = seeding(jax.random.key(seed), blocks, valid, k=6)
        distances = np.abs(np.asarray(centroids)[:, None] - points[None]).sum(axis=-1)
        assert (distances.min(axis=1) == 0).all()
        assert len(np.unique(distances.argmin(axis=1))) == 6


@pytest.mark.optimised
def test_no_array_of_rows_by_clusters_by_width():
    num_blocks, block, width, clusters = 8, 1024, 256, 20
    compiled = module._best_of.lower(
        jax.random.split(jax.random.key(0), 4),
        jax.ShapeDtypeStruct((num_blocks, block, width), jnp.float32),
        jax.ShapeDtypeStruct((num_blocks, block), jnp.bool_),
        clusters,
    ).compile()
    points = num_blocks * block * width * 4
    # Not even a second copy of the points.
    assert compiled.memory_analysis().temp_size_in_bytes < points


def test_rows_that_coincide_leave_clusters_empty():
    points = np.repeat(np.random.default_rng(0).standard_normal((3, 4)), [5, 1, 4], axis=0)
    points = points.astype(np.float32)
    result = kmeans(points, 6)
    check_clustering(points, result)
    assert sorted(result.sizes.tolist()) == [0, 0, 0, 1, 4, 5]
    assert result.inertia == pytest.approx(0, abs=1e-10)
    typical = select_typical(points, 6)
    assert len(typical.rows) == 3 and len(np.unique(points[typical.rows], axis=0)) == 3
    assert sorted(typical.cluster_sizes.tolist()) == [1, 4, 5]


@pytest.mark.parametrize("block", [1000, 16])
def test_rounding_does_not_choose_between_rows_that_are_alike(monkeypatch, block):
    monkeypatch.setattr(module, "BLOCK_ROWS", block)
    rng = np.random.default_rng(0)
    distinct = np.concatenate([blobs(12, 12, 5, 0.0), blobs(12, 12, 5, 0.05)])
    # Clusters of one text several times, and of two texts that are equally far from their mean.
    points = np.concatenate([distinct, distinct[:12], distinct[:12]])
    chosen = select_typical(points, 18).rows
    for _ in range(5):
        rounded = points * (1 + 2e-7 * rng.standard_normal(points.shape)).astype(np.float32)
        np.testing.assert_array_equal(select_typical(rounded, 18).rows, chosen)


def test_rows_all_alike_are_one_cluster():
    result = kmeans(np.full((9, 3), 0.1, np.float32), 4)
    assert sorted(result.sizes.tolist()) == [0, 0, 0, 9] and result.inertia == 0
    np.testing.assert_array_equal(result.centroids[result.assignments[0]], np.float32([0.1] * 3))
    assert mean_silhouette(np.full((9, 3), 0.1, np.float32), result.assignments) is None


def test_as_many_clusters_as_rows_and_a_single_one():
    points = np.random.default_rng(0).standard_normal((7, 3)).astype(np.float32)
    each = kmeans(points, 7)
    assert sorted(each.nearest.tolist()) == list(range(7))
    assert each.inertia == pytest.approx(0, abs=1e-10)
    one = kmeans(points, 1)
    np.testing.assert_allclose(one.centroids[0], points.mean(axis=0), rtol=1e-5, atol=1e-6)
    check_clustering(points, one)


@pytest.mark.parametrize("num_clusters", [0, -1, 4])
def test_more_clusters_than_points_are_refused(num_clusters):
    with pytest.raises(InputError, match="of 3 points: choose 1 to 3"):
        kmeans(np.zeros((3, 2), np.float32), num_clusters)


@given(st.integers(0, 2**32 - 1), st.integers(2, 5))
def test_silhouette_is_scikit_learns(seed, num_labels):
    rng = np.random.default_rng(seed)
    points = blobs(40, 5, 4, 0.5, seed)
    labels = rng.integers(0, num_labels, 40).astype(np.int32)
    labels[:num_labels] = np.arange(num_labels)  # labels that a single point has are among them
    labels = np.where(np.arange(40) == 39, num_labels, labels)
    expected = silhouette_score(points.astype(np.float64), labels)
    assert mean_silhouette(points, labels) == pytest.approx(expected, abs=1e-5)


def test_silhouette_of_many_rows_is_that_of_a_seeded_draw():
    points = blobs(300, 4, 6, 0.3)
    labels = (np.arange(300) % 4).astype(np.int32)
    rows = np.random.default_rng(5).choice(300, 100, replace=False)
    expected = silhouette_score(points[rows].astype(np.float64), labels[rows])
    drawn = mean_silhouette(points, labels, seed=5, max_rows=100)
    assert drawn == pytest.approx(expected, abs=1e-5)
    assert drawn != mean_silhouette(points, labels, seed=6, max_rows=100)


@pytest.mark.parametrize("labels", [[0, 0, 0], [4, 4, 4], [2, 0, 1]])
def test_no_silhouette_of_one_cluster_or_of_points_on_their_own(labels):
    assert mean_silhouette(np.eye(3, dtype=np.float32), np.asarray(labels)) is None


def test_typical_rows_are_the_members_nearest_to_the_centroids():
    points = blobs(120, 6, 5, 0.05)
    typical = select_typical(points, 6)
    means = [points[blob::6].astype(np.float64).mean(axis=0) for blob in range(6)]
    nearest = [((points - mean) ** 2).sum(axis=1).argmin() for mean in means]
    assert typical.rows.tolist() == sorted(nearest) and typical.rows.dtype == np.int64
    assert typical.cluster_sizes.tolist() == [20] * 6
    assert typical.warnings() == []
    assert typical.summary() == {
        "cluster_sizes": [20] * 6,
        "inertia": typical.inertia,
        "silhouette": typical.silhouette,
    }


@given(st.integers(0, 2**32 - 1))
def test_typical_rows_ascend_and_stand_for_all_rows(seed):
    points = np.random.default_rng(seed).standard_normal((60, 5)).astype(np.float32)
    typical = select_typical(points, 7, seed=seed)
    assert (np.diff(typical.rows) > 0).all()
    assert len(typical.rows) == len(typical.cluster_sizes) and typical.cluster_sizes.sum() == 60
    clusters = kmeans(points, 7, seed=seed)
    sizes = dict(zip(clusters.nearest.tolist(), clusters.sizes.tolist(), strict=True))
    pairs = zip(typical.rows, typical.cluster_sizes, strict=True)
    assert all(sizes[row] == size for row, size in pairs)


@pytest.mark.parametrize("num_rows", [1, 4, 5])
def test_no_more_rows_than_clusters_are_all_typical(num_rows):
    points = np.random.default_rng(0).standard_normal((num_rows, 3)).astype(np.float32)
    typical = select_typical(points, 5)
    assert typical.rows.tolist() == list(range(num_rows))
    assert typical.summary() == {
        "cluster_sizes": [1] * num_rows,
        "inertia": 0.0,
        "silhouette": None,
    }
    assert typical.warnings() == []


def test_poor_clustering_is_said():
    points = np.random.default_rng(0).standard_normal((300, 64)).astype(np.float32)
    typical = select_typical(points, 20)
    assert typical.silhouette < POOR_SILHOUETTE
    (warning,) = typical.warnings()
    assert "clustering is poor" in warning and f"{typical.silhouette:.3f}" in warning
