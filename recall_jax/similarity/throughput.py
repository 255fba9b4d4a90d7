"""Every measure between all layers of two models, over samples, widths and layers.

The representations are random, layers and models in part alike. Ours are on the device beforehand;
its first call, with compilation, is told apart. Others compare the same first layers, one pair.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.files.progress import Progress, silent
from recall_jax.parallel.machine import device, processor, versions
from recall_jax.similarity.matrix import similarity_matrix
from recall_jax.similarity.operations import operations
from recall_jax.similarity.plain import PLAIN, Adapter, Library, find_libraries

FORMAT = 1
_PATIENCE = 5.0  # seconds after which a call is repeated no more
_LEAST_SECONDS = 0.02  # of the product that the roof is taken from


@dataclass(frozen=True)
class Shape:
    """Two models, of each so many layers (samples, width)."""

    samples: int
    width: int
    layers: int

    @property
    def pairs(self) -> int:
        """How many values the matrix between them has."""
        return self.layers**2


@dataclass(frozen=True)
class Timing:
    """Seconds of the first call, and of those after it."""

    first: float
    median: float
    min: float
    max: float
    repeats: int


@dataclass(frozen=True)
class Rival:
    """Other software on one pair: seconds, the value of that pair, or why there are none."""

    name: str
    seconds: Timing | None
    value: float | None
    times_slower: float | None  # for a pair, than ours
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """One measure at one shape: seconds of the whole matrix, and the value of its first pair."""

    measure: str
    shape: Shape
    seconds: Timing
    pairs_per_second: float
    value: float | None
    operations: float
    roof_fraction: float
    others: tuple[Rival, ...]


@dataclass(frozen=True)
class Benchmark:
    """All cases, the roof in operations a second, and what there was nothing to compare with."""

    cases: tuple[Case, ...]
    roof: float
    roof_width: int
    missing: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What similarity.json holds."""
        return {
            "format": FORMAT,
            "date": datetime.now().isoformat(timespec="seconds"),
            "machine": processor(),
            "device": device(),
            "versions": versions(),
            "dtype": "float32",
            **asdict(self),
        }


def run(
    measures: Sequence[str],
    shapes: Sequence[Shape],
    *,
    repeat: int,
    beside: Sequence[Adapter] = PLAIN,
    progress: Progress = silent,
) -> Benchmark:
    """Time these measures at these shapes, each call `repeat` times or for five seconds.

    What is `beside` them and installed is timed as well, where it has the measure. Raises
    InputError where a shape has too few samples for a measure.
    """
    libraries, missing = find_libraries(beside)
    roof, roof_width = matmul_roof()
    cases = []
    total = len(shapes) * len(measures)
    for number, (shape, measure) in enumerate(product(shapes, measures)):
        progress(f"{measure}, {shape.samples} x {shape.width}", number, total)
        cases.append(_case(measure, shape, libraries, roof, repeat))
    return Benchmark(tuple(cases), roof, roof_width, tuple(missing))


def _case(
    measure: str, shape: Shape, libraries: Sequence[Library], roof: float, repeat: int
) -> Case:
    X, Y = representations(shape)
    on_device = jax.device_put((X, Y))

    def compare() -> jax.Array:
        return jax.block_until_ready(similarity_matrix(*on_device, measure=measure))

    seconds, matrix = measure_time(compare, repeat)
    per_pair = seconds.median / shape.pairs
    needed = operations(measure, shape.samples, shape.width, shape.layers)
    others = [
        _rival(library, measure, X[0], Y[0], per_pair, repeat)
        for library in libraries
        if measure in library.pairs
    ]
    return Case(
        measure=measure,
        shape=shape,
        seconds=seconds,
        pairs_per_second=1 / per_pair,
        value=_finite(matrix[0, 0]),
        operations=needed,
        roof_fraction=needed / seconds.median / roof,
        others=tuple(others),
    )


def _rival(
    library: Library, measure: str, X: np.ndarray, Y: np.ndarray, per_pair: float, repeat: int
) -> Rival:
    pair = library.pairs[measure]
    try:
        seconds, value = measure_time(lambda: pair(X, Y), repeat)
    except Exception as error:  # what it refuses says as much as what it takes
        return Rival(library.name, None, None, None, f"{type(error).__name__}: {error}")
    return Rival(library.name, seconds, _finite(value), seconds.median / per_pair)


def _finite(value: Any) -> float | None:
    """A number as JSON can hold it, None for one that is not finite."""
    return float(value) if math.isfinite(value) else None


def representations(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random (layers, n, E) of two models: a part that all share, and a part of each layer's."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((shape.samples, shape.width), np.float32)
    own = rng.standard_normal((2, shape.layers, *shared.shape), np.float32)
    first, second = shared + own
    return first, second


def measure_time(call: Callable[[], Any], repeat: int) -> tuple[Timing, Any]:
    """Time a call: once, then `repeat` times or until five seconds have gone."""

    def timed() -> tuple[float, Any]:
        start = time.perf_counter()
        result = call()
        return time.perf_counter() - start, result

    first, result = timed()
    taken = [timed()[0]]
    while len(taken) < repeat and sum(taken) < _PATIENCE:
        taken.append(timed()[0])
    return Timing(first, statistics.median(taken), min(taken), max(taken), len(taken)), result


def matmul_roof(repeat: int = 5) -> tuple[float, int]:
    """Operations a second of a square float32 product at full precision, and the width of it.

    The best of `repeat`: no measure can be faster than the machine ever is.
    """
    product = jax.jit(lambda A: jnp.matmul(A, A, precision="highest"))
    width, seconds = 1024, 0.0
    while seconds < _LEAST_SECONDS:
        width *= 2
        A = jax.random.normal(jax.random.key(0), (width, width), jnp.float32)
        jax.block_until_ready(product(A))
        taken = []
        for _ in range(repeat):
            start = time.perf_counter()
            jax.block_until_ready(product(A))
            taken.append(time.perf_counter() - start)
        seconds = statistics.median(taken)
    return 2 * width**3 / min(taken), width
