"""A fine-tuning, from a model and a data file to a finished folder: where all rooms meet.

The command line and Python callers come through `finetune`.
"""

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike

from recall_jax.checkpoint.checksums import FileChecksum
from recall_jax.checkpoint.companions import companions, copy_companions
from recall_jax.checkpoint.folder import Checkpoint, open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.device import not_finite
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.plan import DTYPES
from recall_jax.engine.progress import Clock, Progress, silent
from recall_jax.errors import InputError, storage_faults
from recall_jax.evaluation.resident import end_of_text
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import from_flax, tensor_shapes, to_flax
from recall_jax.outcome import device, peak_memory_bytes, versions
from recall_jax.output import work_folder
from recall_jax.report.training_card import training_card
from recall_jax.representations.tokens import load_tokenizer
from recall_jax.stages import write_json
from recall_jax.training.checkpoints import Checkpoints, History
from recall_jax.training.examples import Examples, hold_out, read_examples, steps_per_epoch
from recall_jax.training.loop import Plan, train
from recall_jax.training.loss import completion_loss
from recall_jax.training.optimizer import SCHEDULES, adamw, learning_rate
from recall_jax.training.sharding import make_mesh, parse_mesh
from recall_jax.training.step import Objective, Tree

METHODS = ("full",)
RECORD = "training.json"


