"""What is left to draw from is what transformers leaves, and is drawn as often as it is likely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from recall_jax.generation.sampling import Sampling, choose, filtered

LOGITS = 2 * np.random.default_rng(0).standard_normal((5, 40)).astype(np.float32)
SETTINGS = [(None, None), (1, None), (7, None), (99, None), (None, 0.3), (None, 1.0), (7, 0.8),
            (3, 1e-6)]  # fmt: skip


def theirs(logits, temperature, top_k, top_p):
    logits = TemperatureLogitsWarper(temperature)(None, torch.tensor(logits))
    if top_k:
        logits = TopKLogitsWarper(top_k)(None, logits)
    if top_p:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.numpy()


@pytest.mark.parametrize(("top_k", "top_p"), SETTINGS)
def test_filters_are_those_of_transformers(top_k, top_p):
    expected = theirs(LOGITS, 1.0, top_k, top_p)
    np.testing.assert_array_equal(filtered(jnp.asarray(LOGITS), top_k, top_p), expected)


def test_tokens_as_likely_as_the_last_that_stays_stay():
    logits = jnp.asarray([[1.0, 3.0, 1.0, 0.0]])
    assert np.isfinite(filtered(logits, 2, None)).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (2.0, 6, 0.9)])
def test_tokens_are_drawn_as_often_as_they_are_likely(temperature, top_k, top_p):
    logits, draws = LOGITS[:1, :8], 4000
    keys = jax.random.split(jax.random.key(1), draws)
    many = jnp.broadcast_to(jnp.asarray(logits), (draws, 8))
    drawn = choose(Sampling(temperature, top_k, top_p), many, keys)
    assert drawn.dtype == jnp.int32
    counts = np.bincount(drawn, minlength=8)
    left = torch.tensor(theirs(logits, temperature, top_k, top_p)[0], dtype=torch.float64)
    likely = torch.softmax(left, 0).numpy()
    assert counts[likely == 0].sum() == 0
    here = likely > 0
    assert here.sum() > 2
    assert stats.chisquare(counts[here], draws * likely[here]).pvalue > 0.01
