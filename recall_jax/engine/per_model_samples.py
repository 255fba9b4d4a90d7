"""Each model's own samples: rows of what it knows, given, chosen by it or drawn from it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.batching import SELECTION, Passes
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
from recall_jax.inputs.settings import Samples
from recall_jax.inputs.shapes import USUAL
from recall_jax.inputs.tokens import Tokenizer
from recall_jax.inputs.vocabularies import tokenizer_differences
from recall_jax.models.architecture import Architecture

TYPICAL = "typical.jsonl"

TokenCheck = Callable[[Sequence[Sequence[int]], int], object]
"""Raises where rows of such lengths, of each model, do not fit beside so many bytes."""


@dataclass(frozen=True)
class SelectedRows:
    """A digest of a model's rows, and the places of those selected: None where it is all."""

    texts: str
    places: list[int] | None


@dataclass(frozen=True)
class PerModelSamples:
    """What the journal keeps of each model's samples, of as many models as are finished."""

    rows: list[SelectedRows]


def per_model_samples(
    merge: Merge[Any, Any], check: TokenCheck, *, with_base: bool = False
) -> list[Tokenized]:
    """The samples of each model, in order, by the newest model's tokenizer.

    A model's are the typical rows of its entry's `data`, chosen by the model itself where the file
    has more than `samples.count`; of the newest else those that `samples` names; else the
    `typical.jsonl` in its folder, whole. Of a `samples.source` that needs no data they are drawn
    from each model. `with_base`, the base's come first: of its own rows, and where it has no others
    they are generated from it. What was chosen is kept in the journal, once `check` has passed.

    Raises InputError for a model without samples; UnfinishedError where the memory is too small to
    choose, or an interrupted merge saw other texts; and whatever `check` raises.
    """
    walk, arch = merge.checkpoints, merge.checkpoints.arch
    settings = merge.samples or Samples()
    newest, read = walk.inputs.newest, walk.inputs.all
    tokenizer = model_tokenizer(newest, read, arch)
    sources = [
        _Source(model, entry.data, _beside(model))
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
        base = _Source(model, entry.data, _beside(model), may_draw=True)
        sources, places = [base, *sources], [len(sources), *places]
    found = merge.journal.find_prepared(PerModelSamples)
    kept = [] if found is None else found.rows
    differences = [] if merge.tokenizers_pass else tokenizer_differences(newest, read)
    # What can be refused is, before a model chooses.
    pools: list[Tokenized] = []
    plans: list[Passes | None] = []
    for number, (place, source) in enumerate(zip(places, sources, strict=True)):
        pool, has_more = _pool(settings, source, arch, tokenizer, place, walk.budget)
        check_vocabulary(pool, arch.vocab_size, newest.name)
        check_readers(pool, differences)
        walk.check_same_samples(f"of {place}", pool, source.model.name)
        if number < len(kept):
            pool, has_more = _again(kept[number], pool, source.model.name), False
        pools.append(pool)
        plans.append(_passes(settings, pool, source.model, walk, place) if has_more else None)
    counts = [settings.count if plan else None for plan in plans]
    check(list(map(_longest, pools, counts)), SELECTION if any(plans) else 0)
    own = pools[: len(kept)]
    for number in range(len(kept), len(pools)):
        pool, plan = pools[number], plans[number]
        if plan:
            pool = _chosen(merge, settings, pool, sources[number].model, places[number], plan)
        own.append(pool)
        kept = [*kept, SelectedRows(pools[number].digest(), _places(pools[number], pool))]
        merge.journal.record_prepared(PerModelSamples(kept))
    return own


def _longest(pool: Tokenized, count: int | None) -> list[int]:
    """The most that the lengths of `count` rows, or of all, can come to."""
    lengths = sorted(len(ids) for ids in pool.token_ids)
    return lengths if count is None else lengths[-count:]


@dataclass(frozen=True)
class _Source:
    """Where a model's samples come from: rows to choose from, rows as given, or the model."""

    model: Checkpoint
    data: str | None
    typical: Path | None
    may_draw: bool = False  # where it has no rows


def _beside(model: Checkpoint) -> Path | None:
    """The typical samples in a model's folder; of one with adapters the base's are not its own."""
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
    """A model's rows, and whether its typical ones are yet to be chosen from them."""
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
        f"{source.model.name} has no samples of its own: give its entry in models data: FILE, put "
        f"{TYPICAL} in its folder, or take samples: {{source: generated}}"
    )


def _passes(
    settings: Samples,
    pool: Tokenized,
    model: Checkpoint,
    walk: CheckpointWalk,
    place: int,
) -> Passes | None:
    """How the model at a place is to choose from its pool."""

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


def _chosen(
    merge: Merge[Any, Any],
    settings: Samples,
    pool: Tokenized,
    model: Checkpoint,
    place: int,
    passes: Passes,
) -> Tokenized:
    """The typical rows of the pool at a place among all, in the eyes of the model."""
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
    # A machine that rounds otherwise could choose others.
    places = walk.agree(f"typical of {place}", lambda: _places(pool, found.samples))
    return pool.take(places)


def _places(pool: Tokenized, samples: Tokenized) -> list[int] | None:
    """Where in the pool the samples stand; None for all of it."""
    return None if samples is pool else np.searchsorted(pool.indices, samples.indices).tolist()


def _again(kept: SelectedRows, pool: Tokenized, model: str) -> Tokenized:
    """The samples that an interrupted merge had of the same pool."""
    check_same_texts(kept.texts, pool, model)
    return pool if kept.places is None else pool.take(kept.places)
