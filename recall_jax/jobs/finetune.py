"""Fine-tune a model on a data file, and write the trained model or adapter to a folder."""

import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from recall_jax.checkpoint.companions import copy_companions
from recall_jax.checkpoint.dtypes import DTYPES
from recall_jax.checkpoint.folder import Checkpoint, file_warnings, open_checkpoint
from recall_jax.checkpoint.tensors import TensorSpec
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.budget import memory_budget, room_for_rows
from recall_jax.engine.device import find_not_finite
from recall_jax.engine.inputs import common_architecture, compute_dtype
from recall_jax.engine.journal import input_files
from recall_jax.errors import InputError, UnfinishedError, storage_faults
from recall_jax.files.checksums import FileChecksum
from recall_jax.files.json_objects import write_json_object
from recall_jax.files.output import work_folder
from recall_jax.files.progress import Clock, Progress, silent
from recall_jax.generation.end_of_text import end_of_text
from recall_jax.inputs.tokens import load_tokenizer
from recall_jax.models.architecture import Architecture
from recall_jax.models.convert import from_flax, tensor_shapes, to_flax
from recall_jax.models.forward import Params
from recall_jax.parallel.machine import device, peak_memory_bytes, versions
from recall_jax.parallel.mesh import BATCH_ROWS, MODEL, format_mesh, make_mesh, parse_mesh
from recall_jax.report.training_card import training_card
from recall_jax.training.checkpoints import History, TrainingCheckpoints
from recall_jax.training.ewc import online, save_anchor
from recall_jax.training.examples import Examples, hold_out, read_examples, steps_per_epoch
from recall_jax.training.loop import TrainingPlan, train
from recall_jax.training.lora import save_lora
from recall_jax.training.methods import TrainingMethod, make_anchor, make_method
from recall_jax.training.optimizer import adamw, learning_rate
from recall_jax.training.settings import TrainingSettings
from recall_jax.training.step import Tree

RECORD = "training.json"
FISHER = "ewc/fisher.safetensors"  # in a subfolder, since vLLM loads every weight file at the top


@dataclass(frozen=True)
class FinetuneOptions:
    """Set how a fine-tuning runs, independently of the trained model.

    `force` replaces an output, `resume` continues an interrupted run. `shard_bytes` is the largest
    size of a weight file.
    """

    force: bool = False
    resume: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES


DEFAULTS = FinetuneOptions()


class _Data(NamedTuple):
    """Hold rows to train on, to validate on if any, and of earlier tasks."""

    examples: Examples
    validation: Examples | None
    earlier: list[Examples]


