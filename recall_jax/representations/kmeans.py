"""Cluster by k-means on one device, in blocks of rows: no (n, k, E) array is allocated.

Uses greedy k-means++ seeding (Arthur & Vassilvitskii 2007), several starts, and Lloyd's iterations.
Distances that decide which centroid is nearest use the Gram form: the points are centred, the
product runs at full float32 precision and the result is clipped at zero. This form loses the digits
of a tight cluster far from the mean, so distances to the assigned centroid are computed directly.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError

BLOCK_ROWS = 2048
MAX_ITERATIONS = 300
# Lloyd stops when the centroids' total squared movement is below this fraction of the variance.
TOLERANCE = 1e-4
# Members tie if their squared distances differ by less than this fraction, and the first row counts
# as the nearest: the two rows of a cluster are equally near, and rounding must not choose between
# them. Distances below this fraction of the points' spread tie at zero, because rows with equal
# texts are at the centroid up to rounding.
TIE = 1e-4
# If no point is farther from the mean than this fraction of the largest value, all are equal: a
# spread that small is rounding.
ROUNDING = 1e-5


class Clustering(NamedTuple):
    """Hold k clusters of n points, and the member nearest to each centroid."""

    centroids: np.ndarray  # (k, E) float32
    assignments: np.ndarray  # (n,) int32
    nearest: np.ndarray  # (k,) int32 rows; -1 for an empty cluster
    sizes: np.ndarray  # (k,) int32
    inertia: float  # sum of squared distances to the assigned centroid


def kmeans(points: np.ndarray, num_clusters: int, *, seed: int = 0, starts: int = 10) -> Clustering:
    """Return the best of `starts` runs of k-means over `points` (n, E) float32.

    Deterministic for a seed. Raises InputError unless 1 <= num_clusters <= n.
    """
    n, width = points.shape
    if not 1 <= num_clusters <= n:
        raise InputError(f"cannot make {num_clusters} clusters of {n} points: choose 1 to {n}")
    num_blocks = -(-n // BLOCK_ROWS)
    block = -(-n // num_blocks)
    padded = num_blocks * block
    mean = np.mean(points, axis=0, dtype=np.float64).astype(np.float32)
    blocks = np.zeros((padded, width), np.float32)
    np.subtract(points, mean, out=blocks[:n])
    if _largest(blocks) <= ROUNDING * _largest(points):
        blocks[:] = 0.0
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


def _largest(values: np.ndarray) -> float:
    return max(float(values.max()), -float(values.min()))


class _Run(NamedTuple):
    """Hold the centroids of one run, and how all points relate to them."""

    centroids: jax.Array
    assignments: jax.Array
    nearest: jax.Array
    sizes: jax.Array
    inertia: jax.Array


@partial(jax.jit, static_argnames="k")
def _best_of(keys: jax.Array, blocks: jax.Array, valid: jax.Array, k: int) -> _Run:
    variance = jnp.sum(blocks**2) / (jnp.sum(valid) * blocks.shape[-1]).astype(jnp.float32)
    # The seedings of all starts share their products with the points. Each start then iterates and
    # stops separately.
    seeds = jax.vmap(_plus_plus, in_axes=(0, None, None, None))(keys, blocks, valid, k)
    runs = jax.lax.map(
        lambda seed: _evaluate(_lloyd(seed, blocks, valid, variance), blocks, valid, variance),
        seeds,
    )
    best = jnp.argmin(runs.inertia)
    return jax.tree.map(lambda x: x[best], runs)


def _squared_distances(points: jax.Array, centroids: jax.Array) -> jax.Array:
    """Return squared distances (rows, k), in the Gram form."""
    product = jnp.matmul(points, centroids.T, precision="highest")
    norms = jnp.sum(points**2, axis=1)[:, None] + jnp.sum(centroids**2, axis=1)[None, :]
    return jnp.maximum(norms - 2.0 * product, 0.0)


def _plus_plus(key: jax.Array, blocks: jax.Array, valid: jax.Array, k: int) -> jax.Array:
    """Seed by greedy k-means++: of several candidates drawn by distance, keep the best."""
    points = blocks.reshape(-1, blocks.shape[-1])
    # As many candidates as clusters, not the usual 2 + log k: on 20 blobs this raises the fraction
    # of starts that end in the best clustering from a third to nine in ten.
    candidates = max(k, 2)

    def draw(key: jax.Array, weights: jax.Array, number: int) -> jax.Array:
        """Draw points (number, E) with these weights."""
        below = jnp.cumsum(weights.reshape(-1))
        places = jnp.searchsorted(
            below, below[-1] * jax.random.uniform(key, (number,)), side="right"
        )
        return points[jnp.minimum(places, jnp.sum(valid) - 1)]

    def with_each(
        centers: jax.Array, closest: jax.Array, reduce: Callable[[jax.Array], jax.Array]
    ) -> jax.Array:
        """Apply `reduce` to (rows, c): each point's distance if only that one center is added."""

        def one_block(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
            block, closest = inputs
            return reduce(jnp.minimum(closest[:, None], _squared_distances(block, centers)))

        return jax.lax.map(one_block, (blocks, closest))

    def with_center(center: jax.Array, closest: jax.Array) -> jax.Array:
        return with_each(center[None, :], closest, lambda distances: distances[:, 0])

    def add_center(
        index: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        centroids, closest, key = state
        draw_key, key = jax.random.split(key)
        drawn = draw(draw_key, closest, candidates)
        remaining = with_each(drawn, closest, partial(jnp.sum, axis=0))
        best = drawn[jnp.argmin(jnp.sum(remaining, axis=0))]
        return centroids.at[index].set(best), with_center(best, closest), key

    first_key, key = jax.random.split(key)
    first = draw(first_key, valid.astype(jnp.float32), 1)[0]
    centroids = jnp.zeros((k, points.shape[1]), jnp.float32).at[0].set(first)
    closest = with_center(first, jnp.where(valid, jnp.inf, 0.0))
    centroids, _, _ = jax.lax.fori_loop(1, k, add_center, (centroids, closest, key))
    return centroids


def _lloyd(
    centroids: jax.Array, blocks: jax.Array, valid: jax.Array, variance: jax.Array
) -> jax.Array:
    """Move centroids (k, E) to the means of their points until they stop moving."""
    k = len(centroids)

    def means(centroids: jax.Array) -> jax.Array:
        half_norms = 0.5 * jnp.sum(centroids**2, axis=1)

        def one_block(
            totals: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array]
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            points, real = inputs
            # The norm of a point does not affect which centroid is nearest.
            products = jnp.matmul(points, centroids.T, precision="highest")
            assigned = jnp.argmin(half_norms[None, :] - products, axis=1)
            member = jax.nn.one_hot(jnp.where(real, assigned, k), k, axis=0)
            sums = totals[0] + jnp.matmul(member, points, precision="highest")
            return (sums, totals[1] + jnp.sum(member, axis=1)), None

        totals = jnp.zeros_like(centroids), jnp.zeros(k, jnp.float32)
        (sums, sizes), _ = jax.lax.scan(one_block, totals, (blocks, valid))
        # An empty cluster keeps its centroid: it may win points back.
        filled = sums / jnp.maximum(sizes, 1.0)[:, None]
        return jnp.where(sizes[:, None] > 0, filled, centroids)

    def moving(state: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        iteration, moved, _ = state
        return (iteration < MAX_ITERATIONS) & (moved > TOLERANCE * variance)

    def step(
        state: tuple[jax.Array, jax.Array, jax.Array],
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        iteration, _, centroids = state
        moved_to = means(centroids)
        return iteration + 1, jnp.sum((moved_to - centroids) ** 2), moved_to

    return jax.lax.while_loop(moving, step, (jnp.int32(0), jnp.float32(jnp.inf), centroids))[2]


def _evaluate(
    centroids: jax.Array, blocks: jax.Array, valid: jax.Array, variance: jax.Array
) -> _Run:
    k, width = centroids.shape
    num_blocks, block, _ = blocks.shape
    zero = TIE**2 * variance * width  # squared distances below this tie at zero

    def one_block(
        totals: tuple[Any, ...], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[Any, ...], jax.Array]:
        sizes, inertia, nearest, nearest_distance = totals
        points, real, start = inputs
        assigned = jnp.argmin(_squared_distances(points, centroids), axis=1).astype(jnp.int32)
        distance = jnp.sum((points - centroids[assigned]) ** 2, axis=1)
        member = (jax.nn.one_hot(assigned, k) > 0) & real[:, None]
        to_member = jnp.where(member, distance[:, None], jnp.inf)
        closest_distance = jnp.min(to_member, axis=0)
        tie = closest_distance * (1.0 + TIE) + zero
        closest = jnp.argmax(to_member <= tie[None, :], axis=0)
        nearer = closest_distance < nearest_distance * (1.0 - TIE) - zero
        totals = (
            sizes + jnp.sum(member, axis=0, dtype=jnp.int32),
            inertia + jnp.sum(jnp.where(real, distance, 0.0)),
            jnp.where(nearer, start + closest.astype(jnp.int32), nearest),
            jnp.where(nearer, closest_distance, nearest_distance),
        )
        return totals, assigned

    totals: tuple[Any, ...] = (
        jnp.zeros(k, jnp.int32),
        jnp.float32(0.0),
        jnp.full(k, -1, jnp.int32),
        jnp.full(k, jnp.inf, jnp.float32),
    )
    starts = jnp.arange(num_blocks, dtype=jnp.int32) * block
    totals, assignments = jax.lax.scan(one_block, totals, (blocks, valid, starts))
    sizes, inertia, nearest, _ = totals
    return _Run(centroids, assignments, nearest, sizes, inertia)


def mean_silhouette(
    points: np.ndarray, assignments: np.ndarray, *, seed: int = 0, max_rows: int = 2000
) -> float | None:
    """Return the mean silhouette in [-1, 1] (Rousseeuw 1987) of at most `max_rows` drawn rows.

    Uses Euclidean distances; a single point in a cluster scores 0. Returns None if the rows are all
    in one cluster or each in a different one, for which the silhouette is not defined.
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
    # A point's distance to itself is zero; the Gram form only approximates it.
    others = 1.0 - jnp.eye(n, dtype=jnp.float32)
    distances = jnp.sqrt(_squared_distances(points, points)) * others
    member = jax.nn.one_hot(labels, num_labels)
    sizes = jnp.sum(member, axis=0)
    totals = jnp.matmul(distances, member, precision="highest")  # (n, labels)
    size = sizes[labels]
    within = jnp.sum(totals * member, axis=1) / jnp.maximum(size - 1.0, 1.0)
    elsewhere = jnp.where(member > 0, jnp.inf, totals / sizes[None, :])
    other = jnp.min(elsewhere, axis=1)
    largest = jnp.maximum(within, other)
    score = jnp.where(largest > 0, (other - within) / jnp.where(largest > 0, largest, 1.0), 0.0)
    return jnp.mean(jnp.where(size > 1, score, 0.0))
