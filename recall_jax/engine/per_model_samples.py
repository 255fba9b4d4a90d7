"""Find typical samples for each model, from its task's data or drawn from the model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.batching import SELECTION_BYTES, Passes
from recall_jax.engine.budget import room_for_rows
from recall_jax.engine.drawn_samples import draw_samples
from recall_jax.engine.inputs import (
    check_same_texts,
    find_typical,
    model_tokenizer,
)
from recall_jax.engine.merge import CheckpointWalk, Merge
from recall_jax.engine.select import plan_selection
from recall_jax.errors import InputError
from recall_jax.inputs.data import read_rows
from recall_jax.inputs.samples import (
    Tokenized,
    check_readers,
    check_vocabulary,
    read_pool,
    read_typical,
)
from recall_jax.inputs.settings import TYPICAL, Samples
from recall_jax.inputs.shapes import USUAL
from recall_jax.inputs.tokens import Tokenizer
from recall_jax.inputs.vocabularies import tokenizer_differences
from recall_jax.models.architecture import Architecture

TokenCheck = Callable[[Sequence[Sequence[int]], int], object]
"""Raises an error unless rows of these lengths, by model, fit with an overhead in bytes."""


@dataclass(frozen=True)
class SelectedRows:
    """Hold a digest of a model's rows, and the indices of the selected ones, None if all are."""

    digest: str
    indices: list[int] | None


@dataclass(frozen=True)
class PerModelSamples:
    """Record in the journal the samples of the models for which they are found so far."""

    rows: list[SelectedRows]


def per_model_samples(
    merge: Merge[Any, Any], check: TokenCheck, *, with_base: bool = False
) -> list[Tokenized]:
    """Return the samples of each model, in order, tokenised by the newest model's tokenizer.

    The samples of a model are the typical rows of the `data` in its entry, chosen by the model if
    the file has more than `samples.count` rows; for the newest model, otherwise those that
    `samples` names; for any model, otherwise all rows of `typical.jsonl` in its folder. If
    `samples.source` needs no data, they are drawn from each model. `with_base`, the base's samples
    come first; a base without rows generates them. Selected rows are recorded in the journal after
    `check` has passed.

    Raises InputError for a model without samples; UnfinishedError if the memory is too small for
    the selection, or an interrupted merge used other texts; and whatever `check` raises.
    """
    walk, arch = merge.checkpoints, merge.checkpoints.arch
    settings = merge.samples or Samples()
    newest, read = walk.inputs.newest, walk.inputs.all
    tokenizer = model_tokenizer(newest, read, arch)
    sources = [
        _Source(model, entry.data, _typical_file(model))
        for model, entry in zip(walk.inputs.models, merge.entries.models, strict=True)
    ]
    if sources[-1].data is None and settings.source == "data":
        if settings.data is not None:
            sources[-1] = replace(sources[-1], data=settings.data)
        elif settings.typical is not None:
            sources[-1] = replace(sources[-1], typical=Path(settings.typical))
    places = [*range(len(sources))]
    if with_base:
        model, entry = walk.inputs.base, merge.entries.base
        assert model is not None and entry is not None
        base = _Source(model, entry.data, _typical_file(model), may_draw=True)
        sources, places = [base, *sources], [len(sources), *places]
    found = merge.journal.find_prepared(PerModelSamples)
    kept = [] if found is None else found.rows
    differences = [] if merge.tokenizers_pass else tokenizer_differences(newest, read)
    # All checks that can fail come before any model chooses.
    pools: list[Tokenized] = []
    plans: list[Passes | None] = []
    for number, (place, source) in enumerate(zip(places, sources, strict=True)):
        pool, has_more = _pool(settings, source, arch, tokenizer, place, walk.budget)
        check_vocabulary(pool, arch.vocab_size, newest.name)
        check_readers(pool, differences)
        walk.check_same_samples(f"of {place}", pool, source.model.name)
        if number < len(kept):
            pool, has_more = _restore(kept[number], pool, source.model.name), False
        pools.append(pool)
        plans.append(_passes(settings, pool, source.model, walk, place) if has_more else None)
    counts = [settings.count if plan else None for plan in plans]
    check(list(map(_longest, pools, counts)), SELECTION_BYTES if any(plans) else 0)
    chosen = pools[: len(kept)]
    for number in range(len(kept), len(pools)):
        pool, plan = pools[number], plans[number]
        if plan:
            pool = _choose(merge, settings, pool, sources[number].model, places[number], plan)
        chosen.append(pool)
        kept = [*kept, SelectedRows(pools[number].digest(), _indices(pools[number], pool))]
        merge.journal.record_prepared(PerModelSamples(kept))
    return chosen


