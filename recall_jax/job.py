"""A merge job, from recipe to finished folder: where all rooms meet.

The command line, the demo and Python callers all come through `merge`.
"""

import platform
import resource
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from recall_jax.checkpoint.companions import copy_companions
from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.checkpoint.writer import DEFAULT_SHARD_BYTES, ShardedWriter, write_checksums
from recall_jax.engine.findings import Findings, report_entries
from recall_jax.engine.plan import DTYPES, Plan, is_tied, make_plan, open_models
from recall_jax.engine.progress import Clock, Progress, silent
from recall_jax.engine.rules import (
    Weigh,
    by_tensor,
    by_unit,
    linear_weights,
    mean_by_unit,
    recall_comparison,
)
from recall_jax.engine.stream import merge_stream
from recall_jax.errors import InputError
from recall_jax.merging.methods import METHODS, LinearParameters, RecallParameters
from recall_jax.merging.trees import check_weights
from recall_jax.output import output_folder
from recall_jax.recipe import Recipe
from recall_jax.report.card import model_card
from recall_jax.report.html import render_html
from recall_jax.report.record import load_report, write_report
from recall_jax.representations.data import write_jsonl
from recall_jax.similarity.compare import check_samples
from recall_jax.similarity.diagnostics import similarity_warnings

if TYPE_CHECKING:
    from recall_jax.engine.inputs import TypicalSamples

REPORT = "recall_report.json"
PAGE = "recall_report.html"
RECIPE = "recall_recipe.yml"
TYPICAL = "typical.jsonl"


@dataclass(frozen=True)
class Options:
    """How a merge is run, beside what the recipe says is merged."""

    force: bool = False
    shard_bytes: int = DEFAULT_SHARD_BYTES
    inputs: Collection[Path] = ()  # files that OUT must not replace, beside the recipe's own


DEFAULTS = Options()


@dataclass(frozen=True)
class _Rule:
    """How each unit is merged, and how to tell of it after the walk."""

    weigh: Weigh
    findings: Callable[[], Findings]
    reference: int | None = None
    compute_dtype: str | None = None
    typical: "TypicalSamples | None" = None
    told: dict[str, Any] | None = None  # entries of the report known from an earlier run


