"""Tensors merged over a mesh are those merged on one device, in the order of the file."""

from functools import partial

import ml_dtypes
import numpy as np
import pytest

from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.engine.chunks import merge_tensor
from recall_jax.engine.layout import ON_HOST
from recall_jax.engine.pod import merge as pod_merge
from recall_jax.engine.pod.layout import Sharded
from recall_jax.engine.pod.rows import put_rows_layout
from recall_jax.engine.sources import Inputs
from recall_jax.methods.average import average
from recall_jax.methods.dare import dare
from recall_jax.methods.linear import linear_sum
from recall_jax.methods.opcm import opcm, sequential_sum
from recall_jax.methods.registry import METHODS
from recall_jax.methods.regmean import regmean
from recall_jax.methods.task_arithmetic import task_arithmetic
from recall_jax.methods.ties import ties
from recall_jax.parallel.mesh import make_mesh

pytestmark = pytest.mark.eight_devices

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
MESHES = [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}, {"model": 2, "tensor": 3}]
WEIGHTS = np.asarray([0.5, 0.2, 0.3], np.float32)
LAMBDA = np.float32(0.7)
DENSITY = np.asarray([0.3, 0.5, 0.9], np.float32)

ELEMENTWISE = {
    "linear": (average, {"weight": WEIGHTS}, False),
    "task_arithmetic": (task_arithmetic, {"weight": WEIGHTS, "lambda_": LAMBDA}, True),
}
GRAMS = np.stack(
    [draw.T @ draw for draw in np.random.default_rng(3).standard_normal((3, 50, 13), np.float32)]
)
WHOLE = {
    "ties": (ties, {"weight": WEIGHTS, "density": DENSITY, "lambda_": LAMBDA}, True),
    "dare_ties": (
        partial(dare, consensus=True),
        {"weight": WEIGHTS, "density": DENSITY, "lambda_": LAMBDA, "seed": np.uint32(7)},
        True,
    ),
    "opcm": (opcm, {"lambda_": LAMBDA, "alpha": np.float32(0.5)}, True),
    "regmean": (regmean, {"weight": WEIGHTS, "gram": GRAMS, "alpha": np.float32(0.9)}, False),
}


