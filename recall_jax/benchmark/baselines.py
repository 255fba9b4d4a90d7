"""The measures as their definitions read, on numpy, scipy and scikit-learn: what ours is held to.

Each takes X (n, E1) and Y (n, E2), numpy arrays, and compares this one pair. Plain, but not slow on
purpose: kernels and features are chosen by what is smaller, and singular values come without
vectors where that is enough.
"""

from collections.abc import Callable

import numpy as np

Scalar = float | np.floating
Pair = Callable[[np.ndarray, np.ndarray], Scalar]


def paired_rbf(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """sigma^2 is half the median squared distance within X."""
    from scipy.spatial.distance import pdist

    squared_sigma = 0.5 * np.median(pdist(X, "sqeuclidean"))
    return np.mean(np.exp(-((X - Y) ** 2).sum(axis=1) / (2 * squared_sigma)))


def row_cosine(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Mean cosine of x_i and y_i."""
    return np.mean((X * Y).sum(axis=1) / (_norms(X) * _norms(Y)))


def linear_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """By Gram matrices, or by features where these are fewer."""
    X, Y = _centred(X), _centred(Y)
    if len(X) < max(X.shape[1], Y.shape[1]):
        return _cosine(X @ X.T, Y @ Y.T)
    norms = np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)
    return np.linalg.norm(X.T @ Y) ** 2 / norms


def rbf_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """sigma^2 is a quarter of the median squared distance, own pairs included."""
    return _cosine(_double_centred(_rbf_kernel(X)), _double_centred(_rbf_kernel(Y)))


def debiased_linear_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of U-centred Gram matrices."""
    X, Y = _centred(X), _centred(Y)
    return _cosine(_u_centred(X @ X.T), _u_centred(Y @ Y.T))


def debiased_rbf_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of the kernels of `rbf_cka`, U-centred."""
    return _cosine(_u_centred(_rbf_kernel(X)), _u_centred(_rbf_kernel(Y)))


def hsic(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of linear kernels."""
    X, Y = _centred(X), _centred(Y)
    return np.vdot(X @ X.T, Y @ Y.T) / (len(X) - 1) ** 2


def distance_correlation(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Root of the cosine of double-centred distances."""
    from scipy.spatial.distance import cdist

    x, y = (_double_centred(cdist(Z, Z)) for Z in (X, Y))
    return np.sqrt(_cosine(x, y))


def rsa(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Spearman's correlation of correlation distances."""
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    return spearmanr(pdist(X, "correlation"), pdist(Y, "correlation")).statistic


def mutual_knn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Share of common neighbours by cosine."""
    x, y = _neighbours(X, k), _neighbours(Y, k)
    return np.mean([len(np.intersect1d(*pair)) / k for pair in zip(x, y, strict=True)])


def jaccard_knn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Common neighbours over all."""
    x, y = _neighbours(X, k), _neighbours(Y, k)
    return np.mean([_jaccard(set(one), set(two)) for one, two in zip(x, y, strict=True)])


def second_order_cosine(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Mean cosine of the similarities to the neighbours of either side."""
    x, y = (Z / _norms(Z)[:, None] for Z in (X, Y))
    either = np.zeros((len(X), len(X)), X.dtype)
    for near in (_neighbours(X, k), _neighbours(Y, k)):
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


def procrustes_distance(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred and of norm one."""
    return np.sqrt(max(0.0, 2 - 2 * _nuclear_norm(_shape(X), _shape(Y))))


def angular_procrustes(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred and of norm one."""
    return np.arccos(min(1.0, _nuclear_norm(_shape(X), _shape(Y))))


def size_and_shape_distance(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred."""
    X, Y = _centred(X), _centred(Y)
    return np.sqrt(max(0.0, np.sum(X**2) + np.sum(Y**2) - 2 * _nuclear_norm(X, Y)))


def aligned_cosine(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Row cosine after the best rotation; sides of one width."""
    from scipy.linalg import orthogonal_procrustes

    return row_cosine(X @ orthogonal_procrustes(X, Y)[0], Y)


def mean_cca(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Mean cosine of the principal angles between the centred spans."""
    from scipy.linalg import svdvals

    return np.mean(svdvals(_basis(_centred(X)).T @ _basis(_centred(Y))))


def svcca(X: np.ndarray, Y: np.ndarray, variance: float = 0.99) -> Scalar:
    """Mean CCA of the leading components."""
    from scipy.linalg import svd, svdvals

    def leading(X: np.ndarray) -> np.ndarray:
        U, values, _ = svd(_centred(X), full_matrices=False)
        shares = np.cumsum(values**2) / np.sum(values**2)
        return U[:, : np.searchsorted(shares, variance) + 1]

    return np.mean(svdvals(leading(X).T @ leading(Y)))


def pwcca(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Canonical correlations, weighted by X."""
    from scipy.linalg import svd

    X, Y = _centred(X), _centred(Y)
    basis = _basis(X)
    directions, correlations, _ = svd(basis.T @ _basis(Y), full_matrices=False)
    weights = np.abs((basis @ directions).T @ X).sum(axis=1)
    return np.sum(weights * correlations) / np.sum(weights)


def linear_regression(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """R^2 of X on Y."""
    X = _centred(X)
    return np.sum((_basis(_centred(Y)).T @ X) ** 2) / np.sum(X**2)


def eigenspace_overlap(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Of the spans as they are."""
    x, y = _basis(X), _basis(Y)
    return np.sum((x.T @ y) ** 2) / max(x.shape[1], y.shape[1])


def gulp(X: np.ndarray, Y: np.ndarray, regularization: float = 1e-2) -> Scalar:
    """Distance of the ridge projections, both sides centred and of norm one."""

    def projection(X: np.ndarray) -> np.ndarray:
        kernel = X @ X.T
        return np.linalg.solve(kernel + regularization * np.eye(len(X), dtype=X.dtype), kernel)

    return np.sum((projection(_shape(X)) - projection(_shape(Y))) ** 2)


def rbf_cka_by_scikit_learn(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """As `rbf_cka`, its kernels scikit-learn's."""
    from sklearn.metrics.pairwise import euclidean_distances, rbf_kernel

    def kernel(X: np.ndarray) -> np.ndarray:
        X = _centred(X)
        return rbf_kernel(X, gamma=2 / np.median(euclidean_distances(X, squared=True)))

    return _cosine(_double_centred(kernel(X)), _double_centred(kernel(Y)))


def mutual_knn_by_scikit_learn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """As `mutual_knn`, the neighbours scikit-learn's."""
    x, y = _neighbours_by_scikit_learn(X, k), _neighbours_by_scikit_learn(Y, k)
    return np.mean([len(np.intersect1d(*pair)) / k for pair in zip(x, y, strict=True)])


def jaccard_knn_by_scikit_learn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """As `jaccard_knn`, the neighbours scikit-learn's."""
    x, y = _neighbours_by_scikit_learn(X, k), _neighbours_by_scikit_learn(Y, k)
    return np.mean([_jaccard(set(one), set(two)) for one, two in zip(x, y, strict=True)])


def distance_correlation_by_scikit_learn(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """As `distance_correlation`, the distances scikit-learn's."""
    from sklearn.metrics.pairwise import euclidean_distances

    x, y = (_double_centred(euclidean_distances(_centred(Z))) for Z in (X, Y))
    return np.sqrt(_cosine(x, y))


# By the names of the registry.
NUMPY: dict[str, Pair] = {
    function.__name__: function
    for function in (
        paired_rbf,
        row_cosine,
        linear_cka,
        rbf_cka,
        debiased_linear_cka,
        debiased_rbf_cka,
        hsic,
        distance_correlation,
        rsa,
        mutual_knn,
        jaccard_knn,
        second_order_cosine,
        imd,
        procrustes_distance,
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
}
SCIKIT_LEARN: dict[str, Pair] = {
    "rbf_cka": rbf_cka_by_scikit_learn,
    "mutual_knn": mutual_knn_by_scikit_learn,
    "jaccard_knn": jaccard_knn_by_scikit_learn,
    "distance_correlation": distance_correlation_by_scikit_learn,
}


def _centred(X: np.ndarray) -> np.ndarray:
    return X - X.mean(axis=0)


def _shape(X: np.ndarray) -> np.ndarray:
    X = _centred(X)
    return X / np.linalg.norm(X)


def _norms(X: np.ndarray) -> np.ndarray:
    return np.linalg.norm(X, axis=1)


def _double_centred(K: np.ndarray) -> np.ndarray:
    return K - K.mean(axis=0) - K.mean(axis=1, keepdims=True) + K.mean()


def _rbf_kernel(X: np.ndarray) -> np.ndarray:
    from scipy.spatial.distance import cdist

    squared = cdist(X, X, "sqeuclidean")
    return np.exp(-squared / (0.5 * np.median(squared)))


def _u_centred(K: np.ndarray) -> np.ndarray:
    n = len(K)
    K = K - np.diag(np.diag(K))
    sums = K.sum(axis=0)
    K = K - (sums[:, None] + sums[None, :]) / (n - 2) + sums.sum() / ((n - 1) * (n - 2))
    return K - np.diag(np.diag(K))


def _cosine(K: np.ndarray, L: np.ndarray) -> Scalar:
    return np.vdot(K, L) / (np.linalg.norm(K) * np.linalg.norm(L))


def _nuclear_norm(X: np.ndarray, Y: np.ndarray) -> Scalar:
    from scipy.linalg import svdvals

    return svdvals(X.T @ Y).sum()


def _basis(X: np.ndarray) -> np.ndarray:
    """Orthonormal, (n, rank)."""
    from scipy.linalg import svd

    U, values, _ = svd(X, full_matrices=False)
    return U[:, values > len(values) * np.finfo(X.dtype).eps * values[0]]


def _neighbours(X: np.ndarray, k: int) -> np.ndarray:
    """Indices (n, k) of the nearest by cosine."""
    X = X / _norms(X)[:, None]
    cosines = X @ X.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, k, axis=1)[:, :k]


def _neighbours_by_scikit_learn(X: np.ndarray, k: int) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, metric="cosine").fit(X).kneighbors(return_distance=False)


def _jaccard(x: set[int], y: set[int]) -> float:
    return len(x & y) / len(x | y)
