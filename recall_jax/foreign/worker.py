"""Run other people's patterns and templates in a process whose limits the system enforces.

Started by its path, because it must not import the package. Reads requests, one JSON object per
line, and answers each with a line. A request that runs over the time limit or crashes ends the
process without an answer.
"""

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any

SECONDS = 2  # of processor time for each request
MEMORY = 1 << 30  # bytes of all memory that is not a mapped file
TEXT = 1 << 26  # characters in an answer


def matching() -> Callable[..., Any]:
    """Return a function that gives the index of the first pattern that matches each name."""

    def run(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
        compiled = list(map(re.compile, patterns))
        return [
            next((place for place, each in enumerate(compiled) if each.match(name)), None)
            for name in names
        ]

    return run


def chat() -> Callable[..., Any]:
    """Return a function that renders messages by a chat template, as transformers' tokenizers do.

    With `prompt`, the beginning of the assistant's answer is appended; with `open_end`, the last
    turn is left open.
    """
    from transformers.tokenization_utils_base import PreTrainedTokenizerBase

    def run(
        template: str,
        tokens: Mapping[str, Any],
        messages: Any,
        prompt: bool,
        open_end: bool = False,
    ) -> str:
        tokenizer = SimpleNamespace(
            special_tokens_map=tokens, get_chat_template=lambda *given, **named: template
        )
        return str(
            PreTrainedTokenizerBase.apply_chat_template(
                tokenizer,
                messages,
                tokenize=False,
                add_generation_prompt=prompt,
                continue_final_message=open_end,
            )
        )

    return run


def marked() -> Callable[..., Any]:
    """Return a function that gives the [start, end] of each text marked as generated."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def run(template: str, tokens: Mapping[str, Any], messages: Any) -> list[list[int]]:
        _, (places,) = render_jinja_template(
            [messages], chat_template=template, return_assistant_tokens_mask=True, **tokens
        )
        return [list(place) for place in places]

    return run


@cache
def _environment() -> Any:
    """Build a Jinja sandbox that can reach the fields of a row and nothing else."""
    from jinja2 import StrictUndefined
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        undefined=StrictUndefined, keep_trailing_newline=True, trim_blocks=True, lstrip_blocks=True
    )
    # The same request must give the same answer every time.
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


@cache
def _template(text: str) -> Any:
    return _environment().from_string(text)


@cache
def _expression(text: str) -> Any:
    return _environment().compile_expression(text, undefined_to_none=False)


def rendered() -> Callable[..., Any]:
    """Return a function that renders a template with the fields of a row.

    Without a row, it only checks that the template parses.
    """
    _environment()

    def run(template: str, row: Mapping[str, Any] | None) -> str | None:
        made = _template(template)
        if row is None:
            return None
        text = str(made.render(row))
        text.encode()  # which refuses half a surrogate pair, as no tokenizer takes it
        return text

    return run


def evaluated() -> Callable[..., Any]:
    """Return a function that evaluates an expression over the fields of a row.

    Without a row, it only checks that the expression parses.
    """
    _environment()
    from jinja2 import Undefined

    def run(expression: str, row: Mapping[str, Any] | None) -> Any:
        made = _expression(expression)
        if row is None:
            return None
        value = made(row)
        if isinstance(value, Undefined):
            str(value)  # which raises, and says what is missing
        return value

    return run


# `answer` calls these before it starts the timer, so that imports do not count.
CALLS = {call.__name__: call for call in (matching, chat, marked, rendered, evaluated)}


def answer(line: str) -> str:
    """Answer one request with {"value": ...} or {"error": the message of the exception}."""
    request = json.loads(line)
    run = CALLS[request["call"]]()
    signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
    try:
        reply = json.dumps({"value": run(**request["arguments"])})
        if len(reply) > TEXT:
            reply = json.dumps({"error": f"it makes more than {TEXT:,} characters"})
    except MemoryError:
        reply = json.dumps({"error": f"it needs more than {MEMORY:,} bytes of memory"})
    except Exception as error:  # a template can raise anything
        place = getattr(error, "lineno", None)  # a template's errors have it
        said = str(error)[:1000] or type(error).__name__
        reply = json.dumps({"error": said + (f", line {place}" if place else "")})
    signal.setitimer(signal.ITIMER_PROF, 0)
    return reply


def main() -> None:
    """Answer requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # so that a library's prints are not read as answers
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # even if the parent ignores it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    _, hardest = resource.getrlimit(resource.RLIMIT_DATA)
    most = MEMORY if hardest == resource.RLIM_INFINITY else min(MEMORY, hardest)
    resource.setrlimit(resource.RLIMIT_DATA, (most, hardest))
    for line in sys.stdin:
        replies.write(answer(line) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