def models_of(shape, dtype, count=4):
    """Models and their base, near to one another, some of whose elements are equal or tiny."""
    draws = np.random.default_rng(0)
    base = draws.standard_normal(shape)
    models = [base + 0.1 * draws.standard_normal(shape) for _ in range(count - 1)]
    arrays = [np.asarray(model, np.float64).astype(dtype) for model in (*models, base)]
    for array in arrays:
        flat = array.reshape(-1)
        flat[: flat.size // 3] = arrays[-1].reshape(-1)[: flat.size // 3]
        if flat.size > 8:
            tiny = np.finfo(np.float32) if dtype == np.float32 else ml_dtypes.finfo(dtype)
            flat[:3] = [-0.0, tiny.smallest_subnormal, -tiny.smallest_subnormal]
    return arrays


def inputs_of(arrays, *, base):
    models = list(arrays)
    own = models.pop() if base else None
    return Inputs(models, own)


def merged_on(mesh, arrays, values, spec, kernel, *, base, **how):
    layout = Sharded(mesh)
    rows = inputs_of([put_rows_layout(array, mesh) for array in arrays], base=base)
    return joined(layout.merge(rows, values, spec, kernel=kernel, reference=0, **how))


def joined(pieces):
    found = []
    for piece in pieces:
        assert bool(piece.finite)
        found.append(np.asarray(piece.elements)[piece.skip :])
    return np.concatenate(found)


def expected(arrays, values, spec, kernel, *, base, full=False):
    inputs = inputs_of(arrays, base=base)
    chunk = {"chunk": None} if full else {}
    return joined(merge_tensor(inputs, values, spec.dtype, kernel=kernel, reference=0, **chunk))


def units_apart(one, other):
    """By how many numbers of their dtype two arrays differ at most."""
    kind = {2: np.int16, 4: np.int32}[one.dtype.itemsize]
    bits = [array.view(kind).astype(np.int64) for array in (one, other)]
    ordered = [np.where(each < 0, np.iinfo(kind).min - each, each) for each in bits]
    return np.abs(ordered[0] - ordered[1]).max(initial=0)


@pytest.mark.parametrize(
    ("method", "sizes"),
    [*[("linear", sizes) for sizes in MESHES], ("task_arithmetic", MESHES[2])],
    ids=str,
)
@pytest.mark.optimised  # in haste, programs of other shapes may round a sum otherwise
def test_elementwise_methods_give_the_same_bits(method, sizes, monkeypatch):
    monkeypatch.setattr(pod_merge, "CHUNK", 256)  # so that a tensor is of several pieces
    kernel, values, base = ELEMENTWISE[method]
    mesh = make_mesh(sizes)
    for shape, dtype in [((37, 13), BFLOAT16), ((5,), np.dtype(np.float32)), ((), BFLOAT16)]:
        arrays = models_of(shape, dtype)[0 if base else 1 :]
        if not base:
            arrays = arrays[:3]
        spec = TensorSpec(dtype, shape)
        given = (arrays, values, spec, kernel)
        found, right = merged_on(mesh, *given, base=base), expected(*given, base=base)
        assert found.dtype == right.dtype
        np.testing.assert_array_equal(found.view(np.uint8), right.view(np.uint8))


@pytest.mark.parametrize("method", WHOLE)
def test_whole_tensors_merge_to_the_same_within_a_unit_in_the_last_place(method):
    kernel, values, base = WHOLE[method]
    # of rows that 8 divides, of elements that 8 divides, and of neither
    for shape in [(40, 13), (42, 12), (37, 13)] if method == "ties" else [(37, 13)]:
        arrays = models_of(shape, BFLOAT16)
        given = (arrays if base else arrays[:3], values, TensorSpec(BFLOAT16, shape), kernel)
        replicated = METHODS[method].needs.replicated
        how = {"base": base, "full": True, "replicated": replicated}
        found = merged_on(make_mesh(MESHES[2]), *given, **how)
        assert units_apart(found, expected(*given, base=base, full=True)) <= 1


def test_tensors_of_other_dtypes_are_as_on_one_device():
    mesh = make_mesh(MESHES[2])
    for dtype, shape in [
        (np.float64, (9, 2)),
        (np.int64, (9,)),
        (np.bool_, ()),
        (np.float32, (0, 3)),
    ]:
        arrays = [np.arange(k, k + np.prod(shape)).reshape(shape).astype(dtype) for k in (0, 1, 7)]
        spec = TensorSpec(np.dtype(dtype), shape)
        given = (arrays, {"weight": WEIGHTS}, spec, average)
        found, right = merged_on(mesh, *given, base=False), expected(*given, base=False)
        assert found.dtype == right.dtype == dtype
        np.testing.assert_array_equal(found, right)


def test_a_model_that_is_not_finite_is_named():
    layout = Sharded(make_mesh(MESHES[0]))
    arrays = [np.ones((12, 3), np.float32) for _ in range(3)]
    arrays[1][11, 2] = np.inf
    rows = [put_rows_layout(array, layout.mesh) for array in arrays]
    spec = TensorSpec(np.dtype(np.float16), (12, 3))
    values = {"weight": WEIGHTS[:2], "lambda_": LAMBDA}
    inputs = Inputs(rows[:2], rows[2])
    (piece, *_) = layout.merge(inputs, values, spec, kernel=task_arithmetic)
    assert not bool(piece.finite)
    names = Inputs(["model 0", "model 1"], "base")
    told = "model 1: tensor t holds NaN or infinite values; repair this model"
    assert layout.fault(names, "t", inputs) == told
    large = Inputs(
        [put_rows_layout(np.full((12, 3), 4e4, np.float32), layout.mesh) for _ in range(2)]
    )
    (piece, *_) = layout.merge(large, {"weight": np.ones(2, np.float32)}, spec, kernel=linear_sum)
    assert not bool(piece.finite)
    assert layout.fault(Inputs(names.models), "t", large) is None


@pytest.mark.parametrize("full", [False, True])
def test_what_is_summed_over_a_tensor_is_as_on_one_host(full):
    def squares(models, values, base):
        return sequential_sum(models, values, base)[1]

    layout = Sharded(make_mesh(MESHES[2]))
    inputs = inputs_of(models_of((37, 13), BFLOAT16), base=True)
    values = {"alpha": np.float32(0.5)} if full else {}
    spec = TensorSpec(BFLOAT16, (37, 13))
    right = ON_HOST.sum_chunks(squares, inputs, values, spec, full=full)
    rows = inputs.map(lambda array: put_rows_layout(array, layout.mesh))
    found = layout.sum_chunks(squares, rows, values, spec, full=full)
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, right, rtol=1e-6)
    assert layout.fault(Inputs(["a", "b", "c"], "base"), "t", rows) is None
