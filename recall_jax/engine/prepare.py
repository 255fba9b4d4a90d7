"""RECALL made ready to walk: typical samples chosen, the forward cut to fit the memory."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace

import numpy as np

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.budget import widest
from recall_jax.engine.cut import SELECTION, Cut, cut_forward, cut_rows, hidden_bytes_of
from recall_jax.engine.forward import StreamedForward
from recall_jax.engine.inputs import (
    TypicalSamples,
    common_architecture,
    compute_dtype,
    find_typical,
    read_samples,
)
from recall_jax.engine.journal import Journal
from recall_jax.engine.progress import Clock, Progress
from recall_jax.engine.recall import Comparer
from recall_jax.engine.resident import Resident
from recall_jax.engine.rules import Prepared, Rule
from recall_jax.engine.select import clustered_units
from recall_jax.recipe import Samples
from recall_jax.similarity.compare import Comparison, check_samples


def prepare_recall(
    models: Sequence[Checkpoint],
    settings: Samples,
    comparison: Comparison,
    *,
    temperature: float,
    dtype_name: str | None,
    ignore_config: Collection[str],
    journal: Journal,
    budget: int,
    beside: int,
    clock: Clock,
    progress: Progress,
    announce: Callable[[str], None],
) -> Prepared:
    """Choose the typical samples, or take them from the journal, and set up the comparison.

    `beside` are bytes of memory that the merge takes beside the forward, and beside what is held by
    now. The model that chooses is kept in memory for the merge where it fits, and then read only
    once.
    """
    reference = None if comparison.reference == "pairwise" else comparison.reference
    teacher = models[-1 if reference is None else reference]
    arch = common_architecture(models, ignore_config)
    dtype = compute_dtype(dtype_name, models[-1])
    itemsize = np.dtype(dtype).itemsize
    stored = max(widest(model.specs) for model in models)
    with clock.stage("select"):
        pool = read_samples(settings, teacher, arch)
        lengths = sorted(map(len, pool.token_ids))
        wanted = len(lengths) if settings.typical else min(settings.count, len(lengths))
        check_samples(wanted, comparison)
        cut = cut_forward(
            arch,
            lengths[-wanted:],  # whichever are chosen, they are no longer than these
            num_models=len(models),
            batch_size=settings.batch_size,
            itemsize=itemsize,
            stored=stored,
            budget=budget,
            beside=beside + SELECTION * (wanted < len(lengths)),
        )
        needed = cut.needed
        states = hidden_bytes_of(arch, lengths, settings.batch_size, itemsize)
        fits = needed + teacher.nbytes + states <= budget
        kept = Resident(teacher)
        if journal.prepared is not None:
            samples = TypicalSamples.from_json(journal.prepared["samples"], pool)
            cut = Cut(**journal.prepared["cut"])
        announce(
            f"forward: {wanted} rows of up to {lengths[-1]} tokens in batches of "
            f"{cut.batch_size}, {cut.models_at_once} of {len(models)} models at a time"
        )
        if journal.prepared is None:
            if wanted < len(lengths):
                passes = cut_rows(
                    arch,
                    lengths,
                    num_units=len(clustered_units(settings.unit, arch)),
                    batch_size=settings.batch_size,
                    itemsize=itemsize,
                    stored=stored,
                    budget=budget,
                )
                announce(_describe_selection(teacher.name, len(lengths), len(passes.rows), fits))
                needed = max(needed, passes.needed)
                if fits and teacher.adapters:  # folded, it is no map of a file
                    needed += teacher.nbytes
            samples = find_typical(
                settings,
                pool,
                kept if fits else teacher,
                arch,
                dtype=dtype,
                budget=budget,
                progress=progress,
            )
            samples = replace(samples, passes=0) if fits else samples
            journal.record_prepared({"samples": samples.to_json(), "cut": asdict(cut)})
        kept.release()
    forward = StreamedForward.of(
        arch,
        samples.samples.token_ids,
        batch_size=cut.batch_size,
        dtype=dtype,
        num_models=len(models),
        models_at_once=cut.models_at_once,
    )
    comparer = Comparer(forward, [model.name for model in models], comparison, temperature)
    return Prepared(
        Rule(comparer.weigh, comparer.findings, forward.place),
        [kept if model is teacher else model for model in models],
        needed=needed,
        cut={"batch_size": cut.batch_size, "models_at_once": cut.models_at_once},
        reference=reference,
        compute_dtype=np.dtype(dtype).name,
        samples=samples,
    )


def _describe_selection(teacher: str, rows: int, passes: int, fits: bool) -> str:
    how = "which stays in memory for the merge" if fits else "which the merge reads again"
    times = "pass" if passes == 1 else "passes"
    return f"typical samples: from {rows} rows in {passes} {times} over {teacher}, {how}"
