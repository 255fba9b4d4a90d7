from collections.abc import Callable
from pathlib import Path

import pytest
from toys import recall, toys

__all__ = ["recall", "toys"]


@pytest.fixture
def run(recall, tmp_path: Path, monkeypatch) -> Callable[..., Path]:
    """A command that must succeed; its last argument is OUT."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object) -> Path:
        done = recall(*arguments)
        assert done.status == 0, done.err
        return Path(str(arguments[-1]))

    return run
