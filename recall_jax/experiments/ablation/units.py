"""Analyse how the units of the newest, the base and the merged model separate domains of texts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.engine.select import clustered_units
from recall_jax.experiments.ablation.axes import AXES, label
from recall_jax.experiments.ablation.clusterings import coverage, mutual_information
from recall_jax.experiments.ablation.domains import domain_similarity, neighbour_accuracy
from recall_jax.experiments.ablation.plan import AblationPlan
from recall_jax.inputs.data import read_rows, write_jsonl
from recall_jax.inputs.row_files import Row
from recall_jax.inputs.settings import TYPICAL, make_samples
from recall_jax.jobs import stages
from recall_jax.representations.kmeans import kmeans

MODELS = ("newest", "base", "merged")


def analyse_units(
    plan: AblationPlan, merged: Path, scratch: Path, memory: int | None
) -> dict[str, Any]:
    """Return the analyses as JSON values; `scratch` is a folder for temporary files.

    For each of the three models and U units: similarity within and across domains, and the accuracy
    of neighbours in predicting a text's domain. For each clustering of the texts by the newest
    model: how its typical samples cover them, and the information about domains in its clusters.
    """
    rows = [row for each in plan.domains.values() for row in each]
    domains = np.repeat(np.arange(len(plan.domains)), list(map(len, plan.domains.values())))
    typical = read_rows(merged / TYPICAL)
    specs = [plan.models[-1].name, plan.base.name, str(merged)]
    states = _states(plan, specs, [*rows, *typical], scratch, memory)
    texts = states[:, :, : len(rows)]
    pairs = [[domain_similarity(unit, domains) for unit in model] for model in texts]
    shares = np.bincount(domains) / len(domains)
    return {
        "domains": {name: len(each) for name, each in plan.domains.items()},
        "models": list(MODELS),
        "within": [[_plain(unit.within) for unit in model] for model in pairs],
        "across": [[_plain(unit.across) for unit in model] for model in pairs],
        "neighbour_accuracy": [
            [neighbour_accuracy(unit, domains) for unit in model] for model in texts
        ],
        "chance": float(shares.max()),
        "own_coverage": coverage(texts[0], states[0, :, len(rows) :])._asdict(),
        "clusterings": _clusterings(plan, texts[0], domains),
    }


def _states(
    plan: AblationPlan, specs: Sequence[str], rows: Sequence[Row], scratch: Path, memory: int | None
) -> np.ndarray:
    """Return the pooled states (3, U, n, E) of each of the models for the rows."""
    settings = plan.ablation.samples
    assert settings is not None
    path = scratch / "rows.jsonl"
    # Rows with numbers would be sorted by these.
    write_jsonl(path, [{k: v for k, v in row.items() if k != "row"} for row in rows])
    values = settings.model_dump(include={"field", "max_tokens", "batch_size"}, exclude_none=True)
    return stages.extract(
        specs,
        make_samples({"typical": str(path), **values}),
        dtype_name=plan.ablation.compute_dtype,
        ignore_config=plan.ablation.ignore_config,
        ignore_tokenizers=plan.ablation.ignore_tokenizers,
        memory=memory,
    ).reps


def _clusterings(
    plan: AblationPlan, texts: np.ndarray, domains: np.ndarray
) -> list[dict[str, Any]]:
    """Analyse a clustering for each value of `count` and of `unit` that the ablation varies."""
    settings = plan.ablation.samples
    assert settings is not None
    found = []
    for unit in _varied(plan, "unit"):
        indices = [plan.arch.units.index(name) for name in clustered_units(unit, plan.arch)]
        points = np.concatenate(list(texts[indices]), axis=1)
        for count in _varied(plan, "count"):
            if count > len(points):
                continue
            clusters = kmeans(points, count, seed=settings.seed)
            typical = clusters.nearest[clusters.nearest >= 0]
            found.append(
                {
                    "unit": label(unit),
                    "count": count,
                    "coverage": coverage(texts, texts[:, typical])._asdict(),
                    "domains_covered": len(np.unique(domains[typical])) / len(plan.domains),
                    "mutual_information": mutual_information(
                        clusters.assignments, domains
                    )._asdict(),
                }
            )
    return found


def _varied(plan: AblationPlan, axis: str) -> Sequence[Any]:
    """Return the values of an axis, only the recipe's if it is not varied."""
    if axis in plan.axes:
        return [variant.value for variant in plan.axes[axis]]
    return [AXES[axis].value_in(plan.ablation)]


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
