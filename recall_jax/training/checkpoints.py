"""Checkpoints of a run: the state of its last saved step, its best weights, and what it has seen.

They stand beside the journal of the work: `state-<step>/` and `best-<step>/` in Orbax's format. The
journal, one JSON object that is replaced whole, says which of them count; it is written after
them, and only then are the older ones removed, so that a kill at any time leaves a whole set.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import jax
import numpy as np

from recall_jax.checkpoint.orbax import load_orbax, save_orbax
from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.files.journal_lines import changed_input, journal_line, valid_records
from recall_jax.training.step import TrainState, Tree

FORMAT = 1
# These steer the steps to come, and are what to change where the loss was finite no more.
STEERING = ("learning_rate", "warmup", "clip_norm", "compute_dtype")
_ADVICE = "or run without --resume to start afresh"


@dataclass
class History:
    """What a run has seen so far; `best_step` is that of the lowest validation loss."""

    losses: list[float] = field(default_factory=list)  # of each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # steps made, loss
    best_step: int | None = None
    tokens: int = 0  # of all steps, counted by the loss or not
    seconds: float = 0.0  # of the steps, compilation left out

    @property
    def best_loss(self) -> float:
        """The validation loss of `best_step`, infinite before there is one."""
        return dict(self.validation).get(self.best_step, float("inf"))  # type: ignore[arg-type]

    @property
    def evaluations_since_best(self) -> int:
        """How many evaluations have brought nothing better."""
        return sum(step > (self.best_step or 0) for step, _ in self.validation)


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Where a run keeps its checkpoints, and what makes it the same run when it is resumed.

    `identity` holds JSON values: `settings` and `program` by name, `inputs` by path.
    """

    journal: Path
    identity: Mapping[str, Mapping[str, Any]]

    def save(self, state: TrainState, history: History) -> None:
        """Keep a state, and forget those before it."""
        name = f"state-{int(state.step)}"
        _save(self._folder(name), state)
        record = {"format": FORMAT, "identity": self.identity, "state": name, **asdict(history)}
        fresh = self.journal.with_suffix(".new")
        with storage_faults(f"write {self.journal}"):
            fresh.write_text(journal_line(record), encoding="utf-8")
            fresh.replace(self.journal)
        self._keep({name, f"best-{history.best_step}"})

    def save_best(self, trainable: Tree, step: int) -> None:
        """Keep weights as the best so far, and forget those that the journal does not count on."""
        _save(self._folder(f"best-{step}"), trainable)
        kept = self.check() or {}
        self._keep({f"best-{step}", f"best-{kept.get('best_step')}", str(kept.get("state"))})

    def load_best(self, like: Tree, step: int) -> Tree:
        """The best weights, numpy arrays in a tree such as `like`."""
        return _load(self._folder(f"best-{step}"), like)

    def resume(self, like: TrainState) -> tuple[TrainState, History] | None:
        """What an interrupted run has saved last, None if nothing; arrays are numpy.

        Raises UnfinishedError, which keeps it, where it is another run or an input has changed.
        """
        if (record := self.check()) is None:
            return None
        name = record["state"]
        self._keep({name, f"best-{record['best_step']}"})
        values = {field.name: record[field.name] for field in fields(History)}
        values["validation"] = [tuple(at) for at in values["validation"]]
        return _load(self._folder(name), like), History(**values)

    def check(self) -> dict[str, Any] | None:
        """The journal of an interrupted run, None if there is none; raises as `resume`."""
        if not self.journal.is_file():
            return None
        records, _ = valid_records(self.journal)
        record = records[0] if len(records) == 1 else {}  # that of a merge has many
        if record.get("format") != FORMAT or "state" not in record:
            raise UnfinishedError(
                "what was interrupted here is another command, of another version, or damaged: "
                f"resume it with what began it, {_ADVICE}"
            )
        self._check_same(record["identity"])
        return record

    def steered(self) -> list[str]:
        """What steers otherwise than in the run that is resumed, a line each."""
        then = (self.check() or {"identity": self.identity})["identity"]["settings"]
        now = self.identity["settings"]
        return [
            f"{name} was {then[name]} until the interruption, and is {now[name]} from here on"
            for name in STEERING
            if then.get(name) != now.get(name)
        ]

    def _folder(self, name: str) -> Path:
        return self.journal.parent / name

    def _keep(self, names: set[str]) -> None:
        for kind in ("state-*", "best-*"):
            for folder in self.journal.parent.glob(kind):
                if folder.name not in names:
                    shutil.rmtree(folder, ignore_errors=True)

    def _check_same(self, then: Mapping[str, Any]) -> None:
        now = json.loads(json.dumps(self.identity))
        for part in ("settings", "program"):
            for name in {**then[part], **now[part]}:
                old, new = then[part].get(name), now[part].get(name)
                if old != new and name not in STEERING:
                    raise UnfinishedError(
                        f"the interrupted run had {name} {json.dumps(old)}, not {json.dumps(new)}: "
                        f"go back to it, {_ADVICE}"
                    )
        if path := changed_input(then["inputs"], now["inputs"]):
            raise UnfinishedError(
                f"{path} is not what it was when the run was interrupted: restore it, {_ADVICE}"
            )


def _save(folder: Path, tree: Tree) -> None:
    with storage_faults(f"write {folder}"):
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed at this very step
        folder.mkdir(parents=True)
        save_orbax(folder, _named(tree))


def _load(folder: Path, like: Tree) -> Tree:
    """The tree in `folder`, whose leaves are as those of `like`; InputError if damaged."""
    found, expected = load_orbax(folder), _named(like)
    for name, leaf in expected.items():
        array = found.get(name, np.empty(0))
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise InputError(f"{folder} is damaged ({name}): {_ADVICE[3:]}")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])


def _named(tree: Tree) -> dict[str, Any]:
    """The leaves by their paths: Orbax knows dicts, but not the records of optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