def finetune(
    model: str,
    out: Path,
    settings: TrainingSettings,
    *,
    options: FinetuneOptions = DEFAULTS,
    progress: Progress = silent,
    announce: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Train `model` by `settings`, and write the trained model or adapter to `out`.

    `announce` is called with the plan before the first step, and with every validation. Returns the
    record in `training.json`. On an error `out` stays as it was. Raises InputError for faults of
    the model, the data or `out`; UnfinishedError, which keeps the last checkpoint for `resume`, if
    the loss is no longer finite, or disk or memory fail.
    """
    clock = Clock()
    checkpoint = open_checkpoint(model)
    arch = common_architecture([checkpoint], settings.ignore_config)
    dtype = compute_dtype(settings.compute_dtype, checkpoint)
    mesh = _mesh(settings)
    with clock.stage("reading data"):
        data = _read_data(settings, checkpoint, arch)
    plan = _plan(settings, len(data.examples))
    rate = _rate(settings, plan)
    identity = {
        # Without the output's dtype, which affects no step, and may prove too narrow only at the
        # end.
        "settings": {"model": checkpoint.full_name, **asdict(replace(settings, out_dtype=None))},
        "inputs": input_files([checkpoint], map(Path, settings.data_files)),
        "program": {**versions(), "device": device(), "compute_dtype": np.dtype(dtype).name},
    }
    inputs = [checkpoint.folder, *checkpoint.adapters, *map(Path, settings.data_files)]
    with work_folder(out, force=options.force, resume=options.resume, inputs=inputs) as work:
        if work.discarded:
            announce("an interrupted run was discarded: --resume would have gone on with it")
        checkpoints = TrainingCheckpoints(work.journal, identity)
        if options.resume:  # checked first, since any other error would discard the work
            for line in checkpoints.changed_settings():
                announce(line)
        with clock.stage("reading weights"):
            params = _read_params(checkpoint, arch)
        with clock.stage("preparing"):
            method = make_method(settings, arch, params, data.earlier, dtype, mesh)
        announce(_describe(settings, method, data, plan, mesh))
        with clock.stage("training"):
            trained, history = train(
                method.objective,
                adamw(rate, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm),
                rate,
                method.trainable,
                method.frozen,
                data.examples,
                data.validation,
                plan,
                mesh=mesh,
                checkpoints=checkpoints,
                resume=options.resume,
                progress=progress,
                announce=announce,
            )
            trained = jax.device_get(trained)
        with clock.stage("writing"):
            _clear(work.folder)
            if settings.lora is not None:
                base = checkpoint.full_name
                save_lora(work.folder, arch, trained, settings.lora, base_model=base)
                checksums: Mapping[str, FileChecksum] = {}
                warnings: list[str] = []
            else:
                checksums, warnings = _write_model(
                    trained, work.folder, settings, checkpoint, arch, options
                )
        if settings.save_fisher:
            with clock.stage("measuring Fisher information"):
                anchor = make_anchor(settings, arch, trained, data.examples, dtype, mesh)
                if settings.ewc_decay is not None:
                    anchor = online(method.frozen["anchors"][0], anchor, settings.ewc_decay)
                (work.folder / FISHER).parent.mkdir()
                save_anchor(work.folder / FISHER, anchor)
        record = _record(settings, checkpoint, method, data, plan, history)
        record["warnings"] += [*file_warnings([checkpoint]), *warnings]
        record |= {"compute_dtype": np.dtype(dtype).name, "timing_s": clock.seconds}
        with storage_faults(f"write {work.folder}"):
            write_json_object(work.folder / RECORD, record)
            card = training_card(record, out.name)
            (work.folder / "README.md").write_text(card, encoding="utf-8")
        write_checksums(work.folder, checksums)
    return record


def check(settings: TrainingSettings, checkpoint: Checkpoint) -> None:
    """Raise InputError if `finetune` would refuse the settings, or any row of the data."""
    arch = common_architecture([checkpoint], settings.ignore_config)
    _mesh(settings)
    _rate(settings, _plan(settings, len(_read_data(settings, checkpoint, arch).examples)))


def _mesh(settings: TrainingSettings) -> Mesh:
    sizes = parse_mesh(settings.mesh)
    if sizes[MODEL] > 1:
        raise InputError(
            f"finetune.mesh {settings.mesh}: one model is trained; shard it over data, fsdp and "
            "tensor"
        )
    mesh = make_mesh(sizes)
    if settings.batch_size % (parts := math.prod(sizes[axis] for axis in BATCH_ROWS)):
        raise InputError(
            f"finetune.batch_size {settings.batch_size} cannot be divided into {parts} parts, "
            f"{' times '.join(BATCH_ROWS)} of finetune.mesh: make it a multiple"
        )
    return mesh


def _read_data(settings: TrainingSettings, checkpoint: Checkpoint, arch: Architecture) -> _Data:
    tokenizer = load_tokenizer(checkpoint.tokenizer_folders, arch.family)

    def read(path: str) -> Examples:
        examples = read_examples(
            Path(path),
            tokenizer,
            end_of_text=end_of_text(checkpoint)[0],
            max_tokens=settings.max_tokens,
            fields=settings.fields,
            memory=room_for_rows(memory_budget(None)),
        )
        if examples.largest_id >= arch.vocab_size:
            raise InputError(
                f"the tokenizer gives token id {examples.largest_id}, but {checkpoint.name} has "
                f"{arch.vocab_size} embeddings: use the tokenizer that belongs to the model"
            )
        return examples

    examples, validation = read(settings.data), None
    if settings.validation is not None:
        validation = read(settings.validation)
    elif settings.validation_share is not None:
        examples, validation = hold_out(examples, settings.validation_share, settings.seed)
    return _Data(examples, validation, list(map(read, settings.ewc_data)))


def _plan(settings: TrainingSettings, num_rows: int) -> TrainingPlan:
    epoch = steps_per_epoch(num_rows, settings.batch_size * settings.accumulate)
    return TrainingPlan(
        steps=settings.steps or settings.epochs * epoch,
        batch_size=settings.batch_size,
        accumulate=settings.accumulate,
        seed=settings.seed,
        save_every=settings.save_every,
        evaluate_every=settings.evaluate_every or epoch,
        patience=settings.patience,
    )


def _rate(settings: TrainingSettings, plan: TrainingPlan) -> optax.Schedule:
    """Return the schedule of the learning rate; InputError if no step would learn."""
    warmup_steps = math.ceil(settings.warmup * plan.steps)
    if plan.steps == 1 and warmup_steps:
        raise InputError(
            "the only step has the learning rate 0, from which finetune.warmup begins: nothing "
            "would be learnt; give finetune.warmup 0, or more finetune.steps or finetune.epochs"
        )
    return learning_rate(settings.learning_rate, settings.schedule, plan.steps, warmup_steps)


def _read_params(checkpoint: Checkpoint, arch: Architecture) -> Params:
    tensors = {name: checkpoint.read(name) for name in tensor_shapes(arch)}
    if fault := find_not_finite(checkpoint.name, tensors):
        raise InputError(fault)
    return to_flax(arch, tensors)


def _write_model(
    trained: Tree,
    folder: Path,
    settings: TrainingSettings,
    checkpoint: Checkpoint,
    arch: Architecture,
    options: FinetuneOptions,
) -> tuple[Mapping[str, FileChecksum], list[str]]:
    """Write the model in Hugging Face's format, in the dtype given or that of each tensor.

    Returns the checksums of the weight files, and warnings about the others.
    """
    out_dtype = DTYPES[settings.out_dtype] if settings.out_dtype else None
    tensors = from_flax(arch, trained)
    specs = {
        name: TensorSpec(out_dtype or checkpoint.stored[name].dtype, array.shape)
        for name, array in tensors.items()
    }
    warnings = copy_companions(
        checkpoint.folder,
        folder,
        config=checkpoint.config,
        tokenizers=checkpoint.tokenizer_folders,
        dtype=out_dtype,
    )
    with ShardedWriter(folder, specs, options.shard_bytes) as writer:
        for name, array in tensors.items():
            with np.errstate(over="ignore"):
                cast = array.astype(specs[name].dtype)
            if not np.isfinite(cast).all():
                raise UnfinishedError(
                    f"tensor {name} overflows {cast.dtype}: choose a wider one with "
                    "finetune.out_dtype"
                )
            writer.write(name, cast)
    return writer.checksums, warnings


def _describe(
    settings: TrainingSettings, method: TrainingMethod, data: _Data, plan: TrainingPlan, mesh: Mesh
) -> str:
    """Describe the plan of a fine-tuning in a line."""
    held_out = f" and {len(data.validation):,} to validate on" if data.validation else ""
    rows = plan.batch_size * plan.accumulate
    devices = f"{mesh.size} of {len(jax.devices())} devices ({device()})"
    if mesh.size > 1:
        devices += f", {format_mesh(mesh.shape)}"
    return (
        f"{settings.method}: {_size(method.trainable):,} parameters to train on "
        f"{len(data.examples):,} rows{held_out}, {plan.steps:,} steps of {rows} rows, on {devices}"
    )


def _record(
    settings: TrainingSettings,
    checkpoint: Checkpoint,
    method: TrainingMethod,
    data: _Data,
    plan: TrainingPlan,
    history: History,
) -> dict[str, Any]:
    """Return the content of `training.json`."""
    validation, warnings = data.validation, data.examples.warnings(settings.data)
    if validation is not None and settings.validation is not None:
        warnings += validation.warnings(settings.validation)
    for path, earlier in zip(settings.ewc_data, data.earlier, strict=True):
        warnings += earlier.warnings(path)
    return {
        "format": 1,
        "method": settings.method,
        "model": checkpoint.name,
        "parameters": {
            "trained": _size(method.trainable),
            "total": sum(math.prod(spec.shape) for spec in checkpoint.specs.values()),
        },
        "data": {"path": settings.data, **data.examples.facts()},
        "validation": validation
        and {"path": settings.validation or settings.data, **validation.facts()},
        "steps": len(history.losses),
        "steps_planned": plan.steps,
        "losses": history.losses,
        "validation_losses": [list(at) for at in history.validation],
        "best_step": history.best_step,
        "tokens": history.tokens,
        "tokens_per_second": history.tokens / history.seconds if history.seconds else None,
        "warnings": warnings,
        "settings": asdict(settings),
        "versions": versions(),
        "device": device(),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _clear(folder: Path) -> None:
    """Remove files left by a run that was killed while it wrote them."""
    with storage_faults(f"write {folder}"):
        shutil.rmtree(folder)
        folder.mkdir()


def _size(tree: Tree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