@dataclass(frozen=True)
class Settings:
    """What is trained on what, and how; the same names as the command's options.

    `steps` goes before `epochs`; `evaluate_every` None is once an epoch; 0 saves never.
    `learning_rate` is the highest of the schedule, `warmup` the share of the steps in which it
    rises. `mesh` is such as `data=2,fsdp=4`. InputError for a value that makes no sense.
    """

    data: str
    method: str = "full"
    validation: str | None = None
    validation_share: float | None = None
    field: str | None = None
    max_tokens: int = 512
    epochs: int = 3
    steps: int | None = None
    batch_size: int = 8
    accumulate: int = 1
    learning_rate: float = 2e-5
    schedule: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.0
    clip_norm: float = 1.0
    seed: int = 0
    patience: int | None = None
    evaluate_every: int | None = None
    save_every: int = 500
    compute_dtype: str | None = None
    out_dtype: str | None = None
    remat: bool = False
    mesh: str = "data=1"
    ignore_config: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what makes no sense, each in a line that names the option."""
        _choice("--method", self.method, METHODS)
        _choice("--schedule", self.schedule, SCHEDULES)
        if self.out_dtype is not None:
            _choice("--out-dtype", self.out_dtype, DTYPES)
        least = {"max_tokens": 2, "epochs": 1, "steps": 1, "batch_size": 1, "accumulate": 1}
        least |= {"patience": 1, "evaluate_every": 1, "save_every": 0, "seed": 0}
        least |= {"weight_decay": 0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not bound <= value < math.inf:
                raise InputError(f"{_option(name)} {value}: it must be at least {bound}")
        for name in ("learning_rate", "clip_norm"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise InputError(f"{_option(name)} {value}: it must be above 0")
        if not 0 <= self.warmup <= 1:
            raise InputError(f"--warmup {self.warmup}: it is a share of the steps, from 0 to 1")
        if self.validation_share is not None and not 0 < self.validation_share < 1:
            raise InputError(f"--validation-share {self.validation_share}: it lies between 0 and 1")
        if self.validation is not None and self.validation_share is not None:
            raise InputError("--validation and --validation-share: give one of them")
        validates = self.validation is not None or self.validation_share is not None
        if (self.patience or self.evaluate_every) and not validates:
            raise InputError(
                "--patience and --evaluate-every need rows to validate on: give --validation FILE "
                "or --validation-share"
            )


@dataclass(frozen=True)
class Options:
    """How a fine-tuning is run, beside what is trained."""

    force: bool = False
    resume: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES


DEFAULTS = Options()


class _Method(NamedTuple):
    """What is minimised in which tree, what else it is a function of, and how it is written."""

    objective: Objective
    trainable: Tree
    frozen: Tree
    write: Callable[[Tree, Path], Mapping[str, FileChecksum]]


def finetune(
    model: str,
    out: Path,
    settings: Settings,
    *,
    options: Options = DEFAULTS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train `model` as `settings` say: `out` becomes the trained model, or stays as it was.

    `announce` hears the plan before the first step, and every validation. Returns the record, as
    `training.json` holds it. Raises InputError for whatever is wrong with the model, the data or
    `out`; UnfinishedError, which leaves the last checkpoint for `resume`, where the loss is finite
    no more, or disk or memory fail.
    """
    clock = Clock()
    checkpoint = open_checkpoint(model)
    arch = common_architecture([checkpoint], settings.ignore_config)
    dtype = compute_dtype(settings.compute_dtype, checkpoint)
    mesh = make_mesh(parse_mesh(settings.mesh))
    if settings.batch_size % mesh.size:
        raise InputError(
            f"--batch-size {settings.batch_size} cannot be spread over {mesh.size} devices: "
            "make it a multiple"
        )
    with clock.stage("reading data"):
        examples, validation = _read_data(settings, checkpoint, arch)
    plan = _plan(settings, len(examples))
    identity = {
        "settings": asdict(settings) | {"model": _resolved(checkpoint)},
        "inputs": _inputs(settings, checkpoint),
        "program": {**versions(), "device": device(), "compute_dtype": np.dtype(dtype).name},
    }
    data_paths = [Path(path) for path in (settings.data, settings.validation) if path]
    inputs = [checkpoint.folder, *checkpoint.adapters, *data_paths]
    with work_folder(out, force=options.force, resume=options.resume, inputs=inputs) as work:
        if work.discarded:
            announce("an interrupted run was discarded: --resume would have gone on with it")
        with clock.stage("reading weights"):
            method = _method(settings, checkpoint, arch, dtype, options)
        announce(_describe(settings, method, examples, validation, plan, mesh))
        rate = learning_rate(
            settings.learning_rate,
            settings.schedule,
            plan.steps,
            math.ceil(settings.warmup * plan.steps),
        )
        with clock.stage("training"):
            trained, history = train(
                method.objective,
                adamw(rate, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm),
                rate,
                method.trainable,
                method.frozen,
                examples,
                validation,
                plan,
                mesh=mesh,
                checkpoints=Checkpoints(work.journal, identity),
                resume=options.resume,
                progress=progress,
                announce=announce,
            )
        with clock.stage("writing"):
            checksums = method.write(jax.device_get(trained), work.folder)
        record = _record(settings, checkpoint, method, examples, validation, plan, history)
        record |= {"compute_dtype": np.dtype(dtype).name}
        record |= {"timing_s": clock.seconds, "peak_memory_bytes": peak_memory_bytes()}
        with storage_faults(f"write {work.folder}"):
            write_json(work.folder / RECORD, record)
            card = training_card(record, out.name)
            (work.folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(work.folder, checksums)
    return record


def _read_data(
    settings: Settings, checkpoint: Checkpoint, arch: Architecture
) -> tuple[Examples, Examples | None]:
    """Rows to train on, and to validate on if any."""
    tokenizer = load_tokenizer(checkpoint.tokenizer_folders, arch.family)

    def read(path: str) -> Examples:
        examples = read_examples(
            Path(path),
            tokenizer,
            end_of_text=end_of_text(checkpoint)[0],
            max_tokens=settings.max_tokens,
            field=settings.field,
        )
        if examples.largest_id >= arch.vocab_size:
            raise InputError(
                f"the tokenizer gives token id {examples.largest_id}, but {checkpoint.name} has "
                f"{arch.vocab_size} embeddings: use the tokenizer that belongs to the model"
            )
        return examples

    examples = read(settings.data)
    if settings.validation is not None:
        return examples, read(settings.validation)
    if settings.validation_share is not None:
        return hold_out(examples, settings.validation_share, settings.seed)
    return examples, None


def _plan(settings: Settings, num_rows: int) -> Plan:
    epoch = steps_per_epoch(num_rows, settings.batch_size * settings.accumulate)
    return Plan(
        steps=settings.steps or settings.epochs * epoch,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
        save_every=settings.save_every,
        evaluate_every=settings.evaluate_every or epoch,
        patience=settings.patience,
    )


def _method(
    settings: Settings,
    checkpoint: Checkpoint,
    arch: Architecture,
    dtype: DTypeLike,
    options: Options,
) -> _Method:
    tensors = {name: checkpoint.read(name) for name in tensor_shapes(arch)}
    if fault := not_finite(checkpoint.name, tensors):
        raise InputError(fault)
    params = to_flax(arch, tensors)

    def loss(trainable: Tree, frozen: Tree, batch: Any, key: Any) -> Any:
        return completion_loss(arch, trainable, batch, dtype=dtype, remat=settings.remat)

    # Master weights: an update is often smaller than bfloat16 can tell from nothing.
    master = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), params)

    def write(trained: Tree, folder: Path) -> Mapping[str, FileChecksum]:
        return _write_model(trained, folder, settings, checkpoint, arch, options)

    return _Method(Objective(loss), master, {}, write)


