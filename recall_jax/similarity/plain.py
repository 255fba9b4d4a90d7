"""Compute well-known measures by their definitions with numpy, scipy and scikit-learn.

Each function compares one pair of numpy arrays X (n, E1) and Y (n, E2); they are the baselines of
the benchmark. They are plain, but not slow on purpose: they use kernels or features, whichever is
smaller, and compute no singular vectors. benchmarks/ has the other measures, and other software.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np

Scalar = float | np.floating
PairFunction = Callable[[np.ndarray, np.ndarray], Scalar]


def paired_rbf(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return the mean RBF of x_i and y_i; sigma^2 is half the median squared distance within X."""
    from scipy.spatial.distance import pdist

    squared_sigma = 0.5 * np.median(pdist(X, "sqeuclidean"))
    return np.mean(np.exp(-((X - Y) ** 2).sum(axis=1) / (2 * squared_sigma)))


def row_cosine(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return the mean cosine of x_i and y_i."""
    return np.mean((X * Y).sum(axis=1) / (norms(X) * norms(Y)))


def linear_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return linear CKA, by Gram matrices or by features, whichever are smaller."""
    X, Y = centred(X), centred(Y)
    if len(X) < max(X.shape[1], Y.shape[1]):
        return cosine(X @ X.T, Y @ Y.T)
    scale = np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)
    return np.linalg.norm(X.T @ Y) ** 2 / scale


def rbf_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return the CKA of the `rbf_kernel` of both sides."""
    return cosine(double_centred(rbf_kernel(X)), double_centred(rbf_kernel(Y)))


def rsa(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return Spearman's correlation of the sides' correlation distances."""
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    return spearmanr(pdist(X, "correlation"), pdist(Y, "correlation")).statistic


def mutual_knn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Return the mean fraction of neighbours by cosine that both sides share."""
    return common_share(neighbours(X, k), neighbours(Y, k))


def procrustes_distance(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return the Procrustes distance, both sides centred and of norm one."""
    return np.sqrt(max(0.0, 2 - 2 * nuclear_norm(shape_of(X), shape_of(Y))))


def rbf_cka_by_scikit_learn(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return `rbf_cka` with the kernels of scikit-learn."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.metrics.pairwise import rbf_kernel as kernel_of

    def kernel(X: np.ndarray) -> np.ndarray:
        X = centred(X)
        return kernel_of(X, gamma=2 / np.median(euclidean_distances(X, squared=True)))

    return cosine(double_centred(kernel(X)), double_centred(kernel(Y)))


def mutual_knn_by_scikit_learn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Return `mutual_knn` with the neighbours of scikit-learn."""
    return common_share(neighbours_by_scikit_learn(X, k), neighbours_by_scikit_learn(Y, k))


def centred(X: np.ndarray) -> np.ndarray:
    """Subtract the mean of the rows."""
    return X - X.mean(axis=0)


def shape_of(X: np.ndarray) -> np.ndarray:
    """Centre the rows, and scale the matrix to norm one."""
    X = centred(X)
    return X / np.linalg.norm(X)


def norms(X: np.ndarray) -> np.ndarray:
    """Return the norm of each row."""
    return np.linalg.norm(X, axis=1)


def rbf_kernel(X: np.ndarray) -> np.ndarray:
    """Return the RBF kernel (n, n).

    sigma^2 is a quarter of the median squared distance, which counts each sample with itself.
    """
    from scipy.spatial.distance import cdist

    squared = cdist(X, X, "sqeuclidean")
    return np.exp(-squared / (0.5 * np.median(squared)))


def double_centred(K: np.ndarray) -> np.ndarray:
    """Centre the rows and the columns of a kernel (n, n)."""
    return K - K.mean(axis=0) - K.mean(axis=1, keepdims=True) + K.mean()


def cosine(K: np.ndarray, L: np.ndarray) -> Scalar:
    """Return the cosine of two matrices as vectors."""
    return np.vdot(K, L) / (np.linalg.norm(K) * np.linalg.norm(L))


def nuclear_norm(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Return the sum of the singular values of X^T Y."""
    from scipy.linalg import svdvals

    return svdvals(X.T @ Y).sum()


def neighbours(X: np.ndarray, k: int) -> np.ndarray:
    """Return the indices (n, k) of the nearest samples by cosine."""
    X = X / norms(X)[:, None]
    cosines = X @ X.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, k, axis=1)[:, :k]


def neighbours_by_scikit_learn(X: np.ndarray, k: int) -> np.ndarray:
    """Return `neighbours` by scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, metric="cosine").fit(X).kneighbors(return_distance=False)


def common_share(x: np.ndarray, y: np.ndarray) -> Scalar:
    """Return the mean fraction of indices (n, k) that two sides have in common."""
    return np.mean([len(np.intersect1d(*pair)) / x.shape[1] for pair in zip(x, y, strict=True)])


@dataclass(frozen=True)
class Library:
    """Hold the measures of other software for one pair, by their names in our registry."""

    name: str
    pairs: Mapping[str, PairFunction]


@dataclass(frozen=True)
class LibraryLoader:
    """Describe how to get the measures of a library, if its `module` can be imported."""

    name: str
    module: str
    pairs: Callable[[], Mapping[str, PairFunction]]


NUMPY: Mapping[str, PairFunction] = {
    function.__name__: function
    for function in (
        paired_rbf,
        row_cosine,
        linear_cka,
        rbf_cka,
        rsa,
        mutual_knn,
        procrustes_distance,
    )
}
SCIKIT_LEARN: Mapping[str, PairFunction] = {
    "rbf_cka": rbf_cka_by_scikit_learn,
    "mutual_knn": mutual_knn_by_scikit_learn,
}
PLAIN: Sequence[LibraryLoader] = (
    LibraryLoader("numpy", "scipy", lambda: NUMPY),
    LibraryLoader("scikit-learn", "sklearn", lambda: SCIKIT_LEARN),
)


def find_libraries(adapters: Sequence[LibraryLoader] = PLAIN) -> tuple[list[Library], list[str]]:
    """Return the libraries that can be imported, and a line for each that cannot."""
    found, missing = [], []
    for adapter in adapters:
        try:
            if find_spec(adapter.module) is None:
                raise ImportError("not installed")
            found.append(Library(adapter.name, adapter.pairs()))
        except ImportError as error:
            missing.append(f"no comparison with {adapter.name}: {error}")
    return found, missing
