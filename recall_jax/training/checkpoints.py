"""Save and resume a training run: its last saved state, its best weights and its history.

The folder of the run's journal also holds `state-<step>/` and `best-<step>/` in Orbax's format. The
journal is one JSON object, replaced atomically, that names the valid ones. It is written after
them, and only then are the older ones removed, so that a kill at any time leaves a complete set.
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
# A resumed run may change these: they affect only later steps, and are what to change after the
# loss has diverged.
STEERING = ("learning_rate", "warmup", "clip_norm", "compute_dtype")
_ADVICE = "or run without --resume to start afresh"


@dataclass
class History:
    """Record the losses, tokens and time of a run so far.

    `best_step` is the step with the lowest validation loss.
    """

    losses: list[float] = field(default_factory=list)  # one for each step
    validation: list[tuple[int, float]] = field(default_factory=list)  # (steps made, loss)
    best_step: int | None = None
    tokens: int = 0  # in all steps, whether the loss counts them or not
    seconds: float = 0.0  # in all steps, without compilation

    @property
    def best_loss(self) -> float:
        """Return the validation loss at `best_step`, infinite before the first evaluation."""
        return dict(self.validation).get(self.best_step, float("inf"))  # type: ignore[arg-type]

    @property
    def evaluations_since_best(self) -> int:
        """Return the number of evaluations since the best one."""
        return sum(step > (self.best_step or 0) for step, _ in self.validation)


@dataclass(frozen=True)
class TrainingCheckpoints:
    """Save and load the checkpoints of a run, next to its `journal`.

    A run can be resumed only if its `identity` is unchanged, except for the settings in `STEERING`.
    The identity consists of JSON values: `settings` and `program` by name, `inputs` by path.
    """

    journal: Path
    identity: Mapping[str, Mapping[str, Any]]

    def save(self, state: TrainState, history: History) -> None:
        """Save a state and the history, and remove older states."""
        name = f"state-{int(state.step)}"
        _save(self._folder(name), state)
        record = {"format": FORMAT, "identity": self.identity, "state": name, **asdict(history)}
        fresh = self.journal.with_suffix(".new")
        with storage_faults(f"write {self.journal}"):
            fresh.write_text(journal_line(record), encoding="utf-8")
            fresh.replace(self.journal)
        self._remove_all_but({name, f"best-{history.best_step}"})

    def save_best(self, trainable: Tree, step: int) -> None:
        """Save the best weights so far, and remove others that the journal does not name."""
        _save(self._folder(f"best-{step}"), trainable)
        saved = self.check() or {}
        self._remove_all_but(
            {f"best-{step}", f"best-{saved.get('best_step')}", str(saved.get("state"))}
        )

    def load_best(self, like: Tree, step: int) -> Tree:
        """Return the best weights as numpy arrays, in a tree with the structure of `like`."""
        return _load(self._folder(f"best-{step}"), like)

    def resume(self, like: TrainState) -> tuple[TrainState, History] | None:
        """Return the last saved state, as numpy arrays, and its history; None if there is none.

        Raises UnfinishedError, which keeps the files, if they are those of a different run or an
        input has changed.
        """
        if (record := self.check()) is None:
            return None
        name = record["state"]
        self._remove_all_but({name, f"best-{record['best_step']}"})
        values = {field.name: record[field.name] for field in fields(History)}
        values["validation"] = [tuple(at) for at in values["validation"]]
        return _load(self._folder(name), like), History(**values)

    def check(self) -> dict[str, Any] | None:
        """Return the journal of an interrupted run, None if there is none.

        Raises UnfinishedError as `resume` does.
        """
        if not self.journal.is_file():
            return None
        records, _ = valid_records(self.journal)
        record = records[0] if len(records) == 1 else {}  # the journal of a merge has many
        if record.get("format") != FORMAT or "state" not in record:
            raise UnfinishedError(
                "what was interrupted here is another command, of another version, or damaged: "
                f"resume it with what began it, {_ADVICE}"
            )
        self._check_same(record["identity"])
        return record

    def changed_settings(self) -> list[str]:
        """Describe each setting that differs from the run being resumed, in a line."""
        then = (self.check() or {"identity": self.identity})["identity"]["settings"]
        now = self.identity["settings"]
        return [
            f"{name} was {then[name]} until the interruption, and is {now[name]} from here on"
            for name in STEERING
            if then.get(name) != now.get(name)
        ]

    def _folder(self, name: str) -> Path:
        return self.journal.parent / name

    def _remove_all_but(self, names: set[str]) -> None:
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
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed at this step
        folder.mkdir(parents=True)
        save_orbax(folder, _named(tree))


def _load(folder: Path, like: Tree) -> Tree:
    """Return the tree in `folder`; InputError unless its leaves match `like` in shape and dtype."""
    found, expected = load_orbax(folder), _named(like)
    for name, leaf in expected.items():
        array = found.get(name, np.empty(0))
        if (array.shape, array.dtype) != (leaf.shape, leaf.dtype):
            raise InputError(f"{folder} is damaged ({name}): {_ADVICE[3:]}")
    return jax.tree.unflatten(jax.tree.structure(like), [found[name] for name in expected])


def _named(tree: Tree) -> dict[str, Any]:
    """Return the leaves by path: Orbax saves dicts, but not the named tuples of optax."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
