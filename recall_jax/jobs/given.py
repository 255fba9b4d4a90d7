"""Weights that are given in a file, in place of those that comparing the models would tell."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from recall_jax.engine.findings import Findings
from recall_jax.errors import InputError
from recall_jax.jobs.trees.merge_trees import check_weights


def given_findings(
    told: Mapping[str, Any], path: Path, units: Sequence[str], num_models: int
) -> Findings:
    """What the record `told`, read from `path`, says of these units.

    Raises InputError where it is of other units, or of another number of models.
    """
    if told["units"] != list(units):
        raise InputError(
            f"{path} has weights for the units {_span(told['units'])}, but these models have "
            f"{_span(units)}"
        )
    if (weighed := len(told["weights"])) != num_models:
        raise InputError(
            f"{path} has weights for {weighed} models, but this recipe merges {num_models}: "
            "compare these, without the base"
        )
    weights = check_weights(np.asarray(told["weights"], np.float32), num_models)
    return Findings(
        weights, *(_array(told.get(key)) for key in ("similarity", "sigma", "adjacent"))
    )


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float64)


def _span(units: Sequence[str]) -> str:
    return f"{units[0]} … {units[-1]} ({len(units)})"
