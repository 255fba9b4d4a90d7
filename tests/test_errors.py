"""What faults say: one line of bounded length, and nothing that a terminal would obey."""

import json

import pytest

from recall_jax.errors import (
    InputError,
    StorageError,
    brief,
    escaped,
    reading,
    running_user_code,
    shown,
)


class Panic(BaseException):
    """As pyo3 makes of a panic in Rust."""


def deep(levels):
    value = []
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\u202eb", r"a\u202eb"),
        ("a\nb", r"a\nb"),
        ("a\ud800", r"a\ud800"),
        ("Zürich, 東京", "Zürich, 東京"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, expected):
    assert escaped(text) == expected


@pytest.mark.parametrize(
    "value",
    [
        pytest.param("x" * 10**6, id="text"),
        pytest.param(deep(100_000), id="depth"),
        pytest.param(10**5000, id="digits"),
        pytest.param({"k" * 10**5: 1}, id="key"),
        pytest.param(list(range(10**6)), id="list"),
        pytest.param("\x1b" * 900, id="escapes"),
    ],
)
def test_values_are_shown_short(value):
    line = shown(value)
    assert len(line) <= 200
    assert line.isprintable()


@pytest.mark.parametrize(
    "error", [ValueError("a\nb"), RecursionError("deep"), Panic("index out of range")]
)
def test_faults_of_a_malformed_file_name_it(error):
    with (
        pytest.raises(
            InputError, match=r"^model/tokenizer.json is damaged.*" + type(error).__name__
        ),
        reading("model/tokenizer.json"),
    ):
        raise error


@pytest.mark.parametrize(
    "error", [InputError("said"), MemoryError(), KeyboardInterrupt(), SystemExit(143)]
)
def test_what_means_something_else_passes(error):
    with pytest.raises(type(error)) as caught, reading("file"):
        raise error
    assert caught.value is error


def test_a_disk_s_fault_stays_one():
    with pytest.raises(StorageError, match="cannot read file: Input/output error"), reading("file"):
        raise OSError(5, "Input/output error")


def test_long_messages_are_cut():
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("x" * 9)
    assert brief(caught.value) == "Expecting value: line 1 column 1 (char 0)"
    assert len(brief(ValueError("y" * 9999))) == 200


@pytest.mark.parametrize("error", [KeyError("kernle"), SystemExit(3), SystemExit("bye")])
def test_what_user_code_raises_is_the_users(error):
    failure = f"^it fails: {type(error).__name__}: "
    with pytest.raises(InputError, match=failure), running_user_code("it fails"):
        raise error


@pytest.mark.parametrize("error", [SystemExit(143), KeyboardInterrupt()])
def test_signals_pass_through_user_code(error):
    with pytest.raises(type(error)), running_user_code("it fails"):
        raise error
