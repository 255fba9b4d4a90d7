"""Gram matrices of what each model's linear layers read, unit by unit.

For methods that observe `LINEAR_INPUTS`. Each model has typical samples of its own. They run
through the model itself, or through what has been merged of the units before.
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
from recall_jax.engine.merge import CheckpointWalk, Merge, Prepared, Rule
from recall_jax.engine.per_model_samples import per_model_samples
from recall_jax.engine.plan import MergePlan
from recall_jax.engine.programs import Grams
from recall_jax.engine.sources import Inputs
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.models.convert import linear_inputs as linear_layers

MERGED = "the model merged so far"  # in messages


@dataclass(frozen=True)
class BatchedForward:
    """What the journal keeps: how the forward of each model over its samples is batched."""

    batching: Batching


@dataclass
class LinearInputs:
    """The Grams of K models, gathered unit by unit in one walk.

    `forwards` hold the samples of each of the models that `names` names. With `through_merged` the
    samples run through the merged units, which `merged` is called with.
    """

    forwards: Sequence[Forward]
    names: Sequence[str]
    through_merged: bool = False
    _states: list[Sequence[HiddenStates]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        """Begin before the first unit."""
        self._states = [()] * len(self.names)

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> list[Placed]:
        """Bring a unit of each model to the devices, of tensors as the layout reads them."""
        pairs = zip(self.forwards, stored.models, strict=True)
        return [forward.place(unit, [own]) for forward, own in pairs]

    def grams(self, unit: str, placed: Sequence[Placed]) -> dict[str, jax.Array]:
        """Run the models through the next unit: (K, in, in) float32 for each linear weight's name.

        A Gram is X^T X / T over the T tokens of all of a model's samples, so that each model counts
        alike however many tokens it has.
        """
        inputs = linear_layers(self.forwards[0].arch, unit)
        stacked: Grams = {}
        if self.through_merged and unit == EMBED:  # the first to run is the merged one
            return {}
        for k, (forward, own) in enumerate(zip(self.forwards, placed, strict=True)):
            after, grams = forward.advance_with_grams(unit, own, self._states[k], self.names[k])
            if not self.through_merged:
                self._states[k] = after
            stacked = stacked or _room(grams, len(self.forwards))
            stacked = _filled(stacked, k, grams, 1 / forward.batches.num_tokens)
        return {name: stacked[path] for name, path in inputs.items()}

    def merged(self, unit: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Run all models' samples through a merged unit."""
        if unit == HEAD:
            return
        placed = self.forwards[0].place(unit, [tensors])
        groups = list(placed.groups)  # the same for all: their batches are of one size
        for k, forward in enumerate(self.forwards):
            once = Placed(placed.stored, groups)
            self._states[k], _ = forward.advance(unit, once, self._states[k], [MERGED])

    def rule(
        self,
        values: Callable[[str, Mapping[str, jax.Array]], Mapping[str, Values]],
        findings: Callable[[], Findings],
    ) -> Rule:
        """Return the rule whose `values(unit, grams)` are made of a unit's Grams by tensor name."""
        return Rule(
            lambda unit, placed: values(unit, self.grams(unit, placed)),
            findings,
            self.place,
            self.merged if self.through_merged else None,
        )


def prepare_linear_inputs(
    merge: Merge[Any, Any],
    values: Callable[[str, Mapping[str, jax.Array]], Mapping[str, Values]],
    findings: Callable[[], Findings],
    *,
    through_merged: bool = False,
) -> Prepared:
    """Find each model's samples, batch the forward to fit the memory, and set up the Grams.

    `values(unit, grams)` returns the kernel's values of each tensor of a unit, `findings()` what
    the report says. Raises UnfinishedError where the memory is too small, or an interrupted merge
    saw other texts.
    """
    walk, journal = merge.checkpoints, merge.journal

    def fit(lengths: Sequence[Sequence[int]], overhead: int = 0) -> Batching:
        return _fit_batching(merge, walk, lengths, through_merged, overhead)

    with merge.progress.stage("select"):
        own = per_model_samples(merge, fit)
        found = journal.find_prepared(BatchedForward)
        if found is None:
            lengths = [[len(ids) for ids in samples.token_ids] for samples in own]
            decided = walk.agree("forward", lambda: asdict(fit(lengths)))
            found = BatchedForward(Batching(**decided))
            journal.record_prepared(found)
    batching = found.batching
    merge.progress.announce(_describe(own, batching))
    forwards = [
        walk.layout.forward(
            walk.arch, samples.token_ids, batch_size=batching.batch_size, dtype=walk.dtype
        )
        for samples in own
    ]
    names = [model.name for model in walk.inputs.models]
    return Prepared(
        LinearInputs(forwards, names, through_merged).rule(values, findings),
        batching.needed_bytes,
        batching={"batch_size": batching.batch_size},
        compute_dtype=np.dtype(walk.dtype).name,
        per_model_samples=own,
    )


def _fit_batching(
    merge: Merge[Any, Any],
    walk: CheckpointWalk,
    lengths: Sequence[Sequence[int]],
    through_merged: bool,
    overhead: int,
) -> Batching:
    """How the forward of each model over its own samples, of these lengths, is batched."""
    split, models = walk.layout.split(1), walk.inputs.models
    # In pieces as they come from the kernel, and laid together for the forward.
    merged = 2 * _largest_unit(walk.plan) if through_merged else 0
    grams = gram_bytes(walk.arch, len(models)) * (split.sharing_devices if split else 1)
    return fit_per_model_batching(
        walk.arch,
        lengths,
        batch_size=(merge.samples or Samples()).batch_size,
        itemsize=np.dtype(walk.dtype).itemsize,
        stored=max(widest(model.specs) for model in models),
        budget=walk.budget,
        overhead=overhead + walk.overhead + grams + merged,
        split=split,
    )


def _room(grams: Grams, num_models: int) -> Grams:
    return {path: jnp.zeros((num_models, *gram.shape)) for path, gram in grams.items()}


def _filled(stacked: Grams, k: int, grams: Grams, scale: float) -> Grams:
    """`stacked` (K, in, in) with the model's Grams, which all devices hold alike, at place k."""
    own = {path: gram.addressable_data(0) for path, gram in grams.items()}
    return _put(stacked, np.int32(k), own, np.float32(scale))


@partial(jax.jit, donate_argnames="stacked")
def _put(stacked: Grams, k: jax.Array, own: Grams, scale: jax.Array) -> Grams:
    return jax.tree.map(lambda room, gram: room.at[k].set(gram * scale), stacked, own)


def _largest_unit(plan: MergePlan) -> int:
    """Bytes of the largest merged unit."""
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _describe(own: Sequence[Tokenized], batching: Batching) -> str:
    rows = sum(len(samples.token_ids) for samples in own)
    longest = max(len(ids) for samples in own for ids in samples.token_ids)
    return (
        f"forward: {rows} rows of {len(own)} models, up to {longest} tokens, "
        f"in batches of {batching.batch_size}"
    )
