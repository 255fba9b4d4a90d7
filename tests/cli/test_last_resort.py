"""Whatever happens, the command says one line that a terminal can show, and its status is right."""

import errno

import pytest
import typer

from recall_jax.cli import main
from recall_jax.errors import InputError


class PanicException(BaseException):
    """As pyo3 makes of a panic in Rust."""


@pytest.fixture
def ended(monkeypatch, capsys):
    """Run a command that raises an error: its status, and what it printed on stderr."""

    def run(error: BaseException) -> tuple[int, str]:
        app = typer.Typer()

        @app.command()
        def fail() -> None:
            raise error

        monkeypatch.setattr(main, "_command", lambda: typer.main.get_command(app))
        status = main._run([])
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert err[:-1].isprintable()
        return status, err

    return run


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        PanicException("index out of range: the len is 3"),
        RecursionError("maximum recursion depth exceeded"),
        KeyError("x" * 10**6),
        ValueError("\x1b[31m\u202e\ud800\n\n"),
    ],
)
def test_a_fault_of_ours_is_one_short_line(error, ended):
    status, line = ended(error)
    assert status == 1
    said = f"recall: a bug in recall, please report it with --debug: {type(error).__name__}"
    assert line.startswith(said)
    assert len(line) < 320


def test_what_is_wrong_is_escaped(ended):
    status, line = ended(InputError("a\x1b[2J\u2066b\x9b\n c\ud800"))
    assert status == 2
    assert line == "recall: a\\x1b[2J\\u2066b\\x9b c\\ud800\n"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 40000000000000 bytes."),
        caused(TypeError("in a callback"), MemoryError()),
    ],
)
def test_memory_that_does_not_suffice_is_named(error, ended):
    status, line = ended(error)
    assert status == 2
    assert "out of memory" in line


def test_memory_that_xla_lacks_on_the_cpu_is_named(ended):
    import jax
    import jax.numpy as jnp

    with pytest.raises(Exception) as caught:
        jax.block_until_ready(jnp.zeros(10**13, jnp.float32))
    status, line = ended(caught.value)
    assert (status, "out of memory" in line) == (2, True)
