"""The streamed engine: K checkpoints merged unit by unit, in one walk.

Unit u of every model is read once; the models' hidden states are advanced through it and compared;
the weights that follow merge it; it is written and forgotten. The next unit is read while one is
computed and the last one written, each in a thread of its own. Memory is K copies of two units, two
merged ones, and the hidden states of the typical samples, whatever the depth.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.engine.device import not_finite, to_device
from recall_jax.engine.plan import Plan, is_float
from recall_jax.engine.progress import Clock, Progress, silent
from recall_jax.errors import InputError
from recall_jax.merging.methods import Kernel


def merge_stream(
    plan: Plan,
    weigh: Callable[[str, Sequence[Mapping[str, jax.Array]]], np.ndarray],
    write: Callable[[str, np.ndarray], None],
    *,
    kernel: Kernel,
    reference: int,
    clock: Clock,
    progress: Progress = silent,
) -> None:
    """Walk over the units: read, weigh, merge, write each tensor in the order of `plan.specs`.

    `weigh(unit, tensors)` gives the unit's weights, (K,) for all its tensors or (n, K), one row for
    each; `kernel` merges a tensor with them, and `reference` is the model whose elements pass where
    all agree. Raises InputError naming the tensor and the model where a parameter is not finite.
    """
    units = list(plan.units.items())

    def read_unit(names: Sequence[str]) -> tuple[list[dict[str, Any]], list[dict[str, jax.Array]]]:
        with clock.stage("read"):
            stored = [{name: model.read(name) for name in names} for model in plan.models]
            return stored, [{name: to_device(array) for name, array in m.items()} for m in stored]

    def write_unit(merged: Mapping[str, np.ndarray], names: Sequence[str]) -> None:
        with clock.stage("write"):
            for name in names:
                write(name, merged[name])

    with ThreadPoolExecutor(1, "read") as reader, ThreadPoolExecutor(1, "write") as writer:
        coming = reader.submit(read_unit, units[0][1])
        going = None
        for done, (unit, names) in enumerate(units):
            progress(unit, done, len(units))
            stored, tensors = coming.result()
            if done + 1 < len(units):
                coming = reader.submit(read_unit, units[done + 1][1])
            with clock.stage("forward"):
                weights = np.asarray(weigh(unit, tensors), np.float32)
                weights = np.broadcast_to(weights, (len(names), len(plan.models)))
            with clock.stage("merge"):
                merged = _merge_unit(plan, names, tensors, stored, weights, kernel, reference)
            del stored, tensors
            if going is not None:
                going.result()
            going = writer.submit(write_unit, merged, names)
            del merged
        if going is not None:
            going.result()
    progress("", len(units), len(units))


def _merge_unit(
    plan: Plan,
    names: Sequence[str],
    tensors: Sequence[Mapping[str, jax.Array]],
    stored: Sequence[Mapping[str, np.ndarray]],
    weights: np.ndarray,
    kernel: Kernel,
    reference: int,
) -> dict[str, np.ndarray]:
    """The merged tensors of one unit on the host, every value finite."""
    # Integers (step counts, buffers) have no mean: they are the newest model's.
    merged = {name: stored[-1][name] for name in names if not is_float(stored[-1][name].dtype)}
    for wide in (False, True):
        group = [n for n in names if n not in merged and (_has_float64(plan, stored, n) == wide)]
        if not group:
            continue
        rows = weights[[names.index(name) for name in group]]
        dtypes = tuple(plan.specs[name].dtype for name in group)
        # float64 exists in JAX only under x64; there equal elements still pass bit for bit.
        with jax.enable_x64(wide):
            inputs = stored if wide else tensors
            arrays = [[jnp.asarray(model[name]) for model in inputs] for name in group]
            results, finite = _merge_program(arrays, rows, kernel, reference, dtypes)
            finite = np.asarray(finite)
        if not finite.all():
            name = group[int(np.argmin(finite))]
            raise InputError(_why_not_finite(plan, name, [model[name] for model in stored]))
        merged |= {name: np.asarray(array) for name, array in zip(group, results, strict=True)}
    return merged


@partial(jax.jit, static_argnames=("kernel", "reference", "dtypes"))
def _merge_program(
    tensors: list[list[jax.Array]],
    weights: jax.Array,
    kernel: Kernel,
    reference: int,
    dtypes: tuple[Any, ...],
) -> tuple[list[jax.Array], jax.Array]:
    """Merge n tensors, each given for K models: (merged, which of them are finite (n,))."""
    merged = [
        kernel(models, weights[index], reference=reference, dtype=dtypes[index])
        for index, models in enumerate(tensors)
    ]
    return merged, jnp.stack([jnp.all(jnp.isfinite(array)) for array in merged])


def _has_float64(plan: Plan, stored: Sequence[Mapping[str, np.ndarray]], name: str) -> bool:
    dtypes = {plan.specs[name].dtype, *(model[name].dtype for model in stored)}
    return np.dtype(np.float64) in dtypes


def _why_not_finite(plan: Plan, name: str, arrays: Sequence[np.ndarray]) -> str:
    for model, array in zip(plan.models, arrays, strict=True):
        if fault := not_finite(model.name, {name: array}):
            return fault
    return (
        f"tensor {name} overflows {plan.specs[name].dtype} once merged: "
        "choose a wider out_dtype, such as bfloat16 or float32"
    )
