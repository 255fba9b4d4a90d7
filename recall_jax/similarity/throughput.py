"""Time the measures between all layers of two models, over samples, widths and layers.

The representations are random, with a part that all layers share. They are on the device before the
clock starts, and the first call, which compiles, is timed separately. Other software compares only
the models' first layers.
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
from recall_jax.similarity.plain import PLAIN, Library, LibraryLoader, find_libraries

FORMAT = 1
_PATIENCE = 5.0  # seconds after which a call is not repeated
_LEAST_SECONDS = 0.02  # duration of the product that measures the peak


@dataclass(frozen=True)
class Shape:
    """Describe the input: two models with `layers` layers (samples, width) each."""

    samples: int
    width: int
    layers: int

    @property
    def pairs(self) -> int:
        """Return the number of values in the matrix between the models."""
        return self.layers**2


@dataclass(frozen=True)
class Timing:
    """Hold the seconds of the first call, and statistics of the calls after it."""

    first: float
    median: float
    min: float
    max: float
    repeats: int


@dataclass(frozen=True)
class Rival:
    """Hold the seconds and the value of other software for one pair, or its error."""

    name: str
    seconds: Timing | None
    value: float | None
    times_slower: float | None  # than ours, per pair
    error: str | None = None


@dataclass(frozen=True)
class Case:
    """Hold the seconds of a measure's full matrix at one shape, and the value of its first pair."""

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
    """Hold all cases, the peak in operations per second, and the libraries that are missing."""

    cases: tuple[Case, ...]
    roof: float
    roof_width: int
    missing: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """Return the content of the benchmark's similarity.json."""
        return {
            "format": FORMAT,
            "date": datetime.now().isoformat(timespec="seconds"),
            "machine": processor(),
            "device": device(),
            "versions": versions(),
            "dtype": "float32",
            **asdict(self),
        }


def run_benchmark(
    measures: Sequence[str],
    shapes: Sequence[Shape],
    *,
    repeat: int,
    adapters: Sequence[LibraryLoader] = PLAIN,
    progress: Progress = silent,
) -> Benchmark:
    """Time these measures at these shapes, each call `repeat` times or for five seconds.

    The installed libraries among `adapters` are timed as well, if they have the measure. Raises
    InputError if a shape has too few samples for a measure.
    """
    libraries, missing = find_libraries(adapters)
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
    except Exception as error:  # a library that fails is a result too
        return Rival(library.name, None, None, None, f"{type(error).__name__}: {error}")
    return Rival(library.name, seconds, _finite(value), seconds.median / per_pair)


def _finite(value: Any) -> float | None:
    """Return a number for JSON; None if it is not finite."""
    return float(value) if math.isfinite(value) else None


def representations(shape: Shape, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw (layers, n, E) of two models, each layer the sum of a shared and a separate part."""
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((shape.samples, shape.width), np.float32)
    separate = rng.standard_normal((2, shape.layers, *shared.shape), np.float32)
    first, second = shared + separate
    return first, second


def measure_time(call: Callable[[], Any], repeat: int) -> tuple[Timing, Any]:
    """Time a call: once, then `repeat` times or until five seconds have passed."""

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
    """Return the operations per second of a square float32 product, and its width.

    The product runs at full precision, `repeat` times; the fastest counts, because no measure can
    be faster than the machine at its peak.
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
