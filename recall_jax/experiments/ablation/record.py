"""What `ablation.json` holds: every variant with its scores, and how sure a difference is."""

from collections.abc import Mapping
from typing import Any

from recall_jax.experiments.ablation.axes import AXES, label
from recall_jax.experiments.ablation.plan import AblationPlan
from recall_jax.experiments.ablation.recipe import OWN
from recall_jax.experiments.ablation.scores import check_comparable, counted_metric, mean_difference
from recall_jax.parallel.machine import device, versions
from recall_jax.report.evaluation_page import mean_of_tasks


def make_ablation_record(plan: AblationPlan, found: Mapping[str, Any]) -> dict[str, Any]:
    """The record, from what each run came to. Nothing in it depends on how often it was resumed."""
    tasks = [each.task for each in plan.asked]
    by_name = {task.task: task for task in tasks}
    places = dict(zip(plan.ablation.groups["all"], by_name, strict=True))
    groups = {
        name: [places[asked] for asked in names] for name, names in plan.ablation.groups.items()
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
            for each in plan.asked
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
        "runs": {name: _run(found[name], found[OWN], groups, metrics) for name in plan.runs},
        "domains": found[OWN].get("domains"),
        "warnings": [f"left out: {line}" for line in plan.left_out],
        "settings": plan.ablation.model_dump(mode="json", exclude_none=True),
        "versions": versions(),
        "device": device(),
    }


def _run(
    mine: Mapping[str, Any],
    own: Mapping[str, Any],
    groups: Mapping[str, list[str]],
    metrics: Mapping[str, str],
) -> dict[str, Any]:
    """One run: its scores, their means, and how these differ from the recipe's own merge."""
    if "error" in mine:
        return dict(mine)
    told = {key: value for key, value in mine.items() if key not in ("shares", "domains")}
    return told | {
        "means": {
            group: mean_of_tasks([mine["results"][task][metrics[task]] for task in names])
            for group, names in groups.items()
        },
        "differences": {
            group: mean_difference(
                [mine["shares"][task] for task in names], [own["shares"][task] for task in names]
            )
            for group, names in groups.items()
        },
    }
