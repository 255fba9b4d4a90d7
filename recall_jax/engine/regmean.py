"""RegMean and RegMean++ in the streamed engine: Grams of what each model's linear layers read.

Each model has typical samples of its own. They run through the model itself, or in RegMean++
through what has been merged of the units before, of which the rule hears as the walk goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from recall_jax.checkpoint.units import EMBED, HEAD
from recall_jax.engine.budget import widest
from recall_jax.engine.cut import Cut, cut_apart
from recall_jax.engine.findings import Findings
from recall_jax.engine.forward import HiddenStates, Placed
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.layout import Forward
from recall_jax.engine.memory import gram_bytes
from recall_jax.engine.own_samples import own_samples
from recall_jax.engine.plan import Plan
from recall_jax.engine.programs import Grams
from recall_jax.engine.rules import (
    Merge,
    Prepared,
    Rule,
    Stored,
    Values,
    mean_by_unit,
    recipe_values,
)
from recall_jax.inputs.samples import Tokenized
from recall_jax.inputs.settings import Samples
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import linear_inputs

MERGED = "the model merged so far"  # in messages


def prepare_regmean(merge: Merge, *, through_merged: bool) -> Prepared:
    """Find each model's samples, cut the forward to fit the memory, and set up the Grams.

    Raises UnfinishedError where the memory is too small, or an interrupted merge saw other texts.
    """
    recipe, models, journal = merge.recipe, merge.models, merge.journal
    arch = common_architecture(models, recipe.ignore_config)
    dtype = compute_dtype(recipe.compute_dtype, models[-1])

    def cut_of(lengths: Sequence[Sequence[int]], beside: int = 0) -> Cut:
        return _cut(merge, lengths, arch, through_merged, beside)

    with merge.clock.stage("select"):
        own = own_samples(merge, arch, cut_of)
        prepared = journal.prepared or {}
        if "cut" in prepared:
            cut = Cut(**prepared["cut"])
        else:
            lengths = [[len(ids) for ids in samples.token_ids] for samples in own]
            found = merge.agreed("forward", lambda: asdict(cut_of(lengths)))
            cut = Cut(**found)
            journal.record_prepared({**prepared, "cut": asdict(cut)})
    merge.announce(_describe(own, cut))
    forwards = [
        merge.layout.forward(arch, samples.token_ids, batch_size=cut.batch_size, dtype=dtype)
        for samples in own
    ]
    values = recipe_values(recipe, merge.plan.specs)
    weights = {name: values[name]["weight"] for name in values}
    found = Findings(mean_by_unit(weights, merge.plan.specs))
    names = [model.name for model in models]
    walk = RegMean(forwards, names, merge.plan.units, values, through_merged)
    return Prepared(
        Rule(walk.values, lambda: found, walk.place, walk.merged if through_merged else None),
        models,
        needed=cut.needed,
        cut={"batch_size": cut.batch_size},
        compute_dtype=np.dtype(dtype).name,
        own=own,
    )


def _cut(
    merge: Merge,
    lengths: Sequence[Sequence[int]],
    arch: Architecture,
    through_merged: bool,
    beside: int,
) -> Cut:
    """How the forward of each model over its own samples, of these lengths, is cut."""
    split = merge.layout.split(1)
    # In pieces as they come from the kernel, and laid together for the forward.
    merged = 2 * _largest_unit(merge.plan) if through_merged else 0
    grams = gram_bytes(arch, len(merge.models)) * (split.sharing if split else 1)
    return cut_apart(
        arch,
        lengths,
        batch_size=(merge.recipe.samples or Samples()).batch_size,
        itemsize=np.dtype(compute_dtype(merge.recipe.compute_dtype, merge.models[-1])).itemsize,
        stored=max(widest(model.specs) for model in merge.models),
        budget=merge.budget,
        beside=beside + merge.beside + grams + merged,
        split=split,
    )


class RegMean:
    """RegMean's values, gathered unit by unit. Lives for one walk.

    Jin et al. 2023 (arXiv 2212.09849); `through_merged`, Nguyen et al. 2025 (arXiv 2508.03121): a
    model's linear layers then read what they would read in the merged model.
    """

    def __init__(
        self,
        forwards: Sequence[Forward],
        models: Sequence[str],
        tensors: Mapping[str, Sequence[str]],
        values: Mapping[str, Values],
        through_merged: bool,
    ) -> None:
        """`forwards` hold the samples of each of the `models`.

        `tensors` are the names of those to be merged, by unit; `values` is what the recipe has for
        each.
        """
        self._forwards = forwards
        self._models = models
        self._tensors = tensors
        self._values = values
        self._through_merged = through_merged
        self._states: list[Sequence[HiddenStates]] = [()] * len(models)

    def place(self, unit: str, stored: Stored) -> list[Placed]:
        """A unit on its way to the devices, of each model alone."""
        return [
            forward.place(unit, [own]) for forward, own in zip(self._forwards, stored, strict=True)
        ]

    def values(self, unit: str, placed: Sequence[Placed]) -> dict[str, Values]:
        """The `gram` (K, in, in) of each linear layer of `unit`, of a mean token; what else it has.

        Each model's counts alike, however many tokens its samples have.
        """
        inputs = linear_inputs(self._forwards[0].arch, unit)
        stacked: Grams = {}
        if not (self._through_merged and unit == EMBED):  # the first to run is the merged one
            for k, (forward, own) in enumerate(zip(self._forwards, placed, strict=True)):
                after, grams = forward.advance_with_grams(
                    unit, own, self._states[k], self._models[k]
                )
                if not self._through_merged:
                    self._states[k] = after
                stacked = stacked or _room(grams, len(self._forwards))
                stacked = _filled(stacked, k, grams, 1 / forward.batches.num_tokens)
        return {
            name: {**self._values[name], "gram": stacked[inputs[name]]}
            if name in inputs
            else self._values[name]
            for name in self._tensors[unit]
        }

    def merged(self, unit: str, tensors: Mapping[str, np.ndarray]) -> None:
        """Run all models' samples through a merged unit."""
        if unit == HEAD:
            return
        placed = self._forwards[0].place(unit, [tensors])
        groups = list(placed.groups)  # the same for all: their batches are of one size
        for k, forward in enumerate(self._forwards):
            once = Placed(placed.stored, groups)
            self._states[k], _ = forward.advance(unit, once, self._states[k], [MERGED])


def _room(grams: Grams, num_models: int) -> Grams:
    return {path: jnp.zeros((num_models, *gram.shape)) for path, gram in grams.items()}


def _filled(stacked: Grams, k: int, grams: Grams, scale: float) -> Grams:
    """`stacked` (K, in, in) with the model's Grams, which all devices hold alike, at place k."""
    own = {path: gram.addressable_data(0) for path, gram in grams.items()}
    return _put(stacked, np.int32(k), own, np.float32(scale))


@partial(jax.jit, donate_argnames="stacked")
def _put(stacked: Grams, k: jax.Array, own: Grams, scale: jax.Array) -> Grams:
    return jax.tree.map(lambda room, gram: room.at[k].set(gram * scale), stacked, own)


def _largest_unit(plan: Plan) -> int:
    """Bytes of the largest merged unit."""
    return max(sum(plan.specs[name].nbytes for name in names) for names in plan.units.values())


def _describe(own: Sequence[Tokenized], cut: Cut) -> str:
    rows = sum(len(samples.token_ids) for samples in own)
    longest = max(len(ids) for samples in own for ids in samples.token_ids)
    return (
        f"forward: {rows} rows of {len(own)} models, up to {longest} tokens, "
        f"in batches of {cut.batch_size}"
    )
