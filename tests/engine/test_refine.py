"""Refined coefficients: the loss is its equation, known mixtures are found, order is nothing."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy.special import log_softmax

from recall_jax.methods.distillation import Match
from recall_jax.methods.refine import mix, refine
from recall_jax.models.architecture import Architecture, Rope
from recall_jax.models.convert import tensor_shapes, unit_tensors
from recall_jax.models.forward import forward, init_params, logits

ARCH = Architecture(
    family="llama",
    vocab_size=23,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    rms_norm_eps=1e-6,
    hidden_act="silu",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
    qk_norm=False,
    tie_word_embeddings=True,
    rope=Rope(),
    windows=(None, None),
)
UNITS = len(ARCH.units)
RNG = np.random.default_rng(0)


def noisy(params, scale, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: np.asarray(leaf + scale * rng.standard_normal(leaf.shape), np.float32), params
    )


BASE = noisy(init_params(ARCH, jax.random.key(0)), 0.3, 0)
EXPERTS = [noisy(BASE, 0.15, seed) for seed in (1, 2)]
MODELS = [BASE, *EXPERTS]
SAMPLES = [
    [RNG.integers(0, 23, length).tolist() for length in lengths]
    for lengths in [(5, 16, 7), (16, 3), (9, 12, 4, 11, 6)]
]
LONGER = [[*SAMPLES[0], RNG.integers(0, 23, 20).tolist()], *SAMPLES[1:]]  # of two padded lengths
START = RNG.uniform(0, 0.5, (2, UNITS)).astype(np.float32)


def refined(models=MODELS, samples=SAMPLES, start=START, steps=20, **settings):
    return refine(ARCH, models, samples, start, Match(), steps=steps, batch_size=4, **settings)


@jax.jit
def outputs(params, ids, mask):
    """Logits (B, T, V) and all states (U, B, T, E)."""
    states, normed = forward(ARCH, params, ids, mask)
    return logits(ARCH, params, normed), jnp.stack(states)


def on_rows(params, rows):
    """Logits (T, V) and pooled states (U, E) of each row, float64."""
    ids, mask = np.zeros((2, 5, 20), np.int32)
    for place, row in enumerate(rows):
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
    scores, states = (np.asarray(each, np.float64) for each in outputs(params, ids, mask))
    return [
        (scores[place, : len(row)], states[:, place, : len(row)].mean(axis=1))
        for place, row in enumerate(rows)
    ]


def loss_of(merged, samples, match, anchor):
    """The equation, a row at a time."""
    total = 0.0
    for teacher, rows in enumerate(samples):
        divergences, squares, norms = [], [], []
        pairs = zip(on_rows(MODELS[teacher], rows), on_rows(merged, rows), strict=True)
        for (theirs, states), (ours, own) in pairs:
            p, q = (log_softmax(each / match.temperature, axis=-1) for each in (theirs, ours))
            m = np.log((np.exp(p) + np.exp(q)) / 2)
            kl = (np.exp(p) * (p - q)).sum(axis=-1)
            js = ((np.exp(p) * (p - m)).sum(axis=-1) + (np.exp(q) * (q - m)).sum(axis=-1)) / 2
            divergences.extend(match.kl * kl + match.js * js)
            squares.append(((own - states) ** 2).sum(axis=1))
            norms.append((states**2).sum(axis=1))
        apart = np.mean(np.mean(squares, axis=0) / np.mean(norms, axis=0))
        distance = match.temperature**2 * np.mean(divergences) + match.hidden * apart
        total += distance * (anchor if teacher == 0 else 1 / len(EXPERTS))
    return total


def test_the_loss_is_its_equation():
    match, anchor = Match(kl=0.7, js=0.4, hidden=0.5, temperature=2.0), 0.3
    found = refine(ARCH, MODELS, LONGER, START, match, anchor=anchor, steps=0, batch_size=4)
    columns = dict(zip(ARCH.units, START.T, strict=True))
    merged = mix(ARCH, MODELS, {unit: jnp.asarray(column) for unit, column in columns.items()})
    np.testing.assert_allclose(found.losses, [loss_of(merged, LONGER, match, anchor)], rtol=2e-5)
    for unit, column in columns.items():  # no step, so no change
        for name in unit_tensors(ARCH, unit):
            np.testing.assert_array_equal(found.coefficients[name], column)


def test_a_mixture_is_found_again():
    """The second expert is a mixture of the base and the first, and the only one to be matched."""
    mixture = jax.tree.map(lambda b, x: b + np.float32(0.7) * (x - b), BASE, EXPERTS[0])
    start = np.asarray([[0.3], [0.0]], np.float32).repeat(UNITS, axis=1)
    rows = [RNG.integers(0, 23, 12).tolist() for _ in range(16)]
    found = refined(
        [BASE, EXPERTS[0], mixture], [[], [], rows], start, 150, learning_rate=0.05, anchor=0.0
    )
    assert found.losses[-1] < 1e-3 * found.losses[0]
    for name in tensor_shapes(ARCH):
        first, second = found.coefficients[name]
        np.testing.assert_allclose(first + 0.7 * second, 0.7, atol=0.02)


def test_finer_coefficients_match_better_and_coarse_ones_are_those_of_units():
    by_unit = refined()
    by_tensor = refined(by_tensor=True)
    assert by_unit.losses[0] == by_tensor.losses[0]
    assert by_tensor.losses[-1] < by_unit.losses[-1] < by_unit.losses[0]
    for unit in ARCH.units:
        names = unit_tensors(ARCH, unit)
        assert len({by_unit.coefficients[name].tobytes() for name in names}) == 1
        if len(names) > 1:
            assert len({by_tensor.coefficients[name].tobytes() for name in names}) == len(names)


def test_the_order_of_the_experts_does_not_matter():
    one = refined()
    swapped = refined([BASE, *EXPERTS[::-1]], [SAMPLES[0], *SAMPLES[:0:-1]], START[::-1])
    for name, row in one.coefficients.items():
        np.testing.assert_allclose(row, swapped.coefficients[name][::-1], atol=1e-4)
    np.testing.assert_allclose(one.losses, swapped.losses, rtol=1e-5)


def test_experts_that_are_the_base_leave_nothing_to_learn():
    np.testing.assert_allclose(refined([BASE, BASE, BASE]).losses, 0, atol=1e-6)


def test_an_anchor_holds_the_merged_model_near_the_base():
    free, held = refined(), refined(anchor=30.0)
    moved = [np.abs(np.stack(list(each.coefficients.values()))).sum() for each in (free, held)]
    assert moved[1] < 0.8 * moved[0]
