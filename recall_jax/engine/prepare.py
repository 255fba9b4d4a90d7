"""RECALL made ready to walk: typical samples chosen, the forward cut to fit the memory."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import jax
import numpy as np
from jax.typing import DTypeLike

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import cacheable_bytes, widest
from recall_jax.engine.cut import SELECTION, Cut, Passes, cut_forward
from recall_jax.engine.inputs import (
    TypicalSamples,
    check_same_texts,
    common_architecture,
    compute_dtype,
    find_typical,
    read_samples,
)
from recall_jax.engine.recall import Comparer
from recall_jax.engine.resident import Resident
from recall_jax.engine.rules import Merge, Prepared, Rule, check_agreed, recall_comparison
from recall_jax.engine.select import plan_selection
from recall_jax.errors import InputError
from recall_jax.inputs.samples import Tokenized
from recall_jax.methods.parameters import RecallParameters
from recall_jax.models.architecture import Architecture
from recall_jax.similarity.compare import Comparison, check_samples


def prepare_recall(merge: Merge) -> Prepared:
    """Choose the typical samples, or take them from the journal, and set up the comparison.

    The model that chooses is kept in memory for the merge where it fits, and then read only once.
    Raises UnfinishedError where the memory is too small, or an interrupted merge saw other texts.
    """
    recipe, models, journal, announce = merge.recipe, merge.models, merge.journal, merge.announce
    assert isinstance(recipe.parameters, RecallParameters)
    assert recipe.samples is not None
    settings = recipe.samples
    comparison = recall_comparison(recipe.parameters, [entry.model for entry in recipe.models])
    reference = comparison.reference_index
    chooser = models[-1 if reference is None else reference]
    arch = common_architecture(models, recipe.ignore_config)
    dtype = compute_dtype(recipe.compute_dtype, models[-1])
    kept = Resident(chooser)
    with merge.clock.stage("select"):
        pool = read_samples(
            settings,
            chooser,
            models,
            arch,
            ignore_tokenizers=merge.tokenizers_pass,
            budget=merge.budget,
        )
        check_agreed(merge, "to choose from", pool, chooser.name)
        lengths = [len(ids) for ids in pool.token_ids]
        wanted = len(lengths) if settings.typical else min(settings.count, len(lengths))
        check_samples(wanted, comparison)
        if journal.prepared is not None:
            check_same_texts(journal.prepared.get("texts"), pool, chooser.name)
            cut = Cut(**journal.prepared["cut"])
            samples = TypicalSamples.from_json(journal.prepared["samples"], pool)
            announce(_describe_forward(samples.samples, cut, len(models)))
        else:
            passes, cut, fits = _decided(merge, arch, lengths, wanted, chooser, dtype)
            announce(_describe_forward(pool, cut, len(models)))
            if passes:
                announce(_describe_selection(chooser.name, len(lengths), len(passes.rows), fits))
            samples = find_typical(
                settings,
                pool,
                kept if fits else chooser,
                arch,
                passes=passes,
                dtype=dtype,
                layout=merge.layout,
                progress=merge.progress,
            )
            samples = replace(samples, passes=0) if fits else samples
            # A machine that rounds otherwise could choose others.
            samples = TypicalSamples.from_json(merge.agreed("typical", samples.to_json), pool)
            _check_found(samples, wanted, comparison)
            journal.record_prepared(
                {"texts": pool.digest(), "samples": samples.to_json(), "cut": asdict(cut)}
            )
        kept.release()
    forward = merge.layout.forward(
        arch,
        samples.samples.token_ids,
        batch_size=cut.batch_size,
        dtype=dtype,
        num_models=len(models),
        models_at_once=cut.models_at_once,
    )
    comparer = Comparer(
        forward,
        [model.name for model in models],
        comparison,
        recipe.parameters.weighing,
        merge.plan.units,
    )
    return Prepared(
        Rule(comparer.values, comparer.findings, forward.place),
        [kept if model is chooser else model for model in models],
        needed=cut.needed,
        cut={"batch_size": cut.batch_size, "models_at_once": forward.models_each},
        reference=reference,
        compute_dtype=np.dtype(dtype).name,
        samples=samples,
    )


def _decided(
    merge: Merge,
    arch: Architecture,
    lengths: Sequence[int],
    wanted: int,
    chooser: Checkpoint,
    dtype: DTypeLike,
) -> tuple[Passes | None, Cut, bool]:
    """How to fit the memory: the passes of the selection if there are any, how the forward is cut.

    And whether the model that chooses stays in memory.
    """
    assert merge.recipe.samples is not None
    settings, budget = merge.recipe.samples, merge.budget

    def decide() -> dict[str, Any]:
        passes = plan_selection(
            settings,
            lengths,
            chooser,
            arch,
            dtype=dtype,
            budget=budget,
            split=merge.layout.split(1),
        )
        cut = cut_forward(
            arch,
            sorted(lengths)[-wanted:],  # whichever are chosen, they are no longer than these
            num_models=len(merge.models),
            batch_size=settings.batch_size,
            itemsize=np.dtype(dtype).itemsize,
            stored=max(widest(model.specs) for model in merge.models),
            budget=budget,
            beside=merge.beside + (SELECTION if passes else 0),
            split=merge.layout.split(len(merge.models)),
        )
        needed = max(cut.needed, passes.needed if passes else 0)
        share = -(-chooser.nbytes // jax.process_count())  # over a mesh, its rows of each tensor
        # Folded adapters would stay as arrays of their own, not as maps of files.
        fits = not chooser.adapters and needed + share <= cacheable_bytes(budget)
        return {
            "passes": passes and passes.to_json(),
            "cut": asdict(replace(cut, needed=needed)),
            "fits": fits,
        }

    found = merge.agreed("forward", decide)
    passes = found["passes"] and Passes.from_json(found["passes"])
    return passes, Cut(**found["cut"]), found["fits"]


def _check_found(samples: TypicalSamples, wanted: int, comparison: Comparison) -> None:
    """Raise InputError where rows that are alike leave too few typical samples to compare on."""
    found = len(samples.samples.rows)
    try:
        check_samples(found, comparison)
    except InputError as error:
        raise InputError(
            f"the rows of data are alike to the model, which leaves {found} typical of {wanted}: "
            f"{error}"
        ) from error


def _describe_forward(samples: Tokenized, cut: Cut, num_models: int) -> str:
    longest = max(map(len, samples.token_ids))
    return (
        f"forward: rows of up to {longest} tokens in batches of {cut.batch_size}, "
        f"{cut.models_at_once} of {num_models} models at a time"
    )


def _describe_selection(chooser: str, rows: int, passes: int, fits: bool) -> str:
    how = "which stays in memory for the merge" if fits else "which the merge reads again"
    times = "pass" if passes == 1 else "passes"
    return f"typical samples: from {rows} rows in {passes} {times} over {chooser}, {how}"
