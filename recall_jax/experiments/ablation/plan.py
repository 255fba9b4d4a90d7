"""Everything that an ablation is going to do, checked before anything is merged."""

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
from recall_jax.experiments.ablation.recipe import OWN, Ablation, Variant, variants
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
    """An ablation ready to run.

    `runs` are the models to be asked, each once: the newest one and the base as they are (by name),
    the average of all models, the recipe's own merge, and the variants. `domains` are rows for the
    units' analyses, none with fewer than two domains.
    """

    ablation: Ablation
    models: Sequence[Checkpoint]
    base: Checkpoint
    arch: Architecture
    asked: Sequence[TaskExamples]
    axes: Mapping[str, Sequence[Variant]]
    left_out: Sequence[str]
    runs: Mapping[str, Recipe | str]
    domains: Mapping[str, Sequence[Row]]

    @property
    def varied(self) -> set[str]:
        """The runs that may fail without an end to all: merges with another value."""
        return {each.name for values in self.axes.values() for each in values if not each.own}

    def files(self) -> list[Path]:
        """Every file that is read, beside the models'."""
        samples, domains = self.ablation.samples, self.ablation.domains or {}
        assert samples is not None
        named = [samples.data, samples.typical, samples.prompts, *domains.values()]
        tasks = [path for each in self.asked for path in each.files]
        return [*map(Path, filter(None, named)), *tasks]

    def identity(self) -> dict[str, Any]:
        """What makes an ablation the same: only then may one go on where another has stopped."""
        return {
            "recipe": self.ablation.model_dump(mode="json"),
            "inputs": input_files([self.base, *self.models], self.files()),
            "rows": [each.digest() for each in self.asked],
            "versions": {**versions(), "device": device()},
        }


def plan_ablation(ablation: Ablation) -> AblationPlan:
    """Open, read and check everything. Raises InputError for whatever does not fit."""
    evaluate = ablation.evaluate
    asking = EvaluateOptions(
        data_root=None if evaluate.data_root is None else Path(evaluate.data_root),
        limit=evaluate.limit,
        batch_size=evaluate.batch_size,
    )
    tasks = find_tasks(ablation.groups["all"])
    check_comparable(tasks)
    names = [entry.model for entry in ablation.models]
    base, *models = open_models([ablation.base or names[0], *names])
    arch = common_architecture([base, *models], ablation.ignore_config)
    own = ablation.recipe
    assert own.samples is not None
    if own.samples.source == "data":
        read_samples(
            own.samples,
            models[-1],
            [base, *models],
            arch,
            ignore_tokenizers=ablation.ignore_tokenizers,
        )

    def check(recipe: Recipe) -> None:
        assert isinstance(recipe.parameters, RecallParameters) and recipe.samples is not None
        comparison = recall_comparison(recipe.parameters, names)
        clustered_units(recipe.samples.unit, arch)
        if recipe.samples.typical is None:
            check_samples(recipe.samples.count, comparison)

    check(own)
    axes, left_out = variants(ablation, check)
    average = {"merge_method": "average", "models": [{"model": name} for name in names]}
    kept = ("dtype", "out_dtype", "ignore_config")
    shared = {key: getattr(own, key) for key in kept if getattr(own, key)}
    runs: dict[str, Recipe | str] = {NEWEST: models[-1].name, BASE: base.name}
    runs |= {AVERAGE: make_recipe(average | shared), OWN: own}
    runs |= {each.name: each.recipe for values in axes.values() for each in values}
    asked = [load_task_examples(task, asking) for task in tasks]
    return AblationPlan(
        ablation, models, base, arch, asked, axes, left_out, runs, _domains(ablation, asked)
    )


def _domains(ablation: Ablation, asked: Sequence[TaskExamples]) -> dict[str, list[Row]]:
    """At most 64 rows of each domain: of the files named, else of the tasks."""
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
        for each in asked
    }
    drawn = {
        name: [rows[place] for place in draw_indices(len(rows), ROWS_OF_DOMAIN, 0)]
        for name, rows in named.items()
    }
    return drawn if len(drawn) > 1 else {}


def _text(example: Example) -> str:
    """What is asked, with the right answer."""
    if example.choices:
        return example.prompt + example.choices[example.answer]
    return example.prompt + "".join(example.references[:1])
