"""Merge with the weights in a report or weights file, instead of comparing the models."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from recall_jax.engine.findings import Findings
from recall_jax.engine.merge import Merge, Prepared, merging_bytes, weights_by_unit
from recall_jax.errors import InputError
from recall_jax.methods.method import Method
from recall_jax.methods.values import prepare_from_parameters
from recall_jax.methods.weights import check_weights


def prepare_from_weights(
    method: Method[Any, Any], merge: Merge[Any, Any], report: Mapping[str, Any], where: str
) -> Prepared:
    """Return the rule of a report's weights per unit, instead of the method's.

    If the method has other values too, these are the recipe's. `where` names the report in
    messages. Raises InputError if the report is for other units or models.
    """
    units = list(merge.walk.units)
    found = findings_from_report(report, where, units, len(merge.names))
    if not method.weighs_units:
        return prepare_from_parameters(merge, dict(zip(units, found.weights.T, strict=True)))
    return Prepared(
        weights_by_unit(found, merge.walk.specs),
        merging_bytes(merge.walk),
        reference=report.get("reference"),
        previous_report=report,
    )


def findings_from_report(
    report: Mapping[str, Any], where: str, units: Sequence[str], num_models: int
) -> Findings:
    """Return the weights that a report has for these units, and the quantities behind them.

    Raises InputError if it has other units, or another number of models.
    """
    if report["units"] != list(units):
        raise InputError(
            f"{where} has weights for the units {_span(report['units'])}, but these models have "
            f"{_span(units)}"
        )
    if (weighed := len(report["weights"])) != num_models:
        raise InputError(
            f"{where} has weights for {weighed} models, but this recipe merges {num_models}: "
            "compare these, without the base"
        )
    weights = check_weights(np.asarray(report["weights"], np.float32), num_models)
    return Findings(
        weights, *(_array(report.get(key)) for key in ("similarity", "sigma", "adjacent"))
    )


def _array(values: Any) -> np.ndarray | None:
    return None if values is None else np.asarray(values, np.float64)


def _span(units: Sequence[str]) -> str:
    return f"{units[0]} … {units[-1]} ({len(units)})"
