"""Define the parts of a similarity measure, and check its inputs.

A measure is a pure function of X (n, E1) and Y (n, E2), where row i of both is from the same
sample, that returns a scalar. Most of its work concerns only one side, and when many models or
layers are compared, that work should be done once per side. So a measure takes one of two forms:
`SampleSum` for a sum over the samples (blocks of samples then bound the memory, and all pairs of
sides are compared on a block at once), or `SidePair` for a measure that factorises each side over
all its samples.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, wraps
from typing import Any, ParamSpec, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError

# One side after a measure has prepared it: a pytree of arrays.
Side = Any
_Options = ParamSpec("_Options")


@dataclass(frozen=True)
class SampleSum:
    """Define a measure that is a sum over samples.

    `statistics(X, block_size)` is what the rows of a side need from all its samples (read
    `block_size` at a time); `rows(X, index, statistics)` are the prepared rows of the samples
    `index` (b,), as a pytree. `pairs(x, y)` takes such rows of A sides and of B sides, stacked, and
    returns these rows' contribution (A, B) to the sums. `score(xy, xx, yy, num_samples)` computes
    the values from the sums over all samples: (A, B) between two sides, (A, 1) and (1, B) of each
    with itself.
    """

    statistics: Callable[..., Any]
    rows: Callable[..., Side]
    pairs: Callable[[Side, Side], jax.Array]
    score: Callable[..., jax.Array]
    min_samples: int = 2
    same_width: bool = False

    def evaluate(self, X: jax.Array, Y: jax.Array, **options: Any) -> jax.Array:
        """Return the measure of X and Y, with all samples at once."""
        check_pair(X.shape, Y.shape, self)

        def side(Z: jax.Array) -> Side:
            statistics = accepting(self.statistics, options)(Z, block_size=len(Z))
            rows = accepting(self.rows, options)(Z, jnp.arange(len(Z)), statistics)
            return jax.tree.map(lambda leaf: leaf[None], rows)

        x, y = side(X), side(Y)
        sums = self.pairs(x, y), self.pairs(x, x), self.pairs(y, y)
        return accepting(self.score, options)(*sums, len(X))[0, 0]


@dataclass(frozen=True)
class SidePair:
    """Define a measure of two complete sides: `side(X)` prepares each, `pair(x, y)` is the value.

    `moments` says that the value depends only on the centred products X^T X, X^T Y and Y^T Y, and
    not on n otherwise, so that more samples than fit in memory can be condensed beforehand.
    """

    side: Callable[..., Side]
    pair: Callable[..., jax.Array]
    moments: bool = False
    min_samples: int = 2
    same_width: bool = False

    def evaluate(self, X: jax.Array, Y: jax.Array, **options: Any) -> jax.Array:
        """Return the measure of X and Y."""
        check_pair(X.shape, Y.shape, self)
        side = accepting(self.side, options)
        return accepting(self.pair, options)(side(X), side(Y))


class MeasureFunction(Protocol):
    """Define the signature of a public measure."""

    def __call__(self, X: jax.Array, Y: jax.Array, /, *args: Any, **options: Any) -> jax.Array:
        """Return the similarity or distance () of X (n, E1) and Y (n, E2)."""
        ...


@dataclass(frozen=True)
class Measure:
    """Describe a measure of the registry: its function, its form, and its properties.

    `narrow` is another form with the same values, cheaper if samples far outnumber features.
    `bounds` limit the values. `distance`: the value is zero for equal sides and grows, else it
    falls from the upper bound. `symmetric`: X and Y can be exchanged.
    """

    function: MeasureFunction
    parts: SampleSum | SidePair
    narrow: SidePair | None = None
    bounds: tuple[float, float] = (0.0, 1.0)
    distance: bool = False
    symmetric: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """Return the names of the measure's options."""
        return tuple(inspect.signature(self.function).parameters)[2:]

    @property
    def defaults(self) -> dict[str, Any]:
        """Return the default of each option that has one."""
        parameters = inspect.signature(self.function).parameters.values()
        return {
            one.name: one.default
            for one in parameters
            if one.default is not inspect.Parameter.empty
        }


