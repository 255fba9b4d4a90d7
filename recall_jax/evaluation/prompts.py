"""Templates of prompts: Jinja in a sandbox that can reach the row's fields and nothing else."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateSyntaxError, Undefined
from jinja2.environment import TemplateExpression
from jinja2.sandbox import ImmutableSandboxedEnvironment

from recall_jax.errors import InputError

_ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
)
# What is asked is the same each time.
del _ENVIRONMENT.globals["lipsum"], _ENVIRONMENT.filters["random"]


def check_template(text: str) -> str:
    """`text`, if it is a Jinja template, else ValueError."""
    try:
        _template(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"is no Jinja template: {error.message}, line {error.lineno}") from error
    return text


def check_expression(text: str) -> str:
    """`text`, if it is a Jinja expression, else ValueError."""
    try:
        _expression(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"is no Jinja expression: {error.message}") from error
    return text


def render(template: str, row: Mapping[str, Any], where: str, key: str) -> str:
    """The text that a template makes of a row's fields; `where` and `key` are for InputError."""
    try:
        text = _template(template).render(row)
        text.encode()  # which refuses half a surrogate pair, as no tokenizer takes it
        return text
    except Exception as error:  # whatever a row that is not as expected makes it raise
        raise _fault(error, row, where, key) from error


def evaluate(expression: str, row: Mapping[str, Any], where: str, key: str) -> Any:
    """The value of an expression, such as `answers.text`, of a row's fields, or InputError."""
    try:
        value = _expression(expression)(row)
        if isinstance(value, Undefined):
            str(value)  # which raises, and says what is missing
        return value
    except Exception as error:  # as above
        raise _fault(error, row, where, key) from error


def _fault(error: Exception, row: Mapping[str, Any], where: str, key: str) -> InputError:
    said = " ".join(str(error).split())
    return InputError(f"{where}: {key}: {said} (the row has {', '.join(map(str, row))})")


@cache
def _template(text: str) -> Template:
    return _ENVIRONMENT.from_string(text)


@cache
def _expression(text: str) -> TemplateExpression:
    return _ENVIRONMENT.compile_expression(text, undefined_to_none=False)
