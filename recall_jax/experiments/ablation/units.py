"""What the units of the newest, the base and the merged model tell of the domains of texts."""

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
from recall_jax.inputs.settings import make_samples
from recall_jax.jobs import stages
from recall_jax.jobs.outcome import TYPICAL
from recall_jax.representations.kmeans import kmeans

MODELS = ("newest", "base", "merged")


def look_at_units(
    plan: AblationPlan, merged: Path, scratch: Path, memory: int | None
) -> dict[str, Any]:
    """The analyses, JSON values; `scratch` is a folder for files that are not kept.

    Of each model (3) and unit (U): similarity within and across domains, and how often a text's
    neighbours tell its domain. Of each clustering of the same texts by the newest model: how its
    typical samples cover them, and what its clusters tell of the domain.
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
    """(3, U, n, E): what each of the models makes of the rows in each unit."""
    settings = plan.ablation.samples
    assert settings is not None
    path = scratch / "rows.jsonl"
    # A number of their own would put them in another order.
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
    """Each number of clusters with each unit that is clustered, of the values that are varied."""
    settings = plan.ablation.samples
    assert settings is not None
    found = []
    for unit in _varied(plan, "unit"):
        places = [plan.arch.units.index(name) for name in clustered_units(unit, plan.arch)]
        points = np.concatenate(list(texts[places]), axis=1)
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
    """The values of an axis, the recipe's own if it is not varied."""
    if axis in plan.axes:
        return [variant.value for variant in plan.axes[axis]]
    return [AXES[axis].own(plan.ablation)]


def _plain(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
