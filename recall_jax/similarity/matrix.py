"""Compute matrices of a measure between many sides, with the work of each side done once.

Measures that are sums over samples run on blocks of samples: the block's rows of every side are
prepared, and all pairs of sides compared on them, by most measures in one matrix product. Other
measures prepare each side from all samples at once, and then compare pair by pair. On a mesh, the
devices share the blocks of samples, the sides, and the pairs.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from recall_jax.errors import InputError
from recall_jax.similarity.blocks import condense, sum_blocks
from recall_jax.similarity.measure import (
    Measure,
    SampleSum,
    Side,
    SidePair,
    accepting,
    as_samples,
    check_options,
    check_pair,
)
from recall_jax.similarity.measures import find_measure

# The default size of all sides' prepared rows in one block.
BLOCK_BYTES = 256 << 20

RepresentationArray = jax.Array | np.ndarray
StaticOptions = tuple[tuple[str, Any], ...]
Groups = tuple[jax.Array, ...]  # each (A, n, E), the sides of one width


def similarity_matrix(
    X: Sequence[RepresentationArray] | RepresentationArray,
    Y: Sequence[RepresentationArray] | RepresentationArray | None = None,
    *,
    measure: str = "linear_cka",
    block_size: int | None = None,
    mesh: Mesh | None = None,
    **options: Any,
) -> jax.Array:
    """Return a measure between A and B sides: (A, B), with entry [a, b] for X[a] and Y[b].

    X and Y are arrays (A, n, E), or sequences of representations (n, E) of the same n samples, of
    one width or several; without Y, X is compared with itself. `block_size` samples are processed
    at a time (by default as many as have 256 MiB of prepared rows, which take two to four times
    that), on all devices of a `mesh` with one axis, each of which holds all sides: neither changes
    a value beyond rounding. `options` are the measure's. paired_rbf works without sigma: then
    sigma^2 is half the median squared distance within X[a]. Raises InputError as the measure does,
    and if a measure that needs all samples at once is given a block size.
    """
    chosen = find_measure(measure)
    static = tuple(sorted(_complete(options, measure, chosen).items()))
    x, x_order = _grouped(X, "X")
    y, y_order = (None, x_order) if Y is None else _grouped(Y, "Y")
    dtype = np.result_type(*(group.dtype for group in (*x, *(y or ()))))
    x = tuple(group.astype(dtype) for group in x)
    y = y and tuple(group.astype(dtype) for group in y)
    for one in x:
        for other in y or x:
            check_pair(one.shape[1:], other.shape[1:], chosen.parts)
    if block_size is not None and not (isinstance(block_size, int) and block_size >= 1):
        raise InputError(f"block_size is {block_size}: give a number of samples, at least 1")
    if mesh is not None:
        mesh = _one_axis(mesh)
    parts, num_samples = _cheaper(chosen, x, y), x[0].shape[1]
    if isinstance(parts, SampleSum):
        block_size = min(num_samples, block_size or _block_size((*x, *(y or ())), mesh))
        matrix = _by_rows(parts, static, x, y, block_size, mesh)
    else:
        if parts is chosen.parts and block_size is not None and block_size < num_samples:
            if not parts.moments or dict(static).get("center") is False:
                raise InputError(f"{measure} takes all samples at once: leave out block_size")
            static = (("block_size", block_size), ("options", static), ("parts", parts))
            parts = _CONDENSED
        matrix = _by_sides(parts, static, x, y, chosen.symmetric, mesh)
    return matrix[np.argsort(x_order)][:, np.argsort(y_order)]


@partial(jax.jit, static_argnames=("parts", "options", "block_size", "mesh"))
def _by_rows(
    parts: SampleSum,
    options: StaticOptions,
    x: Groups,
    y: Groups | None,
    block_size: int,
    mesh: Mesh | None,
) -> jax.Array:
    """Compute the matrix of a measure that is a sum over samples."""
    n = x[0].shape[1]
    statistics = partial(accepting(parts.statistics, dict(options)), block_size=block_size)
    rows = accepting(parts.rows, dict(options))
    x_statistics, y_statistics = (
        [_each(lambda X, _: statistics(X), group, None, mesh) for group in groups]
        for groups in (x, y or ())
    )

    def prepare(groups: Groups, known: list[Any], index: jax.Array) -> Side:
        prepared = [
            jax.lax.map(lambda one: rows(one[0], index, one[1]), (group, its))
            for group, its in zip(groups, known, strict=True)
        ]
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *prepared)

    def with_itself(side: Side) -> jax.Array:
        single = jax.tree.map(lambda leaf: leaf[:, None], side)
        return jax.lax.map(lambda one: parts.pairs(one, one)[0, 0], single)

    def part(index: jax.Array, shared: tuple[Any, ...]) -> tuple[jax.Array, ...]:
        x, x_statistics, y, y_statistics = shared
        x_rows = prepare(x, x_statistics, index)
        if not y:
            xy = parts.pairs(x_rows, x_rows)
            return xy, jnp.diagonal(xy), jnp.diagonal(xy)
        y_rows = prepare(y, y_statistics, index)
        return parts.pairs(x_rows, y_rows), with_itself(x_rows), with_itself(y_rows)

    shared = (x, x_statistics, y or (), y_statistics)
    if mesh is None:
        sums = sum_blocks(lambda index: part(index, shared), n, block_size)
    else:
        sums = _sum_over_devices(part, shared, n, block_size, mesh)
    xy, xx, yy = sums
    return accepting(parts.score, dict(options))(xy, xx[:, None], yy[None, :], n)


def _sum_over_devices(
    part: Callable[..., Any], shared: Any, n: int, block_size: int, mesh: Mesh
) -> Any:
    """Sum `part` over blocks of samples, with the blocks distributed over the devices."""
    (axis,) = mesh.axis_names
    blocks = n // block_size
    numbers = jnp.arange(-(-blocks // mesh.size) * mesh.size)

    def local(numbers: jax.Array, shared: Any) -> Any:
        def block(number: jax.Array) -> Any:
            counted = number < blocks  # else it only pads the last round
            start = jnp.where(counted, number, 0) * block_size
            values = part(start + jnp.arange(block_size), shared)
            return jax.tree.map(lambda value: jnp.where(counted, value, 0), values)

        def add(total: Any, number: jax.Array) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, block(number)), None

        total, _ = jax.lax.scan(add, block(numbers[0]), numbers[1:])
        return jax.lax.psum(total, axis)

    total = jax.shard_map(
        local, mesh=mesh, in_specs=(P(axis), P()), out_specs=P(), check_vma=False
    )(numbers, shared)
    if n == blocks * block_size:
        return total
    rest = part(jnp.arange(blocks * block_size, n), shared)
    return jax.tree.map(jnp.add, total, rest)


@partial(jax.jit, static_argnames=("parts", "options", "symmetric", "mesh"))
def _by_sides(
    parts: SidePair,
    options: StaticOptions,
    x: Groups,
    y: Groups | None,
    symmetric: bool,
    mesh: Mesh | None,
) -> jax.Array:
    """Compute the matrix of a measure that compares two complete sides."""
    side, pair = (accepting(function, dict(options)) for function in (parts.side, parts.pair))
    xs = [_each(lambda X, _: side(X), group, None, mesh) for group in x]
    ys = xs if y is None else [_each(lambda X, _: side(X), group, None, mesh) for group in y]

    def compare(i: int, j: int, first: np.ndarray, second: np.ndarray) -> jax.Array:
        def one(pick: jax.Array, shared: tuple[Side, Side]) -> jax.Array:
            mine, other = shared
            return pair(
                jax.tree.map(lambda leaf: leaf[pick[0]], mine),
                jax.tree.map(lambda leaf: leaf[pick[1]], other),
            )

        return _each(one, jnp.stack([first, second], axis=1), (xs[i], ys[j]), mesh)

    halved = symmetric and y is None
    blocks: list[list[jax.Array]] = [[] for _ in xs]
    for i, mine in enumerate(x):
        for j, other in enumerate(x if y is None else y):
            if halved and j < i:
                blocks[i].append(blocks[j][i].T)
            elif halved and j == i:
                first, second = np.triu_indices(len(mine))
                values = compare(i, j, first, second)
                empty = jnp.zeros((len(mine), len(mine)), values.dtype)
                blocks[i].append(empty.at[first, second].set(values).at[second, first].set(values))
            else:
                grid = np.indices((len(mine), len(other))).reshape(2, -1)
                blocks[i].append(compare(i, j, *grid).reshape(len(mine), len(other)))
    return jnp.block(blocks)


def _each(function: Callable[[Any, Any], Any], items: Any, shared: Any, mesh: Mesh | None) -> Any:
    """Return `function(item, shared)` for each stacked item, distributed over the devices."""
    if mesh is None:
        return jax.lax.map(lambda item: function(item, shared), items)
    (axis,) = mesh.axis_names
    count = len(jax.tree.leaves(items)[0])
    numbers = jnp.minimum(jnp.arange(-(-count // mesh.size) * mesh.size), count - 1)

    def local(numbers: jax.Array, items: Any, shared: Any) -> Any:
        def one(number: jax.Array) -> Any:
            return function(jax.tree.map(lambda leaf: leaf[number], items), shared)

        return jax.lax.map(one, numbers)

    mapped = jax.shard_map(
        local, mesh=mesh, in_specs=(P(axis), P(), P()), out_specs=P(axis), check_vma=False
    )
    return jax.tree.map(lambda leaf: leaf[:count], mapped(numbers, items, shared))


def _evaluate_condensed(
    X: jax.Array, Y: jax.Array, parts: SidePair, options: StaticOptions, block_size: int
) -> jax.Array:
    return parts.evaluate(*condense(X, Y, block_size), **dict(options))


# Condenses each pair of sides before it is evaluated.
_CONDENSED = SidePair(lambda X: X, _evaluate_condensed)


def _complete(options: dict[str, Any], name: str, measure: Measure) -> dict[str, Any]:
    """Add the measure's defaults to the options; InputError for an unknown option."""
    for option in options:
        if option not in measure.options:
            known = ", ".join(measure.options) or "none"
            raise InputError(f"measure {name} has no option {option!r}: it has {known}")
    given = {name: value for name, value in options.items() if value is not None}
    return measure.defaults | check_options(given, measure.defaults)


