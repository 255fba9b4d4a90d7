"""Write Markdown with the names and texts of the input escaped."""

import re
from collections.abc import Sequence


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already; bars in them are escaped."""
    lines = [columns, ["---"] * len(columns), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def code(text: str) -> str:
    """Format `text` as a code span."""
    text = " ".join(text.split())
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{pad}{text or ' '}{pad}{fence}"


def plain(text: str) -> str:
    """Escape `text` for use within a line, so that none of it is markup of Markdown or HTML."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*~\[\]])", r"\\\1", text)


def bullet(text: str) -> str:
    """Format `text` as an item of a list, even if it begins like a heading, a rule or a list."""
    return "- " + re.sub(r"^(\d*)([#>+=.)_-])(?=\W|$)", r"\1\\\2", plain(text))
