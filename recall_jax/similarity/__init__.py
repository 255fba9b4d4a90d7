"""Measure the similarity of representations, between two models or across K of them."""

from recall_jax.similarity.cca import mean_cca, pwcca, svcca
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
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.measures import MEASURES
from recall_jax.similarity.neighbours import jaccard_knn, mutual_knn, second_order_cosine
from recall_jax.similarity.paired import paired_rbf, row_cosine
from recall_jax.similarity.procrustes import (
    aligned_cosine,
    angular_procrustes,
    procrustes_distance,
    size_and_shape_distance,
)
from recall_jax.similarity.rsa import rsa
from recall_jax.similarity.subspace import eigenspace_overlap, gulp, linear_regression

__all__ = [
    "MEASURES",
    "Comparison",
    "aligned_cosine",
    "angular_procrustes",
    "compare_unit",
    "compare_units",
    "debiased_linear_cka",
    "debiased_rbf_cka",
    "distance_correlation",
    "eigenspace_overlap",
    "gulp",
    "hsic",
    "imd",
    "jaccard_knn",
    "linear_cka",
    "linear_regression",
    "mean_cca",
    "mutual_knn",
    "paired_rbf",
    "procrustes_distance",
    "pwcca",
    "rbf_cka",
    "rbf_similarity",
    "row_cosine",
    "rsa",
    "second_order_cosine",
    "similarity_matrix",
    "size_and_shape_distance",
    "svcca",
]