def _one_axis(mesh: Mesh) -> Mesh:
    """Return the mesh with its axis in automatic mode, because shards are explicit here."""
    if len(mesh.axis_names) != 1:
        raise InputError(f"the mesh has axes {mesh.axis_names}: give one with a single axis")
    return Mesh(mesh.devices, mesh.axis_names)


def _grouped(
    X: Sequence[RepresentationArray] | RepresentationArray, name: str
) -> tuple[Groups, np.ndarray]:
    """Stack sides by width; return also the input index of each side."""
    if isinstance(X, str):
        raise InputError(f"{name} is a text: give representations, each (n, E)")
    if isinstance(X, jax.Array | np.ndarray) and X.ndim == 3 and 0 not in X.shape:
        stacked = as_samples(X.reshape(-1, X.shape[-1]), name).reshape(X.shape)
        return (stacked,), np.arange(len(X))
    sides = [as_samples(side, f"{name}[{index}]") for index, side in enumerate(X)]
    if not sides:
        raise InputError(f"{name} holds no representations: give at least one (n, E)")
    for index, side in enumerate(sides):
        if len(side) != len(sides[0]):
            raise InputError(
                f"{name}[{index}] has {len(side)} samples and {name}[0] {len(sides[0])}: "
                "row i of all must be of the same sample"
            )
    widths = np.asarray([side.shape[1] for side in sides])
    dtype = np.result_type(*(side.dtype for side in sides))
    groups = tuple(
        jnp.stack([sides[index].astype(dtype) for index in np.flatnonzero(widths == width)])
        for width in np.unique(widths)
    )
    return groups, np.argsort(widths, kind="stable")


def _cheaper(measure: Measure, x: Groups, y: Groups | None) -> SampleSum | SidePair:
    """Return the form of the measure that takes fewer operations for these sides."""
    if measure.narrow is None:
        return measure.parts
    n = x[0].shape[1]
    sides = [group.shape[2] for group in (*x, *(y or ())) for _ in group]
    a = sum(map(len, x))
    b = a if y is None else sum(map(len, y))
    by_samples = n * n * sum(sides) + n * n * a * b
    mean_width = sum(sides) / len(sides)
    by_features = n * mean_width**2 * (len(sides) + a * b / (2 if y is None else 1))
    return measure.narrow if by_features < by_samples else measure.parts


def _block_size(groups: Groups, mesh: Mesh | None) -> int:
    """Return how many samples fit in a block, at most a device's share of them."""
    n = groups[0].shape[1]
    row = sum(len(group) * max(n, group.shape[2]) * group.dtype.itemsize for group in groups)
    share = -(-n // mesh.size) if mesh is not None else n
    return max(1, min(share, BLOCK_BYTES // row))
