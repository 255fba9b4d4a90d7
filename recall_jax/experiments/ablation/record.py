"""Make the record of an ablation: every variant with its scores, differences and their errors."""

from collections.abc import Mapping
from typing import Any

from recall_jax.experiments.ablation.axes import AXES, label
from recall_jax.experiments.ablation.plan import AblationPlan
from recall_jax.experiments.ablation.recipe import RECIPE_RUN
from recall_jax.experiments.ablation.scores import check_comparable, counted_metric, mean_difference
from recall_jax.parallel.machine import device, versions
from recall_jax.report.evaluation_page import mean_of_tasks


def make_ablation_record(plan: AblationPlan, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `ablation.json`, from the results of each run.

    It does not depend on how often the ablation was resumed.
    """
    tasks = [each.task for each in plan.tasks]
    by_name = {task.task: task for task in tasks}
    task_names = dict(zip(plan.ablation.groups["all"], by_name, strict=True))
    groups = {
        group: [task_names[name] for name in names] for group, names in plan.ablation.groups.items()
    }
    metrics = {name: counted_metric(task) for name, task in by_name.items()}
    return {
        "format": 1,
        "models": [model.name for model in plan.models],
        "base": plan.base.name,
        "units": list(plan.arch.units),
        "less_is_better": check_comparable(tasks),
        "tasks": [
            {
                "task": each.task.task,
                "metric": metrics[each.task.task],
                "rows": len(each.examples),
                "rows_in_all": each.total,
                "source": each.source,
            }
            for each in plan.tasks
        ],
        "groups": groups,
        "axes": [
            {
                "axis": name,
                "about": AXES[name].about,
                "values": [
                    {"value": each.value, "label": label(each.value), "run": each.name}
                    for each in values
                ],
            }
            for name, values in plan.axes.items()
        ],
        "runs": {name: _run(found[name], found[RECIPE_RUN], groups, metrics) for name in plan.runs},
        "domains": found[RECIPE_RUN].get("domains"),
        "warnings": [f"left out: {line}" for line in plan.left_out],
        "settings": plan.ablation.model_dump(mode="json", exclude_none=True),
        "versions": versions(),
        "device": device(),
    }


def _run(
    run: Mapping[str, Any],
    recipe_run: Mapping[str, Any],
    groups: Mapping[str, list[str]],
    metrics: Mapping[str, str],
) -> dict[str, Any]:
    """Return a run's scores, their means, and their differences from the recipe's merge."""
    if "error" in run:
        return dict(run)
    reported = {key: value for key, value in run.items() if key not in ("shares", "domains")}
    return reported | {
        "means": {
            group: mean_of_tasks([run["results"][task][metrics[task]] for task in names])
            for group, names in groups.items()
        },
        "differences": {
            group: mean_difference(
                [run["shares"][task] for task in names],
                [recipe_run["shares"][task] for task in names],
            )
            for group, names in groups.items()
        },
    }
