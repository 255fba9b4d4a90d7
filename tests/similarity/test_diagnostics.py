"""Warnings: said where they are due, and only there."""

import numpy as np
import pytest

from recall_jax.similarity.diagnostics import similarity_warnings, weight_rises_with_depth

UNITS = ("embed", "layers.0", "layers.1", "head")


def similarity(*older):
    """(K, 4) with the newest model, the last, at one."""
    return np.array([*older, [1.0] * 4])


@pytest.mark.parametrize(
    ("values", "reference", "said"),
    [
        (similarity([0.9, 0.8, 0.7, 0.6]), 1, []),
        (None, 1, []),
        (similarity([0.9, 9e-7, 0.7, 0.6]), 1, ["every S below 1e-06) in layers.0; sigma"]),
        (similarity([0.9, 2e-6, 0.7, 0.6]), 1, []),
        # One older model that is similar is enough.
        (similarity([0.9, 0, 0.7, 0.6], [0.5] * 4), 2, []),
        (
            similarity([1, 0.5, 0.99995, 0.9998]),
            1,
            ["every S within 0.0001) in embed, layers.1, so their weights there are equal: 1/2"],
        ),
        (similarity([0.05, 0.05, 0.05, 0.6]), 1, ["below 0.1 in 3 of 4 units; merging may hurt"]),
        (similarity([0.05, 0.05, 0.6, 0.6]), 1, []),
        # It is the mean over the older models that counts.
        (similarity([0.05] * 4, [0.25] * 4), 2, []),
        (similarity([0.01] * 4, [0.15] * 4), 2, ["below 0.1 in 4 of 4 units"]),
        (
            similarity([0] * 4),
            1,
            ["in embed, layers.0, layers.1, head; sigma", "below 0.1 in 4 of 4 units"],
        ),
        # The reference may be any model.
        (similarity([1, 1, 1, 1], [0.9, 0, 0.9, 0.9])[[0, 1]], 0, ["below 1e-06) in layers.0;"]),
        # Pairwise: no model stands out, so none is left out.
        (np.array([[0.9, 0, 0.7, 0.6], [0.9, 0, 0.8, 0.7]]), None, ["in layers.0;", "in embed, "]),
    ],
)
def test_similarity_warnings(values, reference, said):
    warnings = similarity_warnings(values, UNITS, reference)
    assert len(warnings) == len(said), warnings
    for warning, part in zip(warnings, said, strict=True):
        assert part in warning and "\n" not in warning


def test_many_units_are_not_all_listed():
    units = [f"layers.{i}" for i in range(20)]
    (warning,) = similarity_warnings(np.ones((2, 20)), units, 1)
    assert "layers.4, layers.5 and 14 more, so" in warning


@pytest.mark.parametrize(
    ("layers", "rises"),
    [
        ([0.3, 0.4, 0.5, 0.6, 0.7, 0.8], True),
        ([0.8, 0.7, 0.6, 0.5, 0.4, 0.3], False),
        ([0.5, 0.6], True),
        ([0.5, 0.5, 0.5], False),
        ([0.5], False),
        ([], False),
        # Thirds are compared, not neighbours.
        ([0.9, 0.1, 0.9, 0.1, 0.6, 0.8], True),
    ],
)
def test_whether_the_newest_models_weight_rises(layers, rises):
    newest = np.array([0.9, *layers, 0.1])
    assert weight_rises_with_depth(np.stack([1 - newest, newest])) is rises