def _longest(pool: Tokenized, count: int | None) -> list[int]:
    """Return the lengths of the `count` longest rows, or of all, as a bound for the chosen rows."""
    lengths = sorted(len(ids) for ids in pool.token_ids)
    return lengths if count is None else lengths[-count:]


@dataclass(frozen=True)
class _Source:
    """Hold where a model's samples come from: rows to choose from, given rows, or the model."""

    model: Checkpoint
    data: str | None
    typical: Path | None
    may_draw: bool = False  # if it has no rows


def _typical_file(model: Checkpoint) -> Path | None:
    """Return the typical samples in the folder of a model, or of its last adapter, if any."""
    path = (*reversed(model.adapters), model.folder)[0] / TYPICAL
    return path if path.is_file() else None


def _pool(
    settings: Samples,
    source: _Source,
    arch: Architecture,
    tokenizer: Tokenizer,
    place: int,
    budget: int,
) -> tuple[Tokenized, bool]:
    """Return a model's rows, and whether typical rows are still to be chosen from them."""
    has_none = source.data is None and source.typical is None
    if settings.source != "data" or (has_none and source.may_draw):
        if settings.source == "data":
            settings = settings.model_copy(update={"source": "generated"})
        return draw_samples(settings, source.model, arch, tokenizer, place), False
    memory = room_for_rows(budget)
    limits: dict[str, Any] = {"max_tokens": settings.max_tokens, "memory": memory}
    fields = settings.fields
    if source.data is not None:
        limits |= {"pool": settings.pool, "seed": settings.seed}
        pool = read_pool(Path(source.data), tokenizer, fields=fields, **limits)
        return pool, len(pool.rows) > settings.count
    if source.typical is not None:
        # Rows from an earlier merge may have come from data with other fields.
        rows = read_rows(source.typical, memory=memory)
        if any(name not in row for row in rows for name in fields.named):
            fields = USUAL
        return read_typical(source.typical, tokenizer, fields=fields, **limits), False
    raise InputError(
        f"{source.model.name} has no samples of its own: add data: FILE to its entry in models, "
        f"put {TYPICAL} into its folder, or set samples: {{source: generated}}"
    )


def _passes(
    settings: Samples,
    pool: Tokenized,
    model: Checkpoint,
    walk: CheckpointWalk,
    place: int,
) -> Passes | None:
    """Return the passes in which a model chooses from its pool."""

    def decide() -> Any:
        passes = plan_selection(
            settings.model_copy(update={"typical": None}),
            [len(ids) for ids in pool.token_ids],
            model,
            walk.arch,
            dtype=walk.dtype,
            budget=walk.budget,
            split=walk.layout.split(1),
        )
        return passes and passes.to_json()

    decided = walk.agree(f"passes {place}", decide)
    return decided and Passes.from_json(decided)


def _choose(
    merge: Merge[Any, Any],
    settings: Samples,
    pool: Tokenized,
    model: Checkpoint,
    place: int,
    passes: Passes,
) -> Tokenized:
    """Return the rows of the pool that are typical according to the model."""
    walk = merge.checkpoints
    found = find_typical(
        settings.model_copy(update={"typical": None}),
        pool,
        model,
        walk.arch,
        passes=passes,
        dtype=walk.dtype,
        layout=walk.layout,
        progress=merge.progress,
    )
    # Machines that round differently could choose different rows.
    indices = walk.agree(f"typical of {place}", lambda: _indices(pool, found.samples))
    return pool.take(indices)


def _indices(pool: Tokenized, samples: Tokenized) -> list[int] | None:
    """Return the indices of the samples in the pool, None if they are all of it."""
    return None if samples is pool else np.searchsorted(pool.indices, samples.indices).tolist()


def _restore(kept: SelectedRows, pool: Tokenized, model: str) -> Tokenized:
    """Return the samples that an interrupted merge had selected from the same pool."""
    check_same_texts(kept.digest, pool, model)
    return pool if kept.indices is None else pool.take(kept.indices)
