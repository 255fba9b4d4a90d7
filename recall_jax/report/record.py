"""Write and read the record of a merge, `recall_report.json`.

Shapes, for K models and U units: weights and similarity [K][U], sigma [U], adjacent [U-2].
"""

import json
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from recall_jax.errors import InputError, brief, shown

FORMAT = 1
KEYS = (
    "format",
    "method",
    "models",
    "reference",
    "units",
    "typical_samples",
    "sigma",
    "similarity",
    "weights",
    "adjacent",
    "typical",
    "warnings",
    "settings",
    "timing_s",
    "bytes",
    "peak_memory_bytes",
    "versions",
)
_KEYS_OF_WEIGHTS = ("format", "models", "units", "weights")
_KEYS_OF_TYPICAL = ("cluster_sizes", "inertia", "silhouette")


def validate_report(report: Mapping[str, Any], required: Collection[str] = KEYS) -> None:
    """Check a report against the format; further keys are allowed.

    Raises:
        ValueError: one line that names the key at fault.
    """
    if missing := [key for key in required if key not in report]:
        raise ValueError(f"key missing: {', '.join(missing)}")
    if (found := report["format"]) != FORMAT:
        raise ValueError(f"format is {shown(found)}, and only format {FORMAT} is known")
    models, units = report["models"], report["units"]
    for key, names in (("models", models), ("units", units)):
        if not (_is_list_of(str, names) and names):
            raise ValueError(f"{key} must be a list of at least one name")
    if len(set(units)) < len(units):
        raise ValueError("units must have distinct names")
    _check_numbers("sigma", report.get("sigma"), (len(units),))
    _check_numbers("similarity", report.get("similarity"), (len(models), len(units)))
    _check_numbers("weights", report.get("weights"), (len(models), len(units)))
    _check_numbers("adjacent", report.get("adjacent"), (max(len(units) - 2, 0),))

    reference = report.get("reference")
    if reference is not None and not (_is_count(reference) and reference < len(models)):
        raise ValueError(f"reference must be null or an index below {len(models)}")
    rows = report.get("typical_samples", [])
    if not (isinstance(rows, list) and all(map(_is_count, rows)) and rows == sorted(set(rows))):
        raise ValueError("typical_samples must be ascending, distinct row numbers")
    if not _is_list_of(str, report.get("warnings", [])):
        raise ValueError("warnings must be a list of strings")
    if "method" in report and not isinstance(report["method"], str):
        raise ValueError("method must be a name")
    for key in ("settings", "timing_s", "bytes", "versions"):
        if not isinstance(report.get(key, {}), Mapping):
            raise ValueError(f"{key} must be a table of names and values")
    _check_keys("bytes", report.get("bytes", {"read": 0, "written": 0}), ("read", "written"))
    if (typical := report.get("typical")) is not None:
        _check_keys("typical", typical, _KEYS_OF_TYPICAL)


def write_report(path: str | Path, report: Mapping[str, Any]) -> None:
    """Write a report of plain Python values, one key a line, numbers unrounded.

    Raises:
        ValueError: if a key is missing, a shape does not fit, or a number is NaN or infinite.
    """
    validate_report(report)
    keys = (*KEYS, *(key for key in report if key not in KEYS))
    lines = (f"{json.dumps(key)}: {json.dumps(report[key], allow_nan=False)}" for key in keys)
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    Path(path).write_text(text, encoding="utf-8")


def load_report(path: str | Path) -> dict[str, Any]:
    """Read a report, or a file with at least format, models, units and weights, to reuse them.

    Raises:
        InputError: if the file cannot be read, is not such a record, or has no weights.
    """
    advice = "give the recall_report.json or weights.json of an earlier run"
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        report = json.loads(text, parse_constant=_refuse_constant)
        if not isinstance(report, dict):
            raise ValueError("a JSON object is needed")
        validate_report(report, required=_KEYS_OF_WEIGHTS)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); {advice}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a record of weights: {brief(error)}; {advice}") from None
    if report["weights"] is None:
        method = report.get("method", "its method")
        raise InputError(f"{path}: {method} has no weights to use again; {advice}")
    return report


def _check_numbers(key: str, values: object, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless `values` is null or nested lists of finite numbers of that shape."""
    if values is None:
        return
    rows: Sequence[object] = [values]
    for length in shape:
        if not all(isinstance(row, list) and len(row) == length for row in rows):
            wanted = "".join(f"[{size}]" for size in shape)
            raise ValueError(f"{key} must be null or numbers of shape {wanted}")
        rows = [entry for row in rows if isinstance(row, list) for entry in row]
    for entry in rows:
        if not isinstance(entry, int | float) or isinstance(entry, bool):
            raise ValueError(f"{key} holds {shown(entry)}, which is not a number")
        if not abs(entry) <= sys.float_info.max:
            raise ValueError(f"{key} holds a number that is NaN or infinite")


def _check_keys(key: str, table: object, wanted: Sequence[str]) -> None:
    if not (isinstance(table, Mapping) and all(name in table for name in wanted)):
        raise ValueError(f"{key} must hold {', '.join(wanted)}")


def _is_list_of(kind: type, values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, kind) for value in values)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
