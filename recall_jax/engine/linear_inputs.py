"""Compute Gram matrices of the inputs of each model's linear layers, one unit at a time.

Methods that observe `LINEAR_INPUTS` use them. Each model has separate typical samples, which run
through the model itself, or through the units merged so far.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.batching import Batching, fit_per_model_batching
from recall_jax.engine.budget import widest
from recall_jax.engine.findings import Findings
from recall_jax.engine.forward import HiddenStates, Placed
from recall_jax.engine.kernel import Values
from recall_jax.engine.layout import Forward
from recall_jax.engine.memory import gram_bytes
from recall_jax.engine.merge import Merge, Prepared, Rule
from recall_jax.engine.per_model_samples import per_model_samples
from recall_jax.engine.plan import MergePlan
from recall_jax.engine.programs import Grams
from recall_jax.engine.sources import Inputs
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.models.convert import linear_inputs as linear_layers

MERGED = "the model merged so far"  # its name in messages


@dataclass
class LinearInputs:
    """Compute the Gram matrices of K models, unit by unit in one walk.

    `forwards` hold the samples of each model in `names`. With `through_merged`, the samples run
    through the merged units, which `advance_merged` is called with.
    """

    forwards: Sequence[Forward]
    names: Sequence[str]
    through_merged: bool = False
    _states: list[Sequence[HiddenStates]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Begin before the first unit."""
        self._states = [()] * len(self.names)

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> list[Placed]:
        """Transfer a unit of each model to the devices, from tensors as the layout reads them."""
        pairs = zip(self.forwards, stored.models, strict=True)
        return [forward.place(unit, [tensors]) for forward, tensors in pairs]

    def grams(self, unit: str, placed: Sequence[Placed]) -> dict[str, jax.Array]:
        """Run the models through the next unit: (K, in, in) float32 by linear weight name.

        A Gram matrix is X^T X / T over the T tokens of all samples of a model, so that models count
        equally however many tokens they have.
        """
        inputs = linear_layers(self.forwards[0].arch, unit)
        stacked: Grams = {}
        if self.through_merged and unit == EMBED:  # the first unit to run is the merged one
            return {}
        for k, (forward, unit_of_k) in enumerate(zip(self.forwards, placed, strict=True)):
            after, grams = forward.advance_with_grams(
                unit, unit_of_k, self._states[k], self.names[k]
            )
            if not self.through_merged:
                self._states[k] = after
            stacked = stacked or _zeros(grams, len(self.forwards))
            stacked = _with_grams(stacked, k, grams, 1 / forward.batches.num_tokens)
        return {name: stacked[path] for name, path in inputs.items()}

    def advance_merged(self, unit: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Run the samples of all models through a merged unit."""
        if unit == HEAD:
            return
        placed = self.forwards[0].place(unit, [tensors])
        groups = list(placed.groups)  # shared by all, since their batches have equal sizes
        for k, forward in enumerate(self.forwards):
            again = Placed(placed.stored, groups)
            self._states[k], _ = forward.advance(unit, again, self._states[k], [MERGED])

    def rule(
        self,
        values: Callable[[str, Mapping[str, jax.Array]], Mapping[str, Values]],
        findings: Callable[[], Findings],
    ) -> Rule:
        """Return the rule whose `values(unit, grams)` derive from a unit's Grams by tensor name."""
        return Rule(
            lambda unit, placed: values(unit, self.grams(unit, placed)),
            findings,
            self.place,
            self.advance_merged if self.through_merged else None,
        )


def prepare_linear_inputs(
    merge: Merge[Any, Any],
    values: Callable[[str, Mapping[str, jax.Array]], Mapping[str, Values]],
    findings: Callable[[], Findings],
    *,
    through_merged: bool = False,
) -> Prepared:
    """Find the samples of each model, fit the batching to the memory, and return the rule.

    `values(unit, grams)` returns the kernel's values for each tensor of a unit, and `findings()`
    the findings for the report. Raises UnfinishedError if the memory is too small, or if an
    interrupted merge used other texts.
    """
    walk, journal = merge.checkpoints, merge.journal

    def fit(lengths: Sequence[Sequence[int]], overhead: int = 0) -> Batching:
        return _fit_batching(merge, lengths, through_merged, overhead)

    with merge.progress.stage("select"):
        model_samples = per_model_samples(merge, fit)
        batching = journal.find_prepared(Batching)
        if batching is None:
            lengths = [[len(ids) for ids in samples.token_ids] for samples in model_samples]
            batching = Batching(**walk.agree("forward", lambda: asdict(fit(lengths))))
            journal.record_prepared(batching)
    merge.progress.announce(_describe(model_samples, batching))
    forwards = [
        walk.layout.forward(
            walk.arch, samples.token_ids, batch_size=batching.batch_size, dtype=walk.dtype
        )
        for samples in model_samples
    ]
    names = [model.name for model in walk.inputs.models]
    return Prepared(
        LinearInputs(forwards, names, through_merged).rule(values, findings),
        batching.needed_bytes,
        batching={"batch_size": batching.batch_size},
        compute_dtype=np.dtype(walk.dtype).name,
        per_model_samples=model_samples,
    )


def _fit_batching(
    merge: Merge[Any, Any],
    lengths: Sequence[Sequence[int]],
    through_merged: bool,
    overhead: int,
) -> Batching:
    """Fit the batching of each model's forward over its samples, whose lengths are given."""
    walk = merge.checkpoints
    split, models = walk.layout.split(1), walk.inputs.models
    # Twice: in pieces from the kernel, and concatenated for the forward.
    merged = 2 * _largest_unit(walk.plan) if through_merged else 0
    grams = gram_bytes(walk.arch, len(models)) * (split.sharing_devices if split else 1)
    return fit_per_model_batching(
        walk.arch,
        lengths,
        batch_size=(merge.samples or Samples()).batch_size,
        itemsize=np.dtype(walk.dtype).itemsize,
        stored_itemsize=max(widest(model.specs) for model in models),
        budget=walk.budget,
        overhead=overhead + walk.overhead + grams + merged,
        split=split,
    )


def _zeros(grams: Grams, num_models: int) -> Grams:
    return {path: jnp.zeros((num_models, *gram.shape)) for path, gram in grams.items()}


def _with_grams(stacked: Grams, k: int, grams: Grams, scale: float) -> Grams:
    """Return `stacked` (K, in, in) with a model's Grams, equal on all devices, at index k."""
    local = {path: gram.addressable_data(0) for path, gram in grams.items()}
    return _put(stacked, np.int32(k), local, np.float32(scale))


@partial(jax.jit, donate_argnames="stacked")
def _put(stacked: Grams, k: jax.Array, grams: Grams, scale: jax.Array) -> Grams:
    return jax.tree.map(lambda all_k, gram: all_k.at[k].set(gram * scale), stacked, grams)


def _largest_unit(plan: MergePlan) -> int:
    """Return the bytes of the largest merged unit."""
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _describe(model_samples: Sequence[Tokenized], batching: Batching) -> str:
    rows = sum(len(samples.token_ids) for samples in model_samples)
    longest = max(len(ids) for samples in model_samples for ids in samples.token_ids)
    return (
        f"forward: {rows} rows of {len(model_samples)} models, up to {longest} tokens, "
        f"in batches of {batching.batch_size}"
    )
