"""Register the measures. To add one, write its file in this folder, and give it a line here.

The first line of a measure's docstring is its definition, which users see: it is no sentence.
"""

from math import inf, pi, sqrt

from recall_jax.errors import InputError
from recall_jax.similarity import cca, centred, cka, neighbours, paired, procrustes, subspace
from recall_jax.similarity.distance_correlation import DISTANCE_CORRELATION, distance_correlation
from recall_jax.similarity.imd import IMD, LARGEST, imd
from recall_jax.similarity.measure import Measure
from recall_jax.similarity.rsa import RSA, rsa

MEASURES: dict[str, Measure] = {
    "paired_rbf": Measure(paired.paired_rbf, paired.PAIRED_RBF, symmetric=False),
    "row_cosine": Measure(paired.row_cosine, paired.ROW_COSINE, bounds=(-1.0, 1.0)),
    "linear_cka": Measure(cka.linear_cka, cka.LINEAR, cka.LINEAR_FEATURES),
    "rbf_cka": Measure(cka.rbf_cka, cka.RBF),
    "debiased_linear_cka": Measure(
        cka.debiased_linear_cka, cka.DEBIASED_LINEAR, bounds=(-1.0, 1.0)
    ),
    "debiased_rbf_cka": Measure(cka.debiased_rbf_cka, cka.DEBIASED_RBF, bounds=(-1.0, 1.0)),
    "hsic": Measure(centred.hsic, centred.HSIC, bounds=(-inf, inf)),
    "distance_correlation": Measure(distance_correlation, DISTANCE_CORRELATION),
    "rsa": Measure(rsa, RSA, bounds=(-1.0, 1.0)),
    "mutual_knn": Measure(neighbours.mutual_knn, neighbours.MUTUAL_KNN),
    "jaccard_knn": Measure(neighbours.jaccard_knn, neighbours.JACCARD_KNN),
    "second_order_cosine": Measure(
        neighbours.second_order_cosine, neighbours.SECOND_ORDER_COSINE, bounds=(-1.0, 1.0)
    ),
    "imd": Measure(imd, IMD, bounds=(0.0, LARGEST), distance=True),
    "procrustes_distance": Measure(
        procrustes.procrustes_distance, procrustes.DISTANCE, bounds=(0.0, sqrt(2)), distance=True
    ),
    "angular_procrustes": Measure(
        procrustes.angular_procrustes, procrustes.ANGLE, bounds=(0.0, pi / 2), distance=True
    ),
    "size_and_shape_distance": Measure(
        procrustes.size_and_shape_distance,
        procrustes.SIZE_AND_SHAPE,
        bounds=(0.0, inf),
        distance=True,
    ),
    "aligned_cosine": Measure(
        procrustes.aligned_cosine, procrustes.ALIGNED_COSINE, bounds=(-1.0, 1.0)
    ),
    "mean_cca": Measure(cca.mean_cca, cca.MEAN_CCA),
    "svcca": Measure(cca.svcca, cca.SVCCA),
    "pwcca": Measure(cca.pwcca, cca.PWCCA, symmetric=False),
    "linear_regression": Measure(
        subspace.linear_regression, subspace.LINEAR_REGRESSION, symmetric=False
    ),
    "eigenspace_overlap": Measure(subspace.eigenspace_overlap, subspace.EIGENSPACE_OVERLAP),
    "gulp": Measure(subspace.gulp, subspace.GULP, bounds=(0.0, inf), distance=True),
}
# Shorter names in common use.
ALIASES = {"rbf": "paired_rbf", "cosine": "row_cosine", "cka": "linear_cka"}


def find_measure(name: str) -> Measure:
    """Return the measure of that name or alias; InputError, which lists all, if there is none."""
    measure = MEASURES.get(ALIASES.get(name, name))
    if measure is None:
        known = ", ".join([*ALIASES, *MEASURES])
        raise InputError(f"unknown measure {name!r}: choose from {known}")
    return measure
