"""Similarity of representations: measures between two models, and the comparison of K of them."""

from recall_jax.similarity.centred import hsic
from recall_jax.similarity.cka import (
    debiased_linear_cka,
    debiased_rbf_cka,
    linear_cka,
    rbf_cka,
)
from recall_jax.similarity.compare import (
    Comparison,
    compare_unit,
    compare_units,
    rbf_similarity,
)
from recall_jax.similarity.distance_correlation import distance_correlation
from recall_jax.similarity.imd import imd
from recall_jax.similarity.measures import MEASURES
from recall_jax.similarity.neighbours import jaccard_knn, mutual_knn, second_order_cosine
from recall_jax.similarity.paired import paired_rbf, row_cosine
from recall_jax.similarity.rsa import rsa

__all__ = [
    "MEASURES",
    "Comparison",
    "compare_unit",
    "compare_units",
    "debiased_linear_cka",
    "debiased_rbf_cka",
    "distance_correlation",
    "hsic",
    "imd",
    "jaccard_knn",
    "linear_cka",
    "mutual_knn",
    "paired_rbf",
    "rbf_cka",
    "rbf_similarity",
    "row_cosine",
    "rsa",
    "second_order_cosine",
]