def merge(
    recipe: Recipe,
    out: Path,
    *,
    options: Options = DEFAULTS,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Carry out a recipe: `out` becomes the merged model with its report, or stays as it was.

    Returns the report, as `recall_report.json` holds it. Raises InputError for whatever is wrong
    with the recipe, the models, the data or `out`.
    """
    clock = Clock()
    with clock.stage("total"):
        models = open_models([entry.model for entry in recipe.models])
    inputs = [*options.inputs, *_input_paths(recipe, models)]
    with output_folder(out, force=options.force, inputs=inputs) as folder:
        with clock.stage("total"):
            plan = make_plan(
                models,
                tied=is_tied(models[-1]),
                out_dtype=recipe.out_dtype or recipe.dtype,
            )
            rule = _rule(recipe, models, plan, clock, progress)
            with ShardedWriter(folder, plan.specs, options.shard_bytes) as writer:
                merge_stream(
                    plan,
                    rule.weigh,
                    writer.write,
                    kernel=METHODS[recipe.merge_method].kernel(recipe.parameters),
                    reference=-1 if rule.reference is None else rule.reference,
                    clock=clock,
                    progress=progress,
                )
        report = _report(recipe, models, plan, rule, clock, writer.bytes_written)
        _write_companions(folder, out.name, recipe, models, rule, report)
        write_checksums(folder, writer.checksums)
    return report


def _rule(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    plan: Plan,
    clock: Clock,
    progress: Progress,
) -> _Rule:
    if recipe.weights is not None:
        return _given_rule(Path(recipe.weights), models, plan)
    if METHODS[recipe.merge_method].compares_models:
        return _recall_rule(recipe, models, clock, progress)
    if isinstance(recipe.parameters, LinearParameters):
        weights = linear_weights(recipe, plan.specs)
    else:
        weights = dict.fromkeys(plan.specs, np.full(len(models), 1 / len(models), np.float32))
    found = Findings(mean_by_unit(weights, plan.specs))
    return _Rule(by_tensor(weights), lambda: found)


def _given_rule(path: Path, models: Sequence[Checkpoint], plan: Plan) -> _Rule:
    told = load_report(path)
    if told["units"] != list(plan.units):
        raise InputError(
            f"{path} has weights for the units {_span(told['units'])}, but these models have "
            f"{_span(list(plan.units))}"
        )
    weights = check_weights(np.asarray(told["weights"], np.float32), len(models))
    findings = Findings(
        weights, *(_array(told.get(key)) for key in ("similarity", "sigma", "adjacent"))
    )
    rule = by_unit(weights, list(plan.units))
    return _Rule(rule, lambda: findings, reference=told.get("reference"), told=told)


def _recall_rule(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    clock: Clock,
    progress: Progress,
) -> _Rule:
    # The models' forward, and all it imports, is for methods that run the models.
    from recall_jax.engine.forward import StreamedForward
    from recall_jax.engine.inputs import common_architecture, compute_dtype, find_typical
    from recall_jax.engine.recall import Comparer

    assert isinstance(recipe.parameters, RecallParameters)
    assert recipe.samples is not None
    comparison = recall_comparison(recipe.parameters, [entry.model for entry in recipe.models])
    reference = None if comparison.reference == "pairwise" else comparison.reference
    teacher = models[-1 if reference is None else reference]
    arch = common_architecture(models, recipe.ignore_config)
    dtype = compute_dtype(recipe.compute_dtype, models[-1])
    with clock.stage("select"):
        typical = find_typical(recipe.samples, teacher, arch, dtype, progress)
        check_samples(len(typical.samples.rows), comparison)
    comparer = Comparer(
        StreamedForward.of(
            arch,
            typical.samples.token_ids,
            batch_size=recipe.samples.batch_size,
            dtype=dtype,
        ),
        [model.name for model in models],
        comparison,
        recipe.parameters.temperature,
    )
    return _Rule(
        comparer.weigh,
        comparer.findings,
        reference=reference,
        compute_dtype=np.dtype(dtype).name,
        typical=typical,
    )


def _report(
    recipe: Recipe,
    models: Sequence[Checkpoint],
    plan: Plan,
    rule: _Rule,
    clock: Clock,
    bytes_written: int,
) -> dict[str, Any]:
    found, units, told = rule.findings(), list(plan.units), rule.told or {}
    typical = rule.typical and rule.typical.typical
    warnings = typical.warnings() if typical else []
    warnings += similarity_warnings(found.similarity, units, rule.reference)
    settings = recipe.model_dump(mode="json", exclude={"merge_method", "models", "parameters"})
    return {
        "format": 1,
        "method": recipe.merge_method,
        "models": [model.name for model in models],
        "reference": rule.reference,
        "units": units,
        "typical_samples": (
            rule.typical.samples.indices.tolist()
            if rule.typical
            else told.get("typical_samples", [])
        ),
        **report_entries(found),
        "typical": typical.summary() if typical else told.get("typical"),
        "warnings": warnings,
        "settings": {
            **recipe.parameters.model_dump(mode="json"),
            **settings,
            "compute_dtype": rule.compute_dtype,
        },
        "timing_s": clock.seconds,
        "bytes": {"read": sum(model.bytes_read for model in models), "written": bytes_written},
        "peak_memory_bytes": _peak_memory(),
        "versions": _versions(),
        "device": jax.devices()[0].device_kind,
        "selection_passes": rule.typical.passes if rule.typical else 0,
    }


def _write_companions(
    folder: Path,
    out_name: str,
    recipe: Recipe,
    models: Sequence[Checkpoint],
    rule: _Rule,
    report: dict[str, Any],
) -> None:
    """Everything in OUT beside the weights and their checksums."""
    out_dtype = recipe.out_dtype or recipe.dtype
    newest = models[-1]
    copy_companions(
        newest.folder,
        folder,
        config=newest.config,
        tokenizers=newest.tokenizer_folders,
        dtype=DTYPES[out_dtype] if out_dtype else None,
    )
    texts: Sequence[str] = ()
    if rule.typical is not None:
        texts = rule.typical.samples.texts
        write_jsonl(folder / TYPICAL, rule.typical.samples.typical_rows())
    (folder / RECIPE).write_text(
        _resolved(recipe, models, rule.compute_dtype).to_yaml(), encoding="utf-8"
    )
    write_report(folder / REPORT, report)
    (folder / PAGE).write_text(render_html(report, texts), encoding="utf-8")
    (folder / "README.md").write_text(model_card(report, out_name), encoding="utf-8")


def _resolved(recipe: Recipe, models: Sequence[Checkpoint], compute_dtype: str | None) -> Recipe:
    """The recipe with every local path absolute, so that it runs from anywhere."""
    names = ["+".join(str(p.resolve()) for p in (m.folder, *m.adapters)) for m in models]
    parameters = recipe.parameters
    if isinstance(parameters, RecallParameters):
        resolved = dict(zip((entry.model for entry in recipe.models), names, strict=True))
        reference = resolved.get(str(parameters.reference), parameters.reference)
        parameters = parameters.model_copy(update={"reference": reference})
    samples = recipe.samples
    if samples is not None:
        paths = {"data": _absolute(samples.data), "typical": _absolute(samples.typical)}
        samples = samples.model_copy(update=paths)
    update: dict[str, Any] = {
        "models": tuple(
            entry.model_copy(update={"model": name})
            for entry, name in zip(recipe.models, names, strict=True)
        ),
        "parameters": parameters,
        "samples": samples,
        "weights": _absolute(recipe.weights),
        "compute_dtype": compute_dtype,
    }
    return recipe.model_copy(update=update)


def _input_paths(recipe: Recipe, models: Sequence[Checkpoint]) -> list[Path]:
    """Every file and folder that the recipe reads."""
    folders = [folder for model in models for folder in (model.folder, *model.adapters)]
    files = [recipe.weights]
    if recipe.samples is not None:
        files += [recipe.samples.data, recipe.samples.typical]
    return [*folders, *(Path(name) for name in files if name)]


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(path).resolve())


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float64)


def _span(units: Sequence[str]) -> str:
    return f"{units[0]} … {units[-1]} ({len(units)})"


def _peak_memory() -> int:
    """Peak resident memory of this process in bytes, mapped input files included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _versions() -> dict[str, str]:
    packages = ("recall-jax", "jax", "jaxlib", "flax", "numpy")
    return {"python": platform.python_version()} | {name: version(name) for name in packages}
