"""Markdown in which no name or text of the input is taken for markup."""

import re
from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of cells that are Markdown already; bars in them are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(text: str) -> str:
    """`text` as a code span."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def plain(text: str) -> str:
    """`text` within a line, with what Markdown or HTML would take as markup escaped."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*~\[\]])", r"\\\1", text)


def bullet(text: str) -> str:
    """`text` as one of a list, also where it begins as a heading, a rule or another list does."""
    return "- " + re.sub(r"^(\d*)([#>+=.)_-])(?=\W|$)", r"\1\\\2", plain(text))
