"""The measures as their definitions read, on numpy, scipy and scikit-learn: what ours is held to.

Those that `recall bench similarity` has beside ours, and all others: each takes X (n, E1) and
Y (n, E2), numpy arrays, and compares this one pair.
"""

import numpy as np

from recall_jax.similarity import plain
from recall_jax.similarity.plain import (
    PairFunction,
    Scalar,
    centred,
    cosine,
    double_centred,
    neighbours,
    neighbours_by_scikit_learn,
    norms,
    nuclear_norm,
    rbf_kernel,
    row_cosine,
    shape_of,
)


def debiased_linear_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of U-centred Gram matrices."""
    X, Y = centred(X), centred(Y)
    return cosine(_u_centred(X @ X.T), _u_centred(Y @ Y.T))


def debiased_rbf_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of the kernels of `rbf_cka`, U-centred."""
    return cosine(_u_centred(rbf_kernel(X)), _u_centred(rbf_kernel(Y)))


def hsic(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of linear kernels."""
    X, Y = centred(X), centred(Y)
    return np.vdot(X @ X.T, Y @ Y.T) / (len(X) - 1) ** 2


def distance_correlation(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Root of the cosine of double-centred distances."""
    from scipy.spatial.distance import cdist

    x, y = (double_centred(cdist(Z, Z)) for Z in (X, Y))
    return np.sqrt(cosine(x, y))


def jaccard_knn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Common neighbours over all."""
    x, y = neighbours(X, k), neighbours(Y, k)
    return np.mean([_jaccard(set(one), set(two)) for one, two in zip(x, y, strict=True)])


def second_order_cosine(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Mean cosine of the similarities to the neighbours of either side."""
    x, y = (Z / norms(Z)[:, None] for Z in (X, Y))
    either = np.zeros((len(X), len(X)), X.dtype)
    for near in (neighbours(X, k), neighbours(Y, k)):
        np.put_along_axis(either, near, 1, axis=1)
    return row_cosine(x @ x.T * either, y @ y.T * either)


def imd(X: np.ndarray, Y: np.ndarray, k: int = 5) -> Scalar:
    """Of the exact spectra of the graphs of neighbours."""
    from scipy.linalg import eigvalsh
    from scipy.spatial.distance import cdist

    times = np.logspace(-1, 1, 256)

    def heat(X: np.ndarray) -> np.ndarray:
        distances = cdist(X, X)
        np.fill_diagonal(distances, np.inf)
        joined = np.zeros_like(distances)
        np.put_along_axis(joined, np.argpartition(distances, k, axis=1)[:, :k], 1, axis=1)
        joined = np.maximum(joined, joined.T)
        scale = 1 / np.sqrt(joined.sum(axis=1))
        eigenvalues = 1 - eigvalsh(joined * scale[:, None] * scale)
        return np.exp(-times[:, None] * eigenvalues).mean(axis=1)

    return np.max(np.exp(-2 * (times + 1 / times)) * np.abs(heat(X) - heat(Y)))


def angular_procrustes(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred and of norm one."""
    return np.arccos(min(1.0, nuclear_norm(shape_of(X), shape_of(Y))))


def size_and_shape_distance(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred."""
    X, Y = centred(X), centred(Y)
    return np.sqrt(max(0.0, np.sum(X**2) + np.sum(Y**2) - 2 * nuclear_norm(X, Y)))


def aligned_cosine(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Row cosine after the best rotation; sides of one width."""
    from scipy.linalg import orthogonal_procrustes

    return row_cosine(X @ orthogonal_procrustes(X, Y)[0], Y)


def mean_cca(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Mean cosine of the principal angles between the centred spans."""
    from scipy.linalg import svdvals

    return np.mean(svdvals(_basis(centred(X)).T @ _basis(centred(Y))))


def svcca(X: np.ndarray, Y: np.ndarray, variance: float = 0.99) -> Scalar:
    """Mean CCA of the leading components."""
    from scipy.linalg import svd, svdvals

    def leading(X: np.ndarray) -> np.ndarray:
        U, values, _ = svd(centred(X), full_matrices=False)
        shares = np.cumsum(values**2) / np.sum(values**2)
        return U[:, : np.searchsorted(shares, variance) + 1]

    return np.mean(svdvals(leading(X).T @ leading(Y)))


def pwcca(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Canonical correlations, weighted by X."""
    from scipy.linalg import svd

    X, Y = centred(X), centred(Y)
    basis = _basis(X)
    directions, correlations, _ = svd(basis.T @ _basis(Y), full_matrices=False)
    weights = np.abs((basis @ directions).T @ X).sum(axis=1)
    return np.sum(weights * correlations) / np.sum(weights)


def linear_regression(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """R^2 of X on Y."""
    X = centred(X)
    return np.sum((_basis(centred(Y)).T @ X) ** 2) / np.sum(X**2)


def eigenspace_overlap(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of the spans as they are."""
    x, y = _basis(X), _basis(Y)
    return np.sum((x.T @ y) ** 2) / max(x.shape[1], y.shape[1])


def gulp(X: np.ndarray, Y: np.ndarray, regularization: float = 1e-2) -> Scalar:
    """Distance of the ridge projections, both sides centred and of norm one."""

    def projection(X: np.ndarray) -> np.ndarray:
        kernel = X @ X.T
        return np.linalg.solve(kernel + regularization * np.eye(len(X), dtype=X.dtype), kernel)

    return np.sum((projection(shape_of(X)) - projection(shape_of(Y))) ** 2)


def jaccard_knn_by_scikit_learn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """As `jaccard_knn`, the neighbours scikit-learn's."""
    x, y = neighbours_by_scikit_learn(X, k), neighbours_by_scikit_learn(Y, k)
    return np.mean([_jaccard(set(one), set(two)) for one, two in zip(x, y, strict=True)])


def distance_correlation_by_scikit_learn(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """As `distance_correlation`, the distances scikit-learn's."""
    from sklearn.metrics.pairwise import euclidean_distances

    x, y = (double_centred(euclidean_distances(centred(Z))) for Z in (X, Y))
    return np.sqrt(cosine(x, y))


# By the names of the registry.
NUMPY: dict[str, PairFunction] = {
    **plain.NUMPY,
    **{
        function.__name__: function
        for function in (
            debiased_linear_cka,
            debiased_rbf_cka,
            hsic,
            distance_correlation,
            jaccard_knn,
            second_order_cosine,
            imd,
            angular_procrustes,
            size_and_shape_distance,
            aligned_cosine,
            mean_cca,
            svcca,
            pwcca,
            linear_regression,
            eigenspace_overlap,
            gulp,
        )
    },
}
SCIKIT_LEARN: dict[str, PairFunction] = {
    **plain.SCIKIT_LEARN,
    "jaccard_knn": jaccard_knn_by_scikit_learn,
    "distance_correlation": distance_correlation_by_scikit_learn,
}


def _u_centred(K: np.ndarray) -> np.ndarray:
    n = len(K)
    K = K - np.diag(np.diag(K))
    sums = K.sum(axis=0)
    K = K - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return K - np.diag(np.diag(K))


def _basis(X: np.ndarray) -> np.ndarray:
    """Orthonormal, (n, rank)."""
    from scipy.linalg import svd

    U, values, _ = svd(X, full_matrices=False)
    return U[:, values > len(values) * np.finfo(X.dtype).eps * values[0]]


def _jaccard(x: set[int], y: set[int]) -> float:
    return len(x & y) / len(x | y)
