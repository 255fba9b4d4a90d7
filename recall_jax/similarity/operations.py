"""Estimate the floating-point operations that a matrix of a measure takes at least.

The estimate counts matrix products and factorisations, to leading order (Golub & Van Loan): a
product 2abc, the triangular factor of (d, n) 2n^2 (d - n/3), singular values of (m, m) 8/3 m^3 and
26 m^3 with vectors, those of (n, m) with vectors on one side 6nm^2 + 20m^3, eigenvalues 4/3 n^3. It
does not count exponentials, sorting and ranks: measures dominated by these stay far below the peak.
"""

KERNELS = (
    "rbf_cka",
    "debiased_rbf_cka",
    "hsic",
    "distance_correlation",
    "rsa",
    "mutual_knn",
    "jaccard_knn",
    "second_order_cosine",
)
LINEAR_KERNELS = ("linear_cka", "debiased_linear_cka")
SHAPES = ("procrustes_distance", "angular_procrustes", "size_and_shape_distance")
SPANS = ("mean_cca", "svcca", "pwcca")
PROJECTIONS = ("linear_regression", "eigenspace_overlap", "gulp")


def operations(measure: str, num_samples: int, width: int, layers: int) -> float:
    """Return the operations for the matrix between two models with `layers` layers (n, E) each."""
    n, d, m = num_samples, width, min(num_samples, width)
    sides, pairs = 2 * layers, layers**2
    gram, factor = 2 * n * n * d, 2 * n * n * (d - n / 3) if n < d else 0.0
    basis = factor + 6 * n * m * m + 20 * m**3
    product = 2 * min(n, m) * m * m if n < d else 2 * n * m * m
    by_samples = sides * gram + pairs * 2 * n * n
    if measure in LINEAR_KERNELS:
        return min(by_samples, (sides + pairs) * 2 * n * d * d)
    if measure in KERNELS:
        return by_samples
    if measure in SHAPES:
        return sides * factor + pairs * (product + 8 / 3 * m**3)
    if measure in SPANS:
        return sides * basis + pairs * (product + 8 / 3 * m**3)
    if measure in PROJECTIONS:
        return sides * basis + pairs * product
    by_name = {
        "aligned_cosine": sides * factor + pairs * (product + 26 * m**3),
        "imd": sides * (gram + 4 / 3 * n**3),
        "paired_rbf": layers * gram + pairs * 3 * n * d,
        "row_cosine": pairs * 2 * n * d,
    }
    return by_name[measure]
