"""Similarity of representations: measures between two models, and the comparison of K of them."""

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
from recall_jax.similarity.centred import hsic
from recall_jax.similarity.measures import MEASURES
from recall_jax.similarity.paired import paired_rbf, row_cosine

__all__ = [
    "MEASURES",
    "Comparison",
    "compare_unit",
    "compare_units",
    "debiased_linear_cka",
    "debiased_rbf_cka",
    "hsic",
    "linear_cka",
    "paired_rbf",
    "rbf_cka",
    "rbf_similarity",
    "row_cosine",
]
