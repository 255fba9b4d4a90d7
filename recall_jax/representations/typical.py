"""Choose the typical samples: the row nearest to each centroid of the newest task's data."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from recall_jax.representations.kmeans import kmeans, mean_silhouette

# Below this mean silhouette the clusters overlap so much that typical rows represent little.
POOR_SILHOUETTE = 0.05


@dataclass(frozen=True)
class Typical:
    """Hold the m typical rows, ascending and distinct, and the size of each one's cluster."""

    rows: np.ndarray  # (m,) int64, indices into the points
    cluster_sizes: np.ndarray  # (m,) int64
    inertia: float
    silhouette: float | None = None
    clusters: int = 0  # number requested; 0 if every row is typical

    def summary(self) -> dict[str, Any]:
        """Return the `typical` entry of the report."""
        return {
            "cluster_sizes": self.cluster_sizes.tolist(),
            "inertia": self.inertia,
            "silhouette": self.silhouette,
        }

    def warnings(self) -> list[str]:
        """Return one line for each reason to doubt the choice.

        Similar rows give fewer clusters than requested. According to the paper, RECALL may fail if
        the silhouette is low.
        """
        lines = []
        if len(self.rows) < self.clusters:
            lines.append(
                f"only {len(self.rows)} of {self.clusters} clusters have members, as rows of the "
                "data are alike to the model: give more varied rows, or a smaller samples.count"
            )
        if self.silhouette is not None and self.silhouette < POOR_SILHOUETTE:
            lines.append(
                f"clustering is poor: mean silhouette {self.silhouette:.3f} is below "
                f"{POOR_SILHOUETTE}, so the typical samples may not stand for the task; "
                "try fewer clusters (samples.count) or another unit (samples.unit)"
            )
        return lines


def select_typical(points: np.ndarray, count: int, *, seed: int = 0) -> Typical:
    """Choose the rows of `points` (n, E) float32 nearest to the centroids of `count` clusters.

    If there are no more rows than clusters, every row is typical. Equal rows may leave clusters
    empty; then there are fewer typical rows than clusters.
    """
    if len(points) <= count:
        return every_row(len(points))
    clusters = kmeans(points, count, seed=seed)
    filled = np.flatnonzero(clusters.nearest >= 0)
    by_row = filled[np.argsort(clusters.nearest[filled])]
    return Typical(
        rows=clusters.nearest[by_row].astype(np.int64),
        cluster_sizes=clusters.sizes[by_row].astype(np.int64),
        inertia=clusters.inertia,
        silhouette=mean_silhouette(points, clusters.assignments, seed=seed),
        clusters=count,
    )


def every_row(num_rows: int) -> Typical:
    """Return all rows as typical, each in a separate cluster."""
    return Typical(np.arange(num_rows), np.ones(num_rows, np.int64), 0.0)
