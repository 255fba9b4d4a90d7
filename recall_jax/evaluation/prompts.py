"""Render templates of prompts: Jinja in a sandbox that can access only the fields of a row.

A task's file may come from someone else, so its templates run in a separate process with limits.
"""

from collections.abc import Mapping
from typing import Any

from recall_jax.errors import InputError, brief, some
from recall_jax.foreign.process import ForeignError, run_limited


def check_template(text: str) -> str:
    """Return `text` if it is a Jinja template, else raise ValueError."""
    try:
        run_limited("rendered", template=text, row=None)
    except ForeignError as error:
        raise ValueError(f"is no Jinja template: {brief(error)}") from error
    return text


def check_expression(text: str) -> str:
    """Return `text` if it is a Jinja expression, else raise ValueError."""
    try:
        run_limited("evaluated", expression=text, row=None)
    except ForeignError as error:
        raise ValueError(f"is no Jinja expression: {brief(error)}") from error
    return text


def render_template(template: str, row: Mapping[str, Any], where: str, key: str) -> str:
    """Render a template with the fields of a row.

    Raises InputError, which begins with `where` and `key`, if it fails on this row.
    """
    try:
        return str(run_limited("rendered", template=template, row=row))
    except ForeignError as error:
        raise _fault(error, row, where, key) from error


def evaluate_expression(expression: str, row: Mapping[str, Any], where: str, key: str) -> Any:
    """Return the value of an expression of a row's fields, such as `answers.text`.

    Raises InputError, which begins with `where` and `key`, if it fails on this row.
    """
    try:
        return run_limited("evaluated", expression=expression, row=row)
    except ForeignError as error:
        raise _fault(error, row, where, key) from error


def _fault(error: ForeignError, row: Mapping[str, Any], where: str, key: str) -> InputError:
    return InputError(f"{where}: {key}: {brief(error)} (the row has {some(row, 10)})")
