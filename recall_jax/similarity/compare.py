"""Compare K models unit by unit: S[k, u], how close model k is to the reference in unit u.

RECALL (arXiv 2510.20479): S_k = mean over samples of exp(-||r_N - r_k||^2 / (2 sigma^2)). The
bandwidth, the other measures, their mixes and the alignments are options of this project.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.errors import InputError, shown
from recall_jax.similarity.alignment import ALIGNMENTS, center
from recall_jax.similarity.bandwidth import median_bandwidth, pair_distances
from recall_jax.similarity.measures import ALIASES, MEASURES

# The normal numbers of float32.
_SMALLEST, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

# Measures that can weight models: those that grow with similarity, up to one.
COMPARABLE = {
    name: MEASURES[full]
    for name, full in [*ALIASES.items(), *((name, name) for name in MEASURES)]
    if MEASURES[full].bounds[1] == 1 and not MEASURES[full].distance
}

Sigma = float | Literal["median", "dim"]
Reference = int | Literal["pairwise"]


@dataclass(frozen=True)
class Comparison:
    """Configure how models are compared; hashable, so that a compiled program can depend on it.

    `similarity` mixes measures by weight (the weights are divided by their sum). `sigma` is
    "median" (sigma^2 = half the median squared distance of the reference's sample pairs), "dim"
    (sigma^2 = E / 2) or a number. `reference` is a model's index, or "pairwise": S_k is then the
    mean similarity of model k to every other one, and sigma comes from the pairs of all models
    pooled. `alignment` is "none", "center" or "procrustes".
    """

    similarity: tuple[tuple[str, float], ...] = (("rbf", 1.0),)
    sigma: Sigma = "median"
    reference: Reference = -1
    alignment: str = "none"

    def __post_init__(self) -> None:
        """Refuse settings that cannot be computed, with InputError."""
        for name, weight in self.similarity:
            if name not in COMPARABLE:
                known = ", ".join(COMPARABLE)
                raise InputError(f"unknown similarity {shown(name)}: choose from {known}")
            if not (np.isfinite(weight) and weight > 0):
                raise InputError(f"similarity {shown(name)} has weight {weight}: give one above 0")
        if not np.isfinite(sum(weight for _, weight in self.similarity)):
            raise InputError("the weights of similarity have no finite sum: make them smaller")
        if not self.similarity:
            raise InputError("similarity names no measure: give at least one, such as rbf")
        if isinstance(self.sigma, str):
            if self.sigma not in ("median", "dim"):
                raise InputError(f"unknown sigma {shown(self.sigma)}: use median, dim or a number")
        elif not _SMALLEST <= self.sigma <= _LARGEST:
            raise InputError(
                f"sigma is {self.sigma}: give a number above 0 that float32 holds, median or dim"
            )
        if self.alignment not in ALIGNMENTS:
            known = ", ".join(ALIGNMENTS)
            raise InputError(f"unknown alignment {shown(self.alignment)}: choose from {known}")
        if self.reference == "pairwise" and self.alignment == "procrustes":
            raise InputError("alignment procrustes rotates onto a reference: pairwise has none")

    @property
    def reference_index(self) -> int | None:
        """Return the reference's index, or None if every model is compared with every other."""
        return None if self.reference == "pairwise" else self.reference

    @property
    def takes_sigma(self) -> bool:
        """Return whether any of the measures has a bandwidth."""
        return any("sigma" in COMPARABLE[name].options for name, _ in self.similarity)


def parse_similarity(value: str | Mapping[str, float]) -> tuple[tuple[str, float], ...]:
    """Build `Comparison.similarity` from one name, or a mapping of names to weights."""
    return ((value, 1.0),) if isinstance(value, str) else tuple(value.items())


class UnitSimilarity(NamedTuple):
    """Hold one unit's similarity (K,), and sigma (), which is NaN if no measure has one."""

    similarity: jax.Array
    sigma: jax.Array


@partial(jax.jit, static_argnames="comparison")
def compare_unit(reps: jax.Array, comparison: Comparison) -> UnitSimilarity:
    """Compare K models in one unit: `reps` (K, n, E) float32, the same n samples in each."""
    if comparison.reference == "pairwise":
        return _pairwise(reps, comparison)
    reference = reps[comparison.reference]
    if comparison.alignment != "none":
        aligned = [ALIGNMENTS[comparison.alignment](model, reference) for model in reps]
        # Rotating the reference onto itself would only add rounding errors to a similarity of one.
        anchor = center(reference) if comparison.alignment == "center" else reference
        aligned[comparison.reference] = anchor
        reps, reference = jnp.stack(aligned), anchor
    sigma = _bandwidth(reference[None], comparison)
    return UnitSimilarity(jax.vmap(partial(_mix, comparison, sigma, reference))(reps), sigma)


@partial(jax.jit, static_argnames="comparison")
def compare_units(reps: jax.Array, comparison: Comparison) -> UnitSimilarity:
    """Compare K models in all units in one call: `reps` (K, U, n, E) -> (K, U) and (U,)."""
    by_unit = jax.lax.map(lambda unit: compare_unit(unit, comparison), jnp.swapaxes(reps, 0, 1))
    return UnitSimilarity(by_unit.similarity.T, by_unit.sigma)


def rbf_similarity(
    reps: jax.Array | np.ndarray, *, sigma: Sigma = "median", reference: Reference = -1
) -> tuple[jax.Array, jax.Array]:
    """Return RECALL's similarity of K models to the reference, S (K, U) in [0, 1], and sigma (U,).

    `reps` is (K, U, n, E) float32 as stacked from `extract`. Raises InputError for other shapes, a
    reference that is not a model, and a median bandwidth that is zero or has no sample pair.
    """
    comparison = Comparison(sigma=sigma, reference=reference)
    check_representations(reps, comparison)
    result = compare_units(jnp.asarray(reps, jnp.float32), comparison)
    check_sigma(result.sigma, comparison, [str(unit) for unit in range(reps.shape[1])])
    return result.similarity, result.sigma


def check_representations(reps: jax.Array | np.ndarray, comparison: Comparison) -> None:
    """Raise InputError unless `reps` is (K, U, n, E), K >= 2, finite, and fits the comparison."""
    if reps.ndim != 4:
        raise InputError(f"representations have shape {reps.shape}: stack them to (K, U, n, E)")
    num_models, _, num_samples, _ = reps.shape
    if num_models < 2:
        raise InputError("only one model: a comparison takes at least two")
    check_reference(comparison.reference, num_models)
    check_samples(num_samples, comparison)
    finite = np.isfinite(np.asarray(reps)).all(axis=(2, 3))
    if not finite.all():
        model, unit = np.argwhere(~finite)[0]
        raise InputError(
            f"the representations of model {model} hold NaN or infinity in unit {unit}: "
            "look for such values in its parameters"
        )


def check_reference(reference: Reference, num_models: int) -> None:
    """Raise InputError unless the reference is one of the models."""
    if reference == "pairwise":
        return
    if isinstance(reference, str) or not -num_models <= reference < num_models:
        raise InputError(
            f"reference {shown(reference)} is none of the {num_models} models: "
            f"give an index from 0 to {num_models - 1}, or 'pairwise'"
        )


def check_samples(num_samples: int, comparison: Comparison) -> None:
    """Raise InputError if there are too few samples for the comparison."""
    reps = jax.ShapeDtypeStruct((num_samples, 2), jnp.float32)
    for name, _ in comparison.similarity:
        single = replace(comparison, similarity=((name, 1.0),))
        try:  # the measure checks this by the shapes
            jax.eval_shape(partial(_mix, single, jnp.float32(1.0)), reps, reps)
        except InputError as error:
            raise InputError(f"similarity {name}: {error}") from error
    if num_samples < 2 and comparison.takes_sigma and comparison.sigma == "median":
        raise InputError(
            "one sample has no pairs to take a median bandwidth from: "
            "give more samples, or sigma as a number"
        )


def check_sigma(sigma: jax.Array | np.ndarray, comparison: Comparison, units: list[str]) -> None:
    """Raise InputError for a median sigma that is zero or not finite; `units` names its entries."""
    if comparison.takes_sigma and comparison.sigma == "median":
        values = np.atleast_1d(np.asarray(sigma))
        if zero := [unit for unit, value in zip(units, values, strict=True) if value <= 0]:
            raise InputError(
                f"the median distance between samples is zero in unit {', '.join(zero)}: most "
                "samples are alike there; give more varied samples, or sigma as a number"
            )
        if wide := [
            unit for unit, value in zip(units, values, strict=True) if not np.isfinite(value)
        ]:
            raise InputError(
                f"the distances between samples leave float32 in unit {', '.join(wide)}: scale "
                "the representations down, or give sigma as a number"
            )


@jax.jit
def unit_bandwidth(X: jax.Array) -> jax.Array:
    """Return the median bandwidth () of one model's unit (n, E)."""
    return median_bandwidth(pair_distances(X))


def _pairwise(reps: jax.Array, comparison: Comparison) -> UnitSimilarity:
    if comparison.alignment == "center":
        reps = jax.vmap(center)(reps)
    sigma = _bandwidth(reps, comparison)
    num_models = reps.shape[0]
    # (K, K), entry [j, k] from X = model j to Y = model k; the diagonal is left out of the mean.
    between = jax.vmap(lambda X: jax.vmap(partial(_mix, comparison, sigma, X))(reps))(reps)
    off_diagonal = between * (1.0 - jnp.eye(num_models, dtype=jnp.float32))
    return UnitSimilarity(jnp.sum(off_diagonal, axis=0) / (num_models - 1), sigma)


def _bandwidth(models: jax.Array, comparison: Comparison) -> jax.Array:
    """Return sigma () from the sample pairs within each of `models` (k, n, E), pooled."""
    if not comparison.takes_sigma:
        return jnp.float32(jnp.nan)
    if comparison.sigma == "dim":
        return jnp.sqrt(jnp.float32(models.shape[-1] / 2))
    if comparison.sigma == "median":
        return median_bandwidth(jnp.concatenate([pair_distances(model) for model in models]))
    return jnp.float32(comparison.sigma)


def _mix(comparison: Comparison, sigma: jax.Array, X: jax.Array, Y: jax.Array) -> jax.Array:
    """Return the weighted mix of measures between X and Y."""
    total = sum(weight for _, weight in comparison.similarity)
    mixed = jnp.float32(0.0)
    for name, weight in comparison.similarity:
        measure = COMPARABLE[name]
        bandwidth = {"sigma": sigma} if "sigma" in measure.options else {}
        value = measure.parts.evaluate(X, Y, **measure.defaults | bandwidth)
        mixed += jnp.float32(weight / total) * value
    return mixed
