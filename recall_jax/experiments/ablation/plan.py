"""Plan an ablation, and check all of its inputs before anything is merged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recall_jax.checkpoint.folder import Checkpoint
from recall_jax.engine.inputs import common_architecture, read_samples
from recall_jax.engine.journal import input_files
from recall_jax.engine.plan import open_models
from recall_jax.engine.select import clustered_units
from recall_jax.evaluation.examples import Example
from recall_jax.evaluation.task import find_tasks
from recall_jax.experiments.ablation.recipe import RECIPE_RUN, Ablation, Variant, variants
from recall_jax.experiments.ablation.scores import check_comparable
from recall_jax.inputs.data import draw_indices, draw_rows
from recall_jax.inputs.row_files import Row
from recall_jax.jobs.evaluate import EvaluateOptions, TaskExamples, load_task_examples
from recall_jax.methods.recall import RecallParameters, recall_comparison
from recall_jax.models.architecture import Architecture
from recall_jax.parallel.machine import device, versions
from recall_jax.recipes.recipe import Recipe, make_recipe
from recall_jax.similarity.compare import check_samples

NEWEST, BASE, AVERAGE = "newest", "base", "average"
ROWS_OF_DOMAIN = 64


@dataclass(frozen=True)
class AblationPlan:
    """Hold an ablation that is ready to run.

    `runs` are the models to evaluate, each once: the newest one and the base as they are (by name),
    the average of all models, the recipe's merge, and the variants. `tasks` are evaluated on every
    model. `domains` are rows for the analyses of the units, none if there are fewer than two.
    `left_out` states which default values do not fit, and why.
    """

    ablation: Ablation
    models: Sequence[Checkpoint]
    base: Checkpoint
    arch: Architecture
    tasks: Sequence[TaskExamples]
    axes: Mapping[str, Sequence[Variant]]
    left_out: Sequence[str]
    runs: Mapping[str, Recipe | str]
    domains: Mapping[str, Sequence[Row]]

    @property
    def varied(self) -> set[str]:
        """Return the runs that may fail without ending the ablation: merges of another value."""
        return {each.name for values in self.axes.values() for each in values if not each.in_recipe}

    def files(self) -> list[Path]:
        """Return all files that are read, except those of the models."""
        samples, domains = self.ablation.samples, self.ablation.domains or {}
        assert samples is not None
        named = [samples.data, samples.typical, samples.prompts, *domains.values()]
        rows = [path for each in self.tasks for path in each.files]
        return [*map(Path, filter(None, named)), *rows]

    def identity(self) -> dict[str, Any]:
        """Return the identity of the ablation, which a resumed one must share."""
        return {
            "recipe": self.ablation.model_dump(mode="json"),
            "inputs": input_files([self.base, *self.models], self.files()),
            "rows": [each.digest() for each in self.tasks],
            "versions": {**versions(), "device": device()},
        }


def plan_ablation(ablation: Ablation) -> AblationPlan:
    """Open, read and check all inputs of an ablation.

    Raises InputError for faults of models, tasks, rows or values, or if these do not match.
    """
    evaluate = ablation.evaluate
    options = EvaluateOptions(
        data_root=None if evaluate.data_root is None else Path(evaluate.data_root),
        limit=evaluate.limit,
        batch_size=evaluate.batch_size,
    )
    tasks = find_tasks(ablation.groups["all"])
    check_comparable(tasks)
    names = [entry.model for entry in ablation.models]
    base, *models = open_models([ablation.base or names[0], *names])
    arch = common_architecture([base, *models], ablation.ignore_config)
    recipe = ablation.recipe
    assert recipe.samples is not None
    if recipe.samples.source == "data":
        read_samples(
            recipe.samples,
            models[-1],
            [base, *models],
            arch,
            ignore_tokenizers=ablation.ignore_tokenizers,
        )

    def check(varied: Recipe) -> None:
        assert isinstance(varied.parameters, RecallParameters) and varied.samples is not None
        comparison = recall_comparison(varied.parameters, names)
        clustered_units(varied.samples.unit, arch)
        if varied.samples.typical is None:
            check_samples(varied.samples.count, comparison)

    check(recipe)
    axes, left_out = variants(ablation, check)
    average = {"merge_method": "average", "models": [{"model": name} for name in names]}
    kept = ("dtype", "out_dtype", "ignore_config")
    shared = {key: getattr(recipe, key) for key in kept if getattr(recipe, key)}
    runs: dict[str, Recipe | str] = {NEWEST: models[-1].name, BASE: base.name}
    runs |= {AVERAGE: make_recipe(average | shared), RECIPE_RUN: recipe}
    runs |= {each.name: each.recipe for values in axes.values() for each in values}
    loaded = [load_task_examples(task, options) for task in tasks]
    return AblationPlan(
        ablation, models, base, arch, loaded, axes, left_out, runs, _domains(ablation, loaded)
    )


def _domains(ablation: Ablation, tasks: Sequence[TaskExamples]) -> dict[str, list[Row]]:
    """Return at most 64 rows of each domain, from the files named or else from the tasks."""
    if ablation.domains is not None:
        files = {name: Path(path) for name, path in ablation.domains.items()}
        drawn = {name: draw_rows(path, ROWS_OF_DOMAIN, 0)[1] for name, path in files.items()}
        return drawn if len(drawn) > 1 else {}
    assert ablation.samples is not None
    first, *others = ablation.samples.fields.named or ("text",)
    named = {
        each.task.task: [
            {first: _text(example), **dict.fromkeys(others, "")} for example in each.examples
        ]
        for each in tasks
    }
    drawn = {
        name: [rows[index] for index in draw_indices(len(rows), ROWS_OF_DOMAIN, 0)]
        for name, rows in named.items()
    }
    return drawn if len(drawn) > 1 else {}


def _text(example: Example) -> str:
    """Return the prompt with the right answer."""
    if example.choices:
        return example.prompt + example.choices[example.answer]
    return example.prompt + "".join(example.references[:1])
