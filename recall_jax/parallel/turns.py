"""Run one program at a time where two could deadlock."""

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import jax

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")


def in_turn(program: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """Make a program over a mesh wait for its results on CPU before it returns.

    The devices of a CPU share a few threads. Of two programs that exchange data between devices,
    each could occupy the threads that the other waits for; XLA gives up after a minute.
    """

    @functools.wraps(program)
    def waited_for(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        result = program(*given, **named)
        return jax.block_until_ready(result) if jax.default_backend() == "cpu" else result

    return waited_for