def inner_pairs(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return inner products (A, B) of the rows (A, b, m) and (B, b, m), summed over b and m."""
    return jnp.einsum("abm,cbm->ac", x, y, precision="highest")


def each_pair(pair: Callable[[Side, Side], jax.Array]) -> Callable[[Side, Side], jax.Array]:
    """Build `SampleSum.pairs` from the contribution () of one pair of sides."""

    def pairs(x: Side, y: Side) -> jax.Array:
        return jax.lax.map(lambda one: jax.vmap(partial(pair, one))(y), x)

    return pairs


def mean_score(xy: jax.Array, xx: jax.Array, yy: jax.Array, num_samples: int) -> jax.Array:
    """Return the mean over samples."""
    return xy / num_samples


def cosine_score(xy: jax.Array, xx: jax.Array, yy: jax.Array, num_samples: int) -> jax.Array:
    """Return xy / sqrt(xx yy), for any number of samples; zero if a side is zero."""
    zero = (xx <= 0) | (yy <= 0)  # written so that NaN stays NaN
    norms = jnp.sqrt(jnp.where(zero, 1, xx)) * jnp.sqrt(jnp.where(zero, 1, yy))
    return jnp.where(zero, 0, jnp.clip(xy / norms, -1, 1))


def default_options(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the default of each parameter of `function` that has one."""
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}


def accepting(function: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    """Bind those of the options that `function` takes."""
    known = inspect.signature(function).parameters
    return partial(function, **{name: options[name] for name in options if name in known})


def checked(
    *, static: Sequence[str] = ()
) -> Callable[[Callable[_Options, jax.Array]], Callable[_Options, jax.Array]]:
    """Decorate a measure: check its inputs, convert them to one dtype, and compile it.

    float64 stays (if JAX has it on), everything narrower becomes float32. Raises InputError for
    arrays that are not (n, E1) and (n, E2), for values that are not finite, and for numeric options
    that are not above zero; under jit, vmap or grad the values are not checked.
    Options named in `static` are compiled in.
    """

    def decorate(function: Callable[_Options, jax.Array]) -> Callable[_Options, jax.Array]:
        compiled = jax.jit(function, static_argnames=tuple(static))
        signature, defaults = inspect.signature(function), default_options(function)

        @wraps(function)
        def call(*args: _Options.args, **kwargs: _Options.kwargs) -> jax.Array:
            given = signature.bind(*args, **kwargs).arguments
            X, Y = (as_samples(given.pop(name), name) for name in ("X", "Y"))
            options = check_options(given, defaults)
            common = np.promote_types(X.dtype, Y.dtype)
            return compiled(X.astype(common), Y.astype(common), **options)

        return call

    return decorate


def as_samples(X: Any, name: str) -> jax.Array:
    """Return X as a float array (n, E); InputError if it has another shape or is not finite."""
    given = X if isinstance(X, jax.Array) else np.asarray(X)
    if given.ndim != 2 or 0 in given.shape:
        raise InputError(f"{name} has shape {given.shape}: give representations (n, E)")
    is_integer = jnp.issubdtype(given.dtype, jnp.integer)
    if not (is_integer or jnp.issubdtype(given.dtype, jnp.floating)):
        raise InputError(f"{name} is {given.dtype}: give representations of real numbers")
    if is_integer or given.dtype.itemsize < 4:
        given = given.astype(np.float32)
    array = jnp.asarray(given)
    if not isinstance(array, jax.core.Tracer) and not bool(jnp.isfinite(array).all()):
        raise InputError(f"{name} holds NaN or infinite values: leave out the samples with them")
    return array


def check_pair(X: tuple[int, ...], Y: tuple[int, ...], parts: SampleSum | SidePair) -> None:
    """Raise InputError unless sides of these shapes can be compared."""
    if X[0] != Y[0]:
        raise InputError(
            f"X has {X[0]} samples and Y {Y[0]}: row i of both must be of the same sample"
        )
    if X[0] < parts.min_samples:
        raise InputError(f"{X[0]} samples: this measure takes at least {parts.min_samples}")
    if parts.same_width and X[1] != Y[1]:
        raise InputError(
            f"X has width {X[1]} and Y {Y[1]}: this measure compares sides of one width"
        )


def check_options(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Return the options as plain Python values; traced ones are unchanged.

    Raises InputError if an option has another type than its default, or a number is not finite and
    above zero.
    """
    return {name: _plain(name, value, defaults.get(name, 0.0)) for name, value in options.items()}


def _plain(name: str, value: Any, default: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return value
    if isinstance(value, np.generic | np.ndarray | jax.Array) and value.ndim == 0:
        value = value.item()
    if isinstance(default, bool | str):
        if type(value) is not type(default):
            kind = "True or False" if isinstance(default, bool) else "a text"
            raise InputError(f"{name} is {value!r}: give {kind}")
        return value
    integer = isinstance(default, int)
    is_number = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
    if not (is_number and 0 < value < np.inf):
        noun = "whole number" if integer else "number"
        raise InputError(f"{name} is {value!r}: give a {noun} above 0")
    return value
