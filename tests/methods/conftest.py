import sys
from pathlib import Path

import pytest
from toys import toys

sys.path += [str(Path(__file__).parents[1] / room) for room in ("engine", "pod")]

from entries import OWN_METHODS, write_labelled_rows, write_models

from recall_jax.methods.registry import METHODS

__all__ = ["toys"]


@pytest.fixture(scope="module")
def own_methods():
    """The registry with the methods that are written as a user would."""
    METHODS.update(OWN_METHODS)
    yield
    for name in OWN_METHODS:
        del METHODS[name]


@pytest.fixture(scope="module")
def models(toys, tmp_path_factory):
    """Four relatives of two layers, the first of them the base."""
    return write_models(toys.llama[0], tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """A file of labelled rows."""
    return write_labelled_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl")
