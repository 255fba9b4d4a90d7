"""Well-known measures as their definitions read, on numpy, scipy and scikit-learn.

Each takes X (n, E1) and Y (n, E2), numpy arrays, and compares this one pair: what ours is timed
beside. Plain, but not slow on purpose: kernels and features are chosen by what is smaller, and
singular values come without vectors. benchmarks/ has every other measure so, and other software.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

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
    return np.mean((X * Y).sum(axis=1) / (norms(X) * norms(Y)))


def linear_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """By Gram matrices, or by features where these are fewer."""
    X, Y = centred(X), centred(Y)
    if len(X) < max(X.shape[1], Y.shape[1]):
        return cosine(X @ X.T, Y @ Y.T)
    scale = np.linalg.norm(X.T @ X) * np.linalg.norm(Y.T @ Y)
    return np.linalg.norm(X.T @ Y) ** 2 / scale


def rbf_cka(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """sigma^2 is a quarter of the median squared distance, own pairs included."""
    return cosine(double_centred(rbf_kernel(X)), double_centred(rbf_kernel(Y)))


def rsa(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Spearman's correlation of correlation distances."""
    from scipy.spatial.distance import pdist
    from scipy.stats import spearmanr

    return spearmanr(pdist(X, "correlation"), pdist(Y, "correlation")).statistic


def mutual_knn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """Share of common neighbours by cosine."""
    return common_share(neighbours(X, k), neighbours(Y, k))


def procrustes_distance(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """Both sides centred and of norm one."""
    return np.sqrt(max(0.0, 2 - 2 * nuclear_norm(shape_of(X), shape_of(Y))))


def rbf_cka_by_scikit_learn(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """As `rbf_cka`, its kernels scikit-learn's."""
    from sklearn.metrics.pairwise import euclidean_distances
    from sklearn.metrics.pairwise import rbf_kernel as kernel_of

    def kernel(X: np.ndarray) -> np.ndarray:
        X = centred(X)
        return kernel_of(X, gamma=2 / np.median(euclidean_distances(X, squared=True)))

    return cosine(double_centred(kernel(X)), double_centred(kernel(Y)))


def mutual_knn_by_scikit_learn(X: np.ndarray, Y: np.ndarray, k: int = 10) -> Scalar:
    """As `mutual_knn`, the neighbours scikit-learn's."""
    return common_share(neighbours_by_scikit_learn(X, k), neighbours_by_scikit_learn(Y, k))


def centred(X: np.ndarray) -> np.ndarray:
    """The rows about their mean."""
    return X - X.mean(axis=0)


def shape_of(X: np.ndarray) -> np.ndarray:
    """The centred rows, of norm one together."""
    X = centred(X)
    return X / np.linalg.norm(X)


def norms(X: np.ndarray) -> np.ndarray:
    """The norm of each row."""
    return np.linalg.norm(X, axis=1)


def rbf_kernel(X: np.ndarray) -> np.ndarray:
    """(n, n), sigma^2 a quarter of the median squared distance, own pairs included."""
    from scipy.spatial.distance import cdist

    squared = cdist(X, X, "sqeuclidean")
    return np.exp(-squared / (0.5 * np.median(squared)))


def double_centred(K: np.ndarray) -> np.ndarray:
    """A kernel (n, n) of which every row and column has mean zero."""
    return K - K.mean(axis=0) - K.mean(axis=1, keepdims=True) + K.mean()


def cosine(K: np.ndarray, L: np.ndarray) -> Scalar:
    """The cosine of two matrices as vectors."""
    return np.vdot(K, L) / (np.linalg.norm(K) * np.linalg.norm(L))


def nuclear_norm(X: np.ndarray, Y: np.ndarray) -> Scalar:
    """The sum of the singular values of X^T Y."""
    from scipy.linalg import svdvals

    return svdvals(X.T @ Y).sum()


def neighbours(X: np.ndarray, k: int) -> np.ndarray:
    """Indices (n, k) of the nearest by cosine."""
    X = X / norms(X)[:, None]
    cosines = X @ X.T
    np.fill_diagonal(cosines, -np.inf)
    return np.argpartition(-cosines, k, axis=1)[:, :k]


def neighbours_by_scikit_learn(X: np.ndarray, k: int) -> np.ndarray:
    """As `neighbours`."""
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=k, metric="cosine").fit(X).kneighbors(return_distance=False)


def common_share(x: np.ndarray, y: np.ndarray) -> Scalar:
    """The mean share of indices (n, k) that two sides have in common."""
    return np.mean([len(np.intersect1d(*pair)) / x.shape[1] for pair in zip(x, y, strict=True)])


@dataclass(frozen=True)
class Library:
    """Other software, and its functions of one pair by the names of our registry."""

    name: str
    pairs: Mapping[str, Pair]


@dataclass(frozen=True)
class Adapter:
    """What makes a library of a Python `module`, where it can be imported."""

    name: str
    module: str
    pairs: Callable[[], Mapping[str, Pair]]


NUMPY: Mapping[str, Pair] = {
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
SCIKIT_LEARN: Mapping[str, Pair] = {
    "rbf_cka": rbf_cka_by_scikit_learn,
    "mutual_knn": mutual_knn_by_scikit_learn,
}
PLAIN: Sequence[Adapter] = (
    Adapter("numpy", "scipy", lambda: NUMPY),
    Adapter("scikit-learn", "sklearn", lambda: SCIKIT_LEARN),
)


def find_libraries(adapters: Sequence[Adapter] = PLAIN) -> tuple[list[Library], list[str]]:
    """What there is to compare with, and a line on each that is not there."""
    found, missing = [], []
    for adapter in adapters:
        try:
            if find_spec(adapter.module) is None:
                raise ImportError("not installed")
            found.append(Library(adapter.name, adapter.pairs()))
        except ImportError as error:
            missing.append(f"no comparison with {adapter.name}: {error}")
    return found, missing
