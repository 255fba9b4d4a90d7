"""How the page and the model card put numbers, names and findings into words."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any
from unicodedata import east_asian_width

from recall_jax.errors import escaped

# Characters that XML does not take: show their pictures instead.
_CONTROLS = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {
    0x7F: 0x2421,
    0xFFFE: 0xFFFD,
    0xFFFF: 0xFFFD,
}


_KEPT = "\n\t\xad\u200b\u200c\u200d\u2060"  # lines, and what joins or parts letters


def printable(text: str) -> str:
    """`text` as XML and UTF-8 can hold it, and as it reads.

    Control characters are pictured, lone surrogates "?", and what a terminal would obey or what
    turns the text around is written as an escape.
    """
    text = text.replace("\r\n", "\n").translate(_CONTROLS).encode("utf-8", "replace").decode()
    return escaped(text, _KEPT)


def number(value: float) -> str:
    """Four decimals, or two digits and an exponent where four decimals would hide the value."""
    if isinstance(value, int):
        return f"{value:,}"
    if value == 0 or 5e-4 <= abs(value) < 1e5:
        return f"{value:.4f}"
    return f"{value:.2e}"


def size(count: float | None) -> str:
    """A number of bytes in decimal units."""
    if count is None:
        return "unknown"
    if count < 1000:
        return f"{count:.0f} bytes"
    power = min(int(math.log10(count) // 3), 5)
    return f"{count / 1000**power:.3g} {' kMGTP'[power]}B"


def duration(seconds: float) -> str:
    """A time in the units in which one would say it."""
    if seconds < 1:
        return f"{1000 * seconds:.3g} ms"
    if seconds < 100:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 100:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def short_name(model: str, limit: int = 15) -> str:
    """A model's name without folders ("runs/base+runs/fr" -> "base+fr").

    A name wider than `limit` narrow characters loses its middle.
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
    """Width of a text in narrow characters; Chinese ones, for example, take two each."""
    return sum(2 if east_asian_width(character) in "WF" else 1 for character in text)


def roles(report: Mapping[str, Any]) -> list[str]:
    """For each of the K models what it was in a merge by similarity, "" if nothing special."""
    found: list[list[str]] = [[] for _ in report["models"]]
    if report["similarity"] is not None:
        found[-1].append("newest")
        if report["reference"] is not None:
            found[report["reference"]].append("reference")
    return [", ".join(names) for names in found]


def varies(weights: Sequence[Sequence[float]]) -> bool:
    """Whether any model's weight differs between units; weights (K, U)."""
    return any(len(set(row)) > 1 for row in weights)


def depth_verdict(report: Mapping[str, Any]) -> tuple[str, str] | None:
    """Whether the newest model's weight rises with depth: ("yes" or "no", the means behind it).

    The report's own finding, `weight_rises_with_depth`, which compares the mean weights of the
    first and the last third of the layers; None where there is none.
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
    """The method in a few lines of plain text, none where the report has no equation."""
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
        some = settings.get("merged_units", "all") != "all" or settings.get("threshold") is not None
        left = "; 1 for the newest model in units left to it" if some else ""
        return (
            compared,
            f"w = softmax of S / τ over the models k{left}",
            *_own_equation(report),
            f"r: hidden state, averaged over a text's tokens{aligned}; σ: bandwidth; "
            "τ: temperature; θ: parameters",
        )
    return _own_equation(report)


def _own_equation(report: Mapping[str, Any]) -> tuple[str, ...]:
    return (report["equation"],) if report.get("equation") else ()


def flat_settings(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Settings as (dotted name, value as one would write it in a recipe), unset ones left out."""
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            rows += flat_settings(value, f"{prefix}{name}.")
        elif isinstance(value, bool):
            rows.append((f"{prefix}{name}", str(value).lower()))
        elif value is not None and value != []:
            rows.append((f"{prefix}{name}", str(value)))
    return rows
