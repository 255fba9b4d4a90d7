"""K-means on one device, in blocks of rows: no (n, k, E) array at any time.

Greedy k-means++ seeding (Arthur & Vassilvitskii 2007), several starts, Lloyd's iterations.
Distances that decide which centroid is nearest take the Gram form: the points are centred, the
product runs at full float32 precision and the result is clipped at zero. It loses the digits of a
tight cluster far from the mean, so distances to the own centroid are taken directly.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError

BLOCK_ROWS = 8192
MAX_ITERATIONS = 300
# Lloyd stops when the centroids' total squared movement is below this share of the mean variance.
TOLERANCE = 1e-4
# Members this near to each other's squared distance tie, and the first row counts as the nearest:
# two rows that make a cluster are equally near, and rounding must not choose between them. Nor
# between rows of one text, all at the centroid but for rounding: distances below this share of the
# points' spread tie at zero.
TIE = 1e-4


class Clustering(NamedTuple):
    """k clusters of n points: which point is where, and the member nearest to each centroid."""

    centroids: np.ndarray  # (k, E) float32
    assignments: np.ndarray  # (n,) int32
    nearest: np.ndarray  # (k,) int32 rows; -1 for an empty cluster
    sizes: np.ndarray  # (k,) int32
    inertia: float  # sum of squared distances to the own centroid


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int = 0, starts: int = 10) -> Clustering:
    """Best of `starts` runs of k-means over `points` (n, E) float32, for 1 <= num_clusters <= n.

    Deterministic for a seed. Raises InputError for more clusters than points.
    """
    n, width = points.shape
    if not 1 <= num_clusters <= n:
        raise InputError(f"cannot make {num_clusters} clusters of {n} points: choose 1 to {n}")
    block = min(n, BLOCK_ROWS)
    padded = -(-n // block) * block
    mean = np.mean(points, axis=0, dtype=np.float64).astype(np.float32)
    blocks = np.zeros((padded, width), np.float32)
    np.subtract(points, mean, out=blocks[:n])
    valid = (np.arange(padded) < n).reshape(-1, block)
    keys = jax.random.split(jax.random.key(seed), starts)
    best = jax.device_get(_best_of(keys, blocks.reshape(-1, block, width), valid, num_clusters))
    return Clustering(
        centroids=best.centroids + mean,
        assignments=best.assignments.reshape(-1)[:n],
        nearest=best.nearest,
        sizes=best.sizes,
        inertia=float(best.inertia),
    )


class _Pass(NamedTuple):
    """One look at all points with the centroids fixed."""

    centroids: jax.Array
    assignments: jax.Array
    nearest: jax.Array
    sizes: jax.Array
    inertia: jax.Array
    means: jax.Array  # (k, E): where the centroids go next


@partial(jax.jit, static_argnames="k")
def _best_of(keys: jax.Array, blocks: jax.Array, valid: jax.Array, k: int) -> _Pass:
    runs = jax.lax.map(lambda key: _lloyd(_plus_plus(key, blocks, valid, k), blocks, valid), keys)
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda x: x[best], runs)


def _squared_distances(points: jax.Array, centroids: jax.Array) -> jax.Array:
    """(rows, k) squared distances, Gram form."""
    product = jnp.matmul(points, centroids.T, precision="highest")
    norms = jnp.sum(points**2, axis=1)[:, None] + jnp.sum(centroids**2, axis=1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def _plus_plus(key: jax.Array, blocks: jax.Array, valid: jax.Array, k: int) -> jax.Array:
    """Greedy k-means++: of several candidates drawn by distance, keep the one that helps most."""
    points = blocks.reshape(-1, blocks.shape[-1])
    # As many candidates as clusters, not the usual 2 + log k: on 20 blobs that takes the share of
    # starts that end in the best clustering from a third to nine in ten.
    candidates = max(k, 2)
    first_key, key = jax.random.split(key)
    first = jax.random.categorical(first_key, jnp.where(valid.reshape(-1), 0.0, -jnp.inf))

    def distances_to(centers: jax.Array) -> jax.Array:  # (c, E) -> (c, n)
        per_block = jax.lax.map(lambda block: _squared_distances(block, centers), blocks)
        distances = per_block.reshape(-1, centers.shape[0]).T
        return jnp.where(valid.reshape(1, -1), distances, 0.0)

    def add_center(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        centroids, closest, key = state
        draw_key, key = jax.random.split(key)
        drawn = jax.random.categorical(draw_key, jnp.log(closest), shape=(candidates,))
        with_each = jnp.minimum(closest[None, :], distances_to(points[drawn]))
        best = jnp.argmin(jnp.sum(with_each, axis=1))
        return centroids.at[index].set(points[drawn[best]]), with_each[best], key

    centroids = jnp.zeros((k, points.shape[1]), jnp.float32).at[0].set(points[first])
    closest = distances_to(points[first][None, :])[0]
    centroids, _, _ = jax.lax.fori_loop(1, k, add_center, (centroids, closest, key))
    return centroids


def _look(centroids: jax.Array, blocks: jax.Array, valid: jax.Array, variance: jax.Array) -> _Pass:
    k, width = centroids.shape
    num_blocks, block, _ = blocks.shape
    zero = TIE**2 * variance * width  # of squared distances

    def one_block(
        totals: tuple[Any, ...], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[Any, ...], jax.Array]:
        sums, sizes, inertia, nearest, nearest_distance = totals
        points, real, start = inputs
        assigned = jnp.argmin(_squared_distances(points, centroids), axis=1).astype(jnp.int32)
        own_distance = jnp.sum((points - centroids[assigned]) ** 2, axis=1)
        member = (jax.nn.one_hot(assigned, k) > 0) & real[:, None]
        to_member = jnp.where(member, own_distance[:, None], jnp.inf)
        closest_distance = jnp.min(to_member, axis=0)
        tie = closest_distance * (1.0 + TIE) + zero
        closest = jnp.argmax(to_member <= tie[None, :], axis=0)
        nearer = closest_distance < nearest_distance * (1.0 - TIE) - zero
        totals = (
            sums + jnp.matmul(member.T.astype(jnp.float32), points, precision="highest"),
            sizes + jnp.sum(member, axis=0, dtype=jnp.int32),
            inertia + jnp.sum(jnp.where(real, own_distance, 0.0)),
            jnp.where(nearer, start + closest.astype(jnp.int32), nearest),
            jnp.where(nearer, closest_distance, nearest_distance),
        )
        return totals, assigned

    totals: tuple[Any, ...] = (
        jnp.zeros((k, width), jnp.float32),
        jnp.zeros(k, jnp.int32),
        jnp.float32(0.0),
        jnp.full(k, -1, jnp.int32),
        jnp.full(k, jnp.inf, jnp.float32),
    )
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block
    totals, assignments = jax.lax.scan(one_block, totals, (blocks, valid, starts))
    sums, sizes, inertia, nearest, _ = totals
    # An empty cluster keeps its centroid: it may win points back.
    filled = sums / jnp.maximum(sizes, 1)[:, None].astype(jnp.float32)
    means = jnp.where(sizes[:, None] > 0, filled, centroids)
    return _Pass(centroids, assignments, nearest, sizes, inertia, means)


def _lloyd(centroids: jax.Array, blocks: jax.Array, valid: jax.Array) -> _Pass:
    count = jnp.sum(valid).astype(jnp.float32)
    variance = jnp.sum(blocks**2) / (count * blocks.shape[-1])

    def moving(state: tuple[jax.Array, jax.Array, _Pass]) -> jax.Array:
        iteration, moved, _ = state
        return (iteration < MAX_ITERATIONS) & (moved > TOLERANCE * variance)

    def step(state: tuple[jax.Array, jax.Array, _Pass]) -> tuple[jax.Array, jax.Array, _Pass]:
        iteration, _, seen = state
        moved = jnp.sum((seen.means - seen.centroids) ** 2)
        return iteration + 1, moved, _look(seen.means, blocks, valid, variance)

    start = (jnp.int32(0), jnp.float32(jnp.inf), _look(centroids, blocks, valid, variance))
    return jax.lax.while_loop(moving, step, start)[2]


def mean_silhouette(
    points: np.ndarray, assignments: np.ndarray, *, seed: int = 0, max_rows: int = 2000
) -> float | None:
    """Mean silhouette in [-1, 1] (Rousseeuw 1987) on at most `max_rows` seeded rows.

    Euclidean distances; a point alone in its cluster scores 0. None where the rows are all in one
    cluster or each in its own, for which the silhouette is not defined.
    """
    if len(points) > max_rows:
        rows = np.random.default_rng(seed).choice(len(points), max_rows, replace=False)
        points, assignments = points[rows], assignments[rows]
    _, labels = np.unique(assignments, return_inverse=True)
    num_labels = int(labels.max()) + 1
    if not 2 <= num_labels < len(points):
        return None
    return float(_silhouette(points - points.mean(axis=0), labels, num_labels))


@partial(jax.jit, static_argnames="num_labels")
def _silhouette(points: jax.Array, labels: jax.Array, num_labels: int) -> jax.Array:
    n = points.shape[0]
    # A point's distance to itself is zero, which the Gram form only nears.
    others = 1.0 - jnp.eye(n, dtype=jnp.float32)
    distances = jnp.sqrt(_squared_distances(points, points)) * others
    member = jax.nn.one_hot(labels, num_labels)
    sizes = jnp.sum(member, axis=0)
    totals = jnp.matmul(distances, member, precision="highest")  # (n, labels)
    own_size = sizes[labels]
    own = jnp.sum(totals * member, axis=1) / jnp.maximum(own_size - 1.0, 1.0)
    elsewhere = jnp.where(member > 0, jnp.inf, totals / sizes[None, :])
    other = jnp.min(elsewhere, axis=1)
    largest = jnp.maximum(own, other)
    score = jnp.where(largest > 0, (other - own) / jnp.where(largest > 0, largest, 1.0), 0.0)
    return jnp.mean(jnp.where(own_size > 1, score, 0.0))