def _write_model(
    trained: Tree,
    folder: Path,
    settings: Settings,
    checkpoint: Checkpoint,
    arch: Architecture,
    options: Options,
) -> Mapping[str, FileChecksum]:
    """The model in Hugging Face's format, each tensor in the dtype it came in or that asked for.

    Returns the checksums of the weight files.
    """
    wanted = DTYPES[settings.out_dtype] if settings.out_dtype else None
    tensors = from_flax(arch, trained)
    specs = {
        name: TensorSpec(wanted or checkpoint.specs[name].dtype, array.shape)
        for name, array in tensors.items()
    }
    copy_companions(
        checkpoint.folder,
        folder,
        config=checkpoint.config,
        tokenizers=checkpoint.tokenizer_folders,
        dtype=wanted,
    )
    with ShardedWriter(folder, specs, options.shard_bytes) as writer:
        for name, array in tensors.items():
            with np.errstate(over="ignore"):
                cast = array.astype(specs[name].dtype)
            if not np.isfinite(cast).all():
                raise InputError(
                    f"tensor {name} overflows {cast.dtype}: choose a wider one with --out-dtype"
                )
            writer.write(name, cast)
    return writer.checksums


def _describe(
    settings: Settings,
    method: _Method,
    examples: Examples,
    validation: Examples | None,
    plan: Plan,
    mesh: Mesh,
) -> str:
    """The plan of a fine-tuning in a line."""
    held_out = "" if validation is None else f" and {len(validation):,} to validate on"
    rows = plan.batch_size * plan.accumulate
    devices = f"{mesh.size} of {len(jax.devices())} devices ({device()})"
    return (
        f"{settings.method}: {_size(method.trainable):,} parameters to train on "
        f"{len(examples):,} rows{held_out}, {plan.steps:,} steps of {rows} rows, on {devices}"
    )


def _record(
    settings: Settings,
    checkpoint: Checkpoint,
    method: _Method,
    examples: Examples,
    validation: Examples | None,
    plan: Plan,
    history: History,
) -> dict[str, Any]:
    """What `training.json` holds."""
    speed = history.tokens / history.seconds if history.seconds else None
    return {
        "format": 1,
        "method": settings.method,
        "model": checkpoint.name,
        "parameters": {
            "trained": _size(method.trainable),
            "total": sum(math.prod(spec.shape) for spec in checkpoint.specs.values()),
        },
        "data": _facts(settings.data, examples),
        "validation": validation and _facts(settings.validation or settings.data, validation),
        "steps": len(history.losses),
        "steps_planned": plan.steps,
        "losses": history.losses,
        "validation_losses": [list(at) for at in history.validation],
        "best_step": history.best_step,
        "tokens": history.tokens,
        "tokens_per_second": speed,
        "warnings": _warnings(settings.data, examples),
        "settings": asdict(settings),
        "versions": versions(),
        "device": device(),
    }


def _facts(path: str, examples: Examples) -> dict[str, Any]:
    return {
        "path": path,
        "rows": len(examples),
        "tokens": sum(map(len, examples.token_ids)),
        "tokens_counted": examples.num_counted,
        "rows_left_out": examples.left_out,
        "sha256": examples.digest(),
    }


def _warnings(path: str, examples: Examples) -> list[str]:
    lines = []
    if examples.left_out:
        lines.append(
            f"{path}: {examples.left_out} rows were left out, as --max-tokens cuts off all that "
            "they would teach"
        )
    if examples.whole_chats:
        lines.append(
            f"{path}: of {examples.whole_chats} rows with messages the chat template does not tell "
            "the assistant's turns apart: all their tokens were learnt"
        )
    return lines


def _inputs(settings: Settings, checkpoint: Checkpoint) -> dict[str, Any]:
    """What every file that goes into a run is known by, by its path."""
    inputs: dict[str, Any] = dict(checkpoint.fingerprint())
    copied = companions(checkpoint.folder, checkpoint.tokenizer_folders).values()
    for path in (*copied, *(Path(path) for path in (settings.data, settings.validation) if path)):
        status = path.stat()
        inputs[str(path.resolve())] = [status.st_size, status.st_mtime_ns]
    return inputs


def _resolved(checkpoint: Checkpoint) -> str:
    return "+".join(str(path.resolve()) for path in (checkpoint.folder, *checkpoint.adapters))


def _size(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _choice(option: str, value: str, choices: Collection[str]) -> None:
    if value not in choices:
        raise InputError(f"{option} {value}: use {', '.join(choices)}")
