"""Similarity of representations: measures between two models, and the comparison of K of them."""

from recall_jax.similarity.compare import (
    Comparison,
    compare_unit,
    compare_units,
    rbf_similarity,
)
from recall_jax.similarity.measures import MEASURES, linear_cka, paired_rbf, row_cosine

__all__ = [
    "MEASURES",
    "Comparison",
    "compare_unit",
    "compare_units",
    "linear_cka",
    "paired_rbf",
    "rbf_similarity",
    "row_cosine",
]
