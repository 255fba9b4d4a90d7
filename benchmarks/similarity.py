"""Similarity, RBF kernels and k-means against ReSi, netrep, scipy and scikit-learn, on one machine.

    .venv/bin/python benchmarks/similarity.py [--only cka,procrustes,rbf,kmeans,measures] [--runs 5]

ReSi (repsim) and netrep are compared with where Python finds them, say by PYTHONPATH; scikit-learn
always. All in float32, in one process, each contender in turn, A B C A B C, after one warm-up of
each, medians; of all-pairs CKA, one run of ReSi's one by one. `measures` times every measure over
sizes as `recall bench similarity` does, beside all of this software and torch_cka.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from libraries import ADAPTERS
from measure import environment, median, report
from sklearn.cluster import KMeans
from sklearn.metrics.pairwise import rbf_kernel

from recall_jax.representations.kmeans import kmeans
from recall_jax.similarity import linear_cka, procrustes_distance
from recall_jax.similarity.alignment import center
from recall_jax.similarity.kernels import squared_distances
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.measures import MEASURES
from recall_jax.similarity.plain import find_libraries
from recall_jax.similarity.throughput import Shape, representations, run_benchmark

Row = dict[str, object]
OURS = "recall_jax"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--runs", type=int, default=5)
    args = parser.parse_args()
    packages = ("jax", "numpy", "scipy", "scikit-learn", "torch")
    for name in args.only.split(","):
        title, case = CASES[name]
        report(f"{title}, {args.runs} runs, median", case(args.runs), environment(*packages))


def in_turn(contenders: dict[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each call: the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs + 1):
        for name, call in contenders.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            seconds[name].append(time.perf_counter() - start)
    return {name: taken[1:] for name, taken in seconds.items()}


def rows_of(seconds: dict[str, list[float]]) -> list[Row]:
    """Medians and ranges, and each contender's over ours."""
    ours = median(seconds[OURS])
    return [
        {
            "what": name,
            "seconds": round(median(taken), 4),
            "range": [round(min(taken), 4), round(max(taken), 4)],
            "over ours": round(median(taken) / ours, 2),
        }
        for name, taken in seconds.items()
    ]


def all_pairs_cka(runs: int) -> list[Row]:
    X, Y = representations(Shape(samples=1000, width=2048, layers=25))
    there = jax.device_put((X, Y))
    contenders = {
        OURS: lambda: similarity_matrix(*there, measure="linear_cka"),
        f"{OURS}, one pair": lambda: linear_cka(there[0][0], there[1][0]),
    }
    pairs = {
        library.name: library.pairs["linear_cka"]
        for library in find_libraries(ADAPTERS)[0]
        if "linear_cka" in library.pairs
    }
    for name, pair in pairs.items():
        contenders[f"{name}, one pair"] = partial(pair, X[0], Y[0])
    seconds = in_turn(contenders, runs)
    for name, pair in pairs.items():
        start = time.perf_counter()
        values = np.asarray([[pair(x, y) for y in Y] for x in X])
        seconds[f"{name}, all 625 pairs one by one"] = [time.perf_counter() - start]
        np.testing.assert_allclose(contenders[OURS](), values, atol=1e-4)
    return rows_of(seconds)


def one_procrustes(runs: int) -> list[Row]:
    (X,), (Y,) = representations(Shape(samples=1000, width=2048, layers=1))
    there = jax.device_put((X, Y))
    contenders: dict[str, Callable[[], object]] = {OURS: lambda: procrustes_distance(*there)}
    for library in find_libraries(ADAPTERS)[0]:
        for measure in ("procrustes_distance", "angular_procrustes"):
            if measure in library.pairs:
                name = f"{library.name}, {measure}"
                contenders[name] = partial(library.pairs[measure], X, Y)
    return rows_of(in_turn(contenders, runs))


def rbf_gram(runs: int) -> list[Row]:
    rows: list[Row] = []

    @jax.jit
    def ours(X: jax.Array, sigma: float) -> jax.Array:
        return jnp.exp(-squared_distances(center(X), jnp.arange(len(X))) / (2 * sigma**2))

    for shape in ((1000, 2048), (5000, 512), (5000, 64)):
        X = np.random.default_rng(0).standard_normal(shape, np.float32)
        there, sigma = jax.device_put(X), shape[1] ** 0.5
        contenders = {
            OURS: partial(ours, there, sigma),
            "scikit-learn": partial(rbf_kernel, X, gamma=1 / (2 * sigma**2)),
        }
        np.testing.assert_allclose(contenders[OURS](), contenders["scikit-learn"](), atol=1e-5)
        rows += [{"shape": shape, **row} for row in rows_of(in_turn(contenders, runs))]
    return rows


def clustering(runs: int) -> list[Row]:
    """Whole calls of both, ten starts each, over as many seeds as runs."""
    rng = np.random.default_rng(0)
    n, width = 20_000, 1024
    mixing = rng.standard_normal((width, width)) / width**0.5
    spectrum = np.arange(1, width + 1) ** -0.7
    kinds = {
        "40 blobs that overlap": rng.standard_normal((40, width))[rng.integers(0, 40, n)]
        + 2 * rng.standard_normal((n, width)),
        "spectrum i^-0.7": (rng.standard_normal((n, width)) * spectrum) @ mixing,
    }
    contenders: dict[str, Callable[[np.ndarray, int], float]] = {
        OURS: lambda X, seed: kmeans(X, 20, seed=seed).inertia,
        "scikit-learn": lambda X, seed: KMeans(20, n_init=10, random_state=seed).fit(X).inertia_,
    }
    rows: list[Row] = []
    for kind, points in kinds.items():
        X = points.astype(np.float32)
        start = time.perf_counter()
        kmeans(X, 20)
        first = time.perf_counter() - start
        seconds: dict[str, list[float]] = {name: [] for name in contenders}
        inertia: dict[str, list[float]] = {name: [] for name in contenders}
        for seed in range(runs):
            for name, cluster in contenders.items():
                start = time.perf_counter()
                inertia[name].append(float(cluster(X, seed)))
                seconds[name].append(time.perf_counter() - start)
        for row in rows_of(seconds):
            found = inertia[str(row["what"])]
            rows.append({"points": kind, **row, "inertia": [median(found), min(found), max(found)]})
        rows.append({"points": kind, "what": f"{OURS}, first call", "seconds": round(first, 2)})
    return rows


def every_measure(runs: int) -> list[Row]:
    shapes = [Shape(samples, width=1024, layers=4) for samples in (300, 1000)]
    found = run_benchmark(list(MEASURES), shapes, repeat=runs, adapters=ADAPTERS)
    rows: list[Row] = [
        {
            "measure": case.measure,
            "samples": case.shape.samples,
            "seconds": round(case.seconds.median, 4),
            "of roof": round(case.roof_fraction, 2),
            "a pair over ours": {
                one.name: one.error or round(one.times_slower or 0, 2) for one in case.others
            },
        }
        for case in found.cases
    ]
    return [*rows, {"roof": round(found.roof / 1e9), "not compared with": found.missing}]


CASES = {
    "cka": ("linear CKA between 2 models of 25 layers, n=1000, d=2048", all_pairs_cka),
    "procrustes": ("Procrustes distance of a pair, n=1000, d=2048", one_procrustes),
    "rbf": ("RBF kernel matrix", rbf_gram),
    "kmeans": ("k-means, 20,000 x 1024, k=20, 10 starts", clustering),
    "measures": ("every measure between 2 models of 4 layers, d=1024", every_measure),
}

if __name__ == "__main__":
    main()
