"""Format numbers, names and findings for pages and model cards."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any
from unicodedata import east_asian_width

from recall_jax.errors import escaped

# Characters that XML does not allow, replaced by their pictures.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {
    0x7F: 0x2421,
    0xFFFE: 0xFFFD,
    0xFFFF: 0xFFFD,
}


_KEPT = "\n\t\xad\u200b\u200c\u200d\u2060"  # line breaks, and joiners or breaks of letters


def printable(text: str) -> str:
    """Return `text` without characters that XML, UTF-8, terminals or readers would stumble over.

    Control characters become their pictures, lone surrogates become "?", and terminal controls and
    changes of text direction are escaped.
    """
    text = text.replace("\r\n", "\n").translate(_CONTROLS).encode("utf-8", "replace").decode()
    return escaped(text, _KEPT)


def number(value: float) -> str:
    """Format with four decimals, or with an exponent if four decimals would hide the value."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 5e-4 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.2e}"


def size(count: float | None) -> str:
    """Format a number of bytes in decimal units."""
    if count is None:
        return "unknown"
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count) // 3), 5)
    return f"{count / 1000**power:.3g} {' kMGTP'[power]}B"


def duration(seconds: float) -> str:
    """Format a time in ms, s, min or h."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def short_name(model: str, limit: int = 15) -> str:
    """Return a model's name without folders ("runs/base+runs/fr" -> "base+fr").

    The middle of a name wider than `limit` narrow characters is replaced by an ellipsis.
    """
    parts = [part.rstrip("/").rpartition("/")[2] or part for part in model.split("+")]
    name = "+".join(parts)
    if _columns(name) <= limit:
        return name
    half = len(name) // 2
    start, end = name[:half][:limit], name[half:][-limit:]
    while _columns(start) + _columns(end) >= limit:
        start, end = (start[:-1], end) if len(start) > len(end) else (start, end[1:])
    return f"{start}…{end}"


def _columns(text: str) -> int:
    """Return the width of a text in narrow characters; a Chinese one, for example, takes two."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def roles(report: Mapping[str, Any]) -> list[str]:
    """Return each model's role in a merge by similarity: newest, reference, both or ""."""
    found: list[list[str]] = [[] for _ in report["models"]]
    if report["similarity"] is not None:
        found[-1].append("newest")
        if report["reference"] is not None:
            found[report["reference"]].append("reference")
    return [", ".join(names) for names in found]


def varies(weights: Sequence[Sequence[float]]) -> bool:
    """Return whether any model's weight differs between units; weights (K, U)."""
    return any(len(set(row)) > 1 for row in weights)


def depth_verdict(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return whether the newest model's weight rises with depth, "yes" or "no", and the means.

    This is the report's `weight_rises_with_depth`, which compares the mean weights of the first and
    the last third of the layers; None if the report has none.
    """
    rises = report.get("weight_rises_with_depth")
    if rises is None or report["weights"] is None:
        return None
    layers = report["weights"][-1][1:-1]
    third = max(1, len(layers) // 3)
    shallow, deep = fmean(layers[:third]), fmean(layers[-third:])
    means = (
        f"{number(shallow)} on average over the first third of the layers, "
        f"{number(deep)} over the last third"
    )
    return ("yes" if rises else "no"), means


def equation(report: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the method in a few lines of plain text, none if the report has no equation."""
    if report["similarity"] is not None:
        settings = report["settings"]
        measure = settings.get("similarity", "rbf")
        if report["reference"] is None:
            compared = "Sₖ = mean similarity of model k and each other model"
        elif measure == "rbf":
            compared = "Sₖ = mean over the texts x of exp(−‖r_ref(x) − rₖ(x)‖² / 2σ²)"
        else:
            compared = "Sₖ = similarity of rₖ and r_ref over the texts"
        alignment = settings.get("alignment", "none")
        aligned = "" if alignment == "none" else f", aligned by {alignment}"
        partial = (
            settings.get("merged_units", "all") != "all" or settings.get("threshold") is not None
        )
        unmerged = "; 1 for the newest model in units that are not merged" if partial else ""
        return (
            compared,
            f"w = softmax of S / τ over the models k{unmerged}",
            *_merge_equation(report),
            f"r: hidden state, averaged over a text's tokens{aligned}; σ: bandwidth; "
            "τ: temperature; θ: parameters",
        )
    return _merge_equation(report)


def _merge_equation(report: Mapping[str, Any]) -> tuple[str, ...]:
    return (report["equation"],) if report.get("equation") else ()


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return settings as (dotted name, value as written in a recipe), without unset ones."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            rows.append((f"{prefix}{name}", str(value).lower()))
        elif value is not None and value != []:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
