"""Each model's own samples: rows of what it knows, given, chosen by it or drawn from it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.drawn_samples import draw_samples
from recall_jax.engine.inputs import compute_dtype, find_typical
from recall_jax.engine.rules import Merge
from recall_jax.engine.select import plan_selection
from recall_jax.errors import InputError, UnfinishedError
from recall_jax.models.architecture import Architecture
from recall_jax.recipe import Samples
from recall_jax.representations.data import read_rows
from recall_jax.representations.samples import (
    Tokenized,
    check_vocabulary,
    read_pool,
    read_typical,
)
from recall_jax.representations.tokens import Tokenizer, load_tokenizer

TYPICAL = "typical.jsonl"


def own_samples(merge: Merge, arch: Architecture) -> list[Tokenized]:
    """The samples of each model, in order, by the newest model's tokenizer.

    A model's are the typical rows of its entry's `data`, chosen by the model itself where the file
    has more than `samples.count`; else the `typical.jsonl` in its folder, whole; else, of the
    newest, those that `samples` names. Of a `samples.source` that needs no data they are drawn from
    each model. What was chosen is kept in the journal.

    Raises InputError for a model without samples; UnfinishedError where the memory is too small to
    choose, or an interrupted merge saw other texts.
    """
    settings = merge.recipe.samples or Samples()
    tokenizer = load_tokenizer(merge.models[-1].tokenizer_folders, arch.family)
    data = [entry.data for entry in merge.recipe.models]
    if settings.typical is None:
        data[-1] = data[-1] or settings.data
    kept = list((merge.journal.prepared or {}).get("own", ()))
    own: list[Tokenized] = []
    for place, (model, file) in enumerate(zip(merge.models, data, strict=True)):
        if settings.source != "data":
            pool, has_more = draw_samples(settings, model, arch, tokenizer, place), False
        else:
            given = _given(settings, model, is_newest=place == len(data) - 1)
            pool = _read(settings, model, file, given, tokenizer)
            has_more = file is not None and len(pool.rows) > settings.count
        check_vocabulary(pool, arch.vocab_size, merge.models[-1].name)
        if place < len(kept):
            samples = _again(kept[place], pool, model.name)
        elif has_more:
            samples = _chosen(settings, pool, model, arch, merge)
        else:
            samples = pool
        own.append(samples)
        if place >= len(kept):
            kept.append({"texts": pool.digest(), "places": _places(pool, samples)})
            merge.journal.record_prepared({**(merge.journal.prepared or {}), "own": kept})
    return own


def _given(settings: Samples, model: Checkpoint, *, is_newest: bool) -> Path | None:
    """The file of typical samples that a model has beside its data, if any."""
    if is_newest and settings.typical is not None:
        return Path(settings.typical)
    # Of a model with adapters, what lies beside its base is the base's.
    path = (*reversed(model.adapters), model.folder)[0] / TYPICAL
    return path if path.is_file() else None


def _read(
    settings: Samples, model: Checkpoint, file: str | None, given: Path | None, tokenizer: Tokenizer
) -> Tokenized:
    """A model's pool of rows, or its typical ones as given."""
    limits: dict[str, Any] = {"max_tokens": settings.max_tokens}
    if file is not None:
        limits |= {"field": settings.field, "pool": settings.pool, "seed": settings.seed}
        return read_pool(Path(file), tokenizer, **limits)
    if given is not None:
        # Rows from an earlier merge may have come from data with other fields.
        has_field = settings.field and all(settings.field in row for row in read_rows(given))
        return read_typical(given, tokenizer, field=settings.field if has_field else None, **limits)
    raise InputError(
        f"{model.name} has no samples of its own: give its entry in models data: FILE, put "
        f"{TYPICAL} in its folder, or take samples: {{source: generated}}"
    )


def _chosen(
    settings: Samples, pool: Tokenized, model: Checkpoint, arch: Architecture, merge: Merge
) -> Tokenized:
    """The typical rows of a pool, in the eyes of the model."""
    dtype = compute_dtype(merge.recipe.compute_dtype, merge.models[-1])
    settings = settings.model_copy(update={"typical": None})
    lengths = [len(ids) for ids in pool.token_ids]
    passes = plan_selection(settings, lengths, model, arch, dtype=dtype, budget=merge.budget)
    found = find_typical(
        settings, pool, model, arch, passes=passes, dtype=dtype, progress=merge.progress
    )
    return found.samples


def _places(pool: Tokenized, samples: Tokenized) -> list[int] | None:
    """Where in the pool the samples stand; None for all of it."""
    return None if samples is pool else np.searchsorted(pool.indices, samples.indices).tolist()


def _again(kept: Any, pool: Tokenized, model: str) -> Tokenized:
    """The samples that an interrupted merge had of the same pool."""
    if kept["texts"] != pool.digest():
        raise UnfinishedError(
            f"the texts or the tokenizer for {model} are not what they were when the merge was "
            "interrupted: restore them, or run without --resume to start afresh"
        )
    return pool if kept["places"] is None else pool.take(kept["places"])
