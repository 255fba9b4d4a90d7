"""Compute pooled hidden states of streamed models on typical samples.

Methods that observe `POOLED` use them; they get the states of each unit as the walk reaches it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import jax
import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.batching import SELECTION_BYTES, Batching, Passes, fit_batching
from recall_jax.engine.budget import cacheable_bytes, widest
from recall_jax.engine.forward import HiddenStates
from recall_jax.engine.inputs import (
    Selection,
    TypicalSamples,
    check_same_texts,
    find_typical,
    read_samples,
)
from recall_jax.engine.layout import Forward
from recall_jax.engine.merge import Merge, Prepared, Rule
from recall_jax.engine.plan import NamedModel
from recall_jax.engine.resident import ResidentTensors
from recall_jax.engine.select import plan_selection
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.inputs.samples import Tokenized


@dataclass(frozen=True)
class SelectedSamples:
    """Record in the journal a digest of the rows, the selection, and the forward's batching."""

    digest: str
    selection: Selection
    batching: Batching


@dataclass
class StreamedStates:
    """Implement `engine.merge.PooledStates` for checkpoints that are read unit by unit."""

    forward: Forward
    names: Sequence[str]
    inputs: Inputs[NamedModel]
    samples: TypicalSamples[Tokenized]
    batching: Batching
    dtype: str
    _states: Sequence[HiddenStates] = field(default=(), repr=False)

    def place(self, unit: str, stored: Inputs[Mapping[str, Any]]) -> Any:
        """Transfer a unit of all models to the devices."""
        return self.forward.place(unit, stored.models)

    def advance(self, unit: str, placed: Any) -> np.ndarray:
        """Run the models through the next unit: pooled states (K, n, E) float32."""
        self._states, pooled = self.forward.advance(unit, placed, self._states, self.names)
        return pooled

    def to_prepared(self, rule: Rule, reference: int | None = None) -> Prepared:
        """Return the rule ready for the walk, with the samples and the plan of these states."""
        return Prepared(
            replace(rule, place=self.place),
            self.batching.needed_bytes,
            self.inputs,
            batching={
                "batch_size": self.batching.batch_size,
                "models_at_once": self.forward.models_per_device,
            },
            reference=reference,
            compute_dtype=self.dtype,
            samples=self.samples,
        )


def streamed_states(
    merge: Merge[Any, Any], selector: int, check: Callable[[int], None]
) -> StreamedStates:
    """Select the typical samples, or take them from the journal, and prepare the forward.

    The model of index `selector` selects them; it stays in memory for the merge if it fits, so that
    it is read only once. `check(n)` raises InputError if n samples are too few. Raises
    UnfinishedError if the memory is too small, or if an interrupted merge used other texts.
    """
    walk, settings = merge.checkpoints, merge.samples
    journal, progress = merge.journal, merge.progress
    assert settings is not None
    models, arch, dtype = walk.inputs.models, walk.arch, walk.dtype
    model = models[selector]
    kept = ResidentTensors(model)
    with progress.stage("select"):
        pool = read_samples(
            settings,
            model,
            models,
            arch,
            ignore_tokenizers=merge.tokenizers_pass,
            budget=walk.budget,
        )
        walk.check_same_samples("to choose from", pool, model.name)
        lengths = [len(ids) for ids in pool.token_ids]
        wanted = len(lengths) if settings.typical else min(settings.count, len(lengths))
        check(wanted)
        if found := journal.find_prepared(SelectedSamples):
            check_same_texts(found.digest, pool, model.name)
            batching, samples = found.batching, found.selection.take_from(pool)
            progress.announce(_describe_forward(samples.samples, batching, len(models)))
        else:
            passes, batching, fits = _plan_forward(merge, lengths, wanted, model)
            progress.announce(_describe_forward(pool, batching, len(models)))
            if passes:
                line = _describe_selection(model.name, len(lengths), len(passes.rows), fits)
                progress.announce(line)
            samples = find_typical(
                settings,
                pool,
                kept if fits else model,
                arch,
                passes=passes,
                dtype=dtype,
                layout=walk.layout,
                progress=progress,
            )
            samples = replace(samples, passes=0) if fits else samples
            # Machines that round differently could choose different rows.
            selection = Selection.from_json(walk.agree("typical", samples.selection.to_json))
            samples = selection.take_from(pool)
            _check_found(samples, wanted, check)
            journal.record_prepared(SelectedSamples(pool.digest(), selection, batching))
        kept.release()
    forward = walk.layout.forward(
        arch,
        samples.samples.token_ids,
        batch_size=batching.batch_size,
        dtype=dtype,
        num_models=len(models),
        models_at_once=batching.models_at_once,
    )
    inputs: Inputs[NamedModel] = walk.inputs.map(lambda each: kept if each is model else each)
    names = [each.name for each in models]
    return StreamedStates(forward, names, inputs, samples, batching, np.dtype(dtype).name)


def _plan_forward(
    merge: Merge[Any, Any],
    lengths: Sequence[int],
    wanted: int,
    selector: Checkpoint,
) -> tuple[Passes | None, Batching, bool]:
    """Return the passes of the selection, the batching, and whether the selector stays in memory.

    The passes are None if there is nothing to select.
    """
    walk, settings = merge.checkpoints, merge.samples
    assert settings is not None

    def decide() -> dict[str, Any]:
        passes = plan_selection(
            settings,
            lengths,
            selector,
            walk.arch,
            dtype=walk.dtype,
            budget=walk.budget,
            split=walk.layout.split(1),
        )
        models = walk.inputs.models
        batching = fit_batching(
            walk.arch,
            sorted(lengths)[-wanted:],  # an upper bound for whichever rows are chosen
            num_models=len(models),
            batch_size=settings.batch_size,
            itemsize=np.dtype(walk.dtype).itemsize,
            stored_itemsize=max(widest(model.specs) for model in models),
            budget=walk.budget,
            overhead=walk.overhead + (SELECTION_BYTES if passes else 0),
            split=walk.layout.split(len(models)),
        )
        needed = max(batching.needed_bytes, passes.needed_bytes if passes else 0)
        share = -(-selector.nbytes // jax.process_count())  # each process reads its rows
        # Folded adapters would stay as arrays in memory, not as mapped files.
        fits = not selector.adapters and needed + share <= cacheable_bytes(walk.budget)
        return {
            "passes": passes and passes.to_json(),
            "batching": asdict(replace(batching, needed_bytes=needed)),
            "fits": fits,
        }

    found = walk.agree("forward", decide)
    passes = found["passes"] and Passes.from_json(found["passes"])
    return passes, Batching(**found["batching"]), found["fits"]


def _check_found(
    samples: TypicalSamples[Tokenized], wanted: int, check: Callable[[int], None]
) -> None:
    """Raise InputError if duplicates in the rows leave too few typical samples."""
    found = len(samples.samples.rows)
    try:
        check(found)
    except InputError as error:
        raise InputError(
            f"the rows of data hold duplicates, which leaves {found} of {wanted} typical samples: "
            f"{error}"
        ) from error


def _describe_forward(samples: Tokenized, batching: Batching, num_models: int) -> str:
    longest = max(map(len, samples.token_ids))
    return (
        f"forward: rows of up to {longest} tokens in batches of {batching.batch_size}, "
        f"{batching.models_at_once} of {num_models} models at a time"
    )


def _describe_selection(selector: str, rows: int, passes: int, fits: bool) -> str:
    how = "which stays in memory for the merge" if fits else "which the merge reads again"
    times = "pass" if passes == 1 else "passes"
    return f"typical samples: from {rows} rows in {passes} {times} over {selector}, {how}"
