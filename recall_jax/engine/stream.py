"""Merge K checkpoints one unit at a time, in a single walk.

Unit u of every model is read once; the models' hidden states are advanced through it and compared;
the resulting weights merge it; it is written and released. A thread reads the next unit while one
is computed, and another writes the last one. Unit tensors stay where the files are mapped; besides
them, memory holds a few chunks of a tensor and the hidden states of the typical samples, whatever
the depth.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from operator import itemgetter
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from recall_jax.engine.background import BackgroundQueue, prefetch
from recall_jax.engine.chunks import Piece
from recall_jax.engine.device import overflow_message
from recall_jax.engine.kernel import Kernel
from recall_jax.engine.layout import ON_HOST, Layout
from recall_jax.engine.merge import Rule
from recall_jax.engine.needs import NO_NEEDS, Needs
from recall_jax.engine.plan import MergePlan
from recall_jax.engine.sources import Inputs
from recall_jax.errors import InputError
from recall_jax.files.progress import Clock, Progress, silent

BACKLOG = 2  # merged pieces that may wait for the writer


class Writer(Protocol):
    """Write the merged tensors in the order of the plan."""

    @property
    def bytes_written(self) -> int:
        """Return the tensor bytes written so far."""

    def takes(self, name: str) -> bool:
        """Return whether this process writes the tensor; the writer is not given any others."""

    def write_piece(self, name: str, piece: np.ndarray) -> None:
        """Write the next elements, (n,), of the next tensor."""


class _Unit(NamedTuple):
    name: str
    stored: Inputs[Mapping[str, Any]]  # tensors as the layout reads them
    placed: object  # the result of the rule's `place`


def merge_stream(
    plan: MergePlan,
    rule: Rule,
    writer: Writer,
    *,
    layout: Layout = ON_HOST,
    kernel: Kernel,
    reference: int,
    clock: Clock,
    finished: Callable[[str], None] = lambda unit: None,
    resumed: int = 0,
    needs: Needs = NO_NEEDS,
    progress: Progress = silent,
) -> None:
    """Walk over the units: read, weigh, merge, and write each tensor in the order of `plan.specs`.

    `kernel` merges a tensor with the values of `rule`; where all models agree, the elements of
    model `reference` are passed on. It gets the chunks of the `layout`, and tensors unsplit if the
    method `needs` full tensors. The `writer` gets the merged tensors that it takes, and
    `finished(unit)` is called after the last of a unit. The first `resumed` units are already
    written: they are read only if the rule runs the models, and merged again only if the rule has
    `on_merged`.

    Raises InputError naming the tensor and the model if a parameter is not finite.
    """
    units = plan.units
    names = list(units)
    walked = names if rule.place else names[resumed:]

    def read(unit: str) -> _Unit:
        with clock.stage("read"):
            # The unit before this one is computed now, and the one before that may still be used.
            if plan.larger_than_memory and (at := names.index(unit)) >= 3:
                _drop(plan, units[names[at - 3]])
            stored: Inputs[Mapping[str, Any]] = plan.inputs.map(
                lambda model: {name: layout.read(model, name) for name in units[unit]}
            )
            return _Unit(unit, stored, rule.place(unit, stored) if rule.place else None)

    def write(name: str, piece: Piece, stored: Inputs[Any]) -> None:
        with clock.stage("merge"):
            elements, finite = jax.block_until_ready(piece.elements), bool(piece.finite)
        if not finite:
            names = plan.inputs.map(lambda model: model.name)
            message = f"tensor {overflow_message(name, plan.specs[name].dtype)}"
            raise InputError(layout.fault(names, name, stored) or message)
        if writer.takes(name):
            with clock.stage("write"):
                writer.write_piece(name, np.asarray(elements)[piece.skip :])

    def report(unit: str, done: int) -> None:
        read = sum(model.bytes_read for model in plan.inputs.all)
        progress(unit, done, len(names), read=read, written=writer.bytes_written)

    with closing(prefetch(read, walked)) as coming, BackgroundQueue(BACKLOG) as writing:
        for unit, stored, placed in coming:
            done = names.index(unit)
            report(unit, done)
            with clock.stage("forward"):
                values = rule.values(unit, placed)
            del placed  # before another unit is placed
            if done < resumed and rule.on_merged is None:
                del values  # see below
                continue
            merged: dict[str, list[Piece]] = {}
            for name in units[unit]:
                arrays = stored.map(itemgetter(name))
                for piece in layout.merge(
                    arrays,
                    values[name],
                    plan.specs[name],
                    kernel=kernel,
                    reference=reference,
                    full=needs.full_tensors(name, plan.specs[name]),
                    replicated=needs.replicated,
                ):
                    if done >= resumed:
                        writing.submit(write, name, piece, arrays)
                    if rule.on_merged is not None:
                        merged.setdefault(name, []).append(piece)
            del values  # before those of the next unit exist
            if done >= resumed:
                writing.submit(finished, unit)
            if rule.on_merged is not None:
                rule.on_merged(
                    unit, {name: _concatenate(plan, name, merged[name]) for name in merged}
                )
    report("", len(names))


def _concatenate(plan: MergePlan, name: str, pieces: Sequence[Piece]) -> np.ndarray:
    """Return a merged tensor, concatenated from its pieces."""
    elements = [np.asarray(piece.elements)[piece.skip :] for piece in pieces]
    return np.concatenate(elements).reshape(plan.specs[name].shape)


def _drop(plan: MergePlan, names: Sequence[str]) -> None:
    for model in plan.inputs.all:
        for name in names:
            model.drop(name)
