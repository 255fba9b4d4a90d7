"""Templates of prompts: Jinja in a sandbox that can reach the row's fields and nothing else.

A task's file may be another's: what it says is run in the process for that, within its limits.
"""

from collections.abc import Mapping
from typing import Any

from recall_jax.errors import InputError, brief, some
from recall_jax.foreign.process import ForeignError, run_limited


def check_template(text: str) -> str:
    """`text`, if it is a Jinja template, else ValueError."""
    try:
        run_limited("rendered", template=text, row=None)
    except ForeignError as error:
        raise ValueError(f"is no Jinja template: {brief(error)}") from error
    return text


def check_expression(text: str) -> str:
    """`text`, if it is a Jinja expression, else ValueError."""
    try:
        run_limited("evaluated", expression=text, row=None)
    except ForeignError as error:
        raise ValueError(f"is no Jinja expression: {brief(error)}") from error
    return text


def render_template(template: str, row: Mapping[str, Any], where: str, key: str) -> str:
    """The text that a template makes of a row's fields; `where` and `key` are for InputError."""
    try:
        return str(run_limited("rendered", template=template, row=row))
    except ForeignError as error:  # whatever a row that is not as expected makes it raise
        raise _fault(error, row, where, key) from error


def evaluate_expression(expression: str, row: Mapping[str, Any], where: str, key: str) -> Any:
    """The value of an expression, such as `answers.text`, of a row's fields, or InputError."""
    try:
        return run_limited("evaluated", expression=expression, row=row)
    except ForeignError as error:  # as above
        raise _fault(error, row, where, key) from error


def _fault(error: ForeignError, row: Mapping[str, Any], where: str, key: str) -> InputError:
    return InputError(f"{where}: {key}: {brief(error)} (the row has {some(row, 10)})")
