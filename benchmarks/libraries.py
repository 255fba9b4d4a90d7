"""Other software that compares pairs of representations, each behind one small adapter.

numpy with scipy is always there; what else can be imported is compared with as well. An adapter
gives the library's functions of one pair by the names of our registry, where it has the measure or
one that is as much work. Where its definition is another, so is its value.
"""

from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from io import StringIO
from typing import Any

import numpy as np
from baselines import NUMPY, SCIKIT_LEARN

from recall_jax.similarity.plain import LibraryLoader, PairFunction


def _repsim() -> dict[str, PairFunction]:
    """The measures of ReSi (Klabunde et al. 2024), each of a pair (n, E)."""
    if find_spec("loguru") is not None:
        import_module("loguru").logger.disable("repsim")
    measures = import_module("repsim.measures").ALL_MEASURES

    def pair(X: np.ndarray, Y: np.ndarray, name: str) -> float:
        return measures[name](X, Y, "nd")

    return {ours: partial(pair, name=theirs) for ours, theirs in _REPSIM.items()}


def _netrep() -> dict[str, PairFunction]:
    """The rotation-invariant metrics of Williams et al. 2021."""
    metric = import_module("netrep.metrics").LinearMetric

    def pair(X: np.ndarray, Y: np.ndarray, ground: str) -> float:
        return metric(alpha=1.0, score_method=ground).fit_score(X, Y)

    return {
        "angular_procrustes": partial(pair, ground="angular"),
        "size_and_shape_distance": partial(pair, ground="euclidean"),
    }


def _torch_cka() -> dict[str, PairFunction]:
    """CKA of two torch modules; here they recite the representations, in one batch."""
    cka, torch = import_module("torch_cka").CKA, import_module("torch")

    class Recital(torch.nn.Module):  # type: ignore[name-defined]
        def __init__(self, X: np.ndarray) -> None:
            super().__init__()
            self.X, self.layer = torch.from_numpy(X), torch.nn.Identity()

        def forward(self, rows: Any) -> Any:
            return self.layer(self.X[rows])

    def pair(X: np.ndarray, Y: np.ndarray) -> float:
        models = Recital(X), Recital(Y)
        compared = cka(*models, "X", "Y", model1_layers=["layer"], model2_layers=["layer"])
        rows = torch.utils.data.TensorDataset(torch.arange(len(X)))
        loader = torch.utils.data.DataLoader(rows, batch_size=len(X))
        with redirect_stderr(StringIO()):  # its progress bar
            compared.compare(loader, loader)
        return compared.export()["CKA"].item()

    return {"debiased_linear_cka": pair}


_REPSIM = {
    "linear_cka": "CKA",
    "distance_correlation": "DistanceCorrelation",
    "rsa": "RSA",
    "jaccard_knn": "JaccardSimilarity",
    "second_order_cosine": "SecondOrderCosineSimilarity",
    "procrustes_distance": "OrthogonalProcrustesCenteredAndNormalized",
    "angular_procrustes": "OrthogonalAngularShapeMetricCentered",
    "size_and_shape_distance": "ProcrustesSizeAndShapeDistance",
    "aligned_cosine": "AlignedCosineSimilarity",
    "svcca": "SVCCA",
    "pwcca": "PWCCA",
    "linear_regression": "LinearRegression",
    "eigenspace_overlap": "EigenspaceOverlapScore",
    "gulp": "Gulp",
}
ADAPTERS: Sequence[LibraryLoader] = (
    LibraryLoader("numpy", "scipy", lambda: NUMPY),
    LibraryLoader("scikit-learn", "sklearn", lambda: SCIKIT_LEARN),
    LibraryLoader("ReSi", "repsim", _repsim),
    LibraryLoader("netrep", "netrep", _netrep),
    LibraryLoader("torch_cka", "torch_cka", _torch_cka),
)
