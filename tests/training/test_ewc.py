"""Fisher information and penalty of EWC against numpy, their algebra, and their files."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file, save_file

from recall_jax.errors import InputError
from recall_jax.training.ewc import (
    Anchor,
    ewc_penalty,
    fisher,
    load_anchor,
    online,
    penalty,
    save_anchor,
)
from recall_jax.training.optimizer import adamw
from recall_jax.training.step import Objective, TrainingBatch, init_state, make_step


@pytest.fixture(scope="module")
def regression():
    """Samples (X, y) and parameters of a softmax regression, logits X W^T + b."""
    random = np.random.default_rng(0)
    X = random.standard_normal((8, 3)).astype(np.float32)
    y = random.integers(0, 4, 8)
    W = random.standard_normal((4, 3)).astype(np.float32)
    b = random.standard_normal(4).astype(np.float32)
    return (X, y), {"W": W, "b": b}


def loss_of_sample(params, sample):
    x, label = sample
    return -jax.nn.log_softmax(jnp.matmul(params["W"], x, precision="highest") + params["b"])[label]


def test_fisher_of_a_softmax_regression_is_that_of_numpy(regression):
    (X, y), params = regression
    found = jax.jit(lambda: fisher(loss_of_sample, params, (X, y)))()
    scores = X.astype(np.float64) @ params["W"].T + params["b"]
    residual = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True) - np.eye(4)[y]
    gradients = residual[:, :, None] * X[:, None, :]
    assert_allclose(found["W"], (gradients**2).mean(axis=0), rtol=1e-4)
    assert_allclose(found["b"], (residual**2).mean(axis=0), rtol=1e-4)
    assert found["W"].sum() == pytest.approx(1.831877, abs=2e-6)
    assert found["b"].sum() == pytest.approx(0.832524, abs=2e-6)
    # the square of the mean gradient is another quantity
    assert (gradients.mean(axis=0) ** 2).sum() < 0.5 * found["W"].sum()


def test_fisher_is_float32_whatever_the_parameters_are(regression):
    samples, params = regression
    low = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), params)

    def loss(params, sample):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        return loss_of_sample(wide, sample)

    found = fisher(loss, low, samples)
    assert {leaf.dtype for leaf in found.values()} == {jnp.dtype("float32")}
    assert found["W"].sum() == pytest.approx(1.831877, rel=2e-2)


numbers = arrays(np.float32, 5, elements=st.floats(-3, 3, width=16))
positive = arrays(np.float32, 5, elements=st.floats(0, 3, width=16))
anchors = st.builds(lambda F, weights: Anchor({"w": F}, {"w": weights}), positive, numbers)
strengths = st.floats(0, 10, width=16)
gradient_of_penalty = jax.jit(jax.grad(penalty))


@given(numbers, st.lists(anchors, min_size=1, max_size=2), strengths)
def test_the_penalty_is_half_the_strength_times_the_weighted_distance(weights, kept, strength):
    distances = [(a.fisher["w"] * (weights - a.weights["w"]) ** 2).sum() for a in kept]
    found = penalty({"w": weights}, kept, strength)
    assert found.dtype == jnp.float32
    assert_allclose(found, strength / 2 * sum(distances), rtol=1e-5, atol=1e-6)
    pulls = [strength * a.fisher["w"] * (weights - a.weights["w"]) for a in kept]
    gradient = gradient_of_penalty({"w": weights}, kept, strength)["w"]
    assert_allclose(gradient, sum(pulls), rtol=1e-5, atol=1e-4)


@given(anchors, strengths)
def test_nothing_pulls_at_the_anchor(anchor, strength):
    assert penalty(anchor.weights, [anchor], strength) == 0
    assert not gradient_of_penalty(anchor.weights, [anchor], strength)["w"].any()


@given(numbers, anchors, positive, strengths)
def test_online_without_decay_is_separate_where_the_anchors_share_weights(
    weights, anchor, other, strength
):
    second = Anchor({"w": other}, anchor.weights)
    together = penalty({"w": weights}, [online(anchor, second, 1.0)], strength)
    apart = penalty({"w": weights}, [anchor, second], strength)
    assert_allclose(together, apart, rtol=1e-5, atol=1e-6)


@given(anchors, anchors, anchors, st.floats(0, 1, width=16))
def test_online_forgets_geometrically_and_stands_at_the_newest_weights(a, b, c, decay):
    found = online(online(a, b, decay), c, decay)
    expected = decay**2 * a.fisher["w"] + decay * b.fisher["w"] + c.fisher["w"]
    assert_allclose(found.fisher["w"], expected, rtol=1e-5, atol=1e-6)
    assert found.weights is c.weights


def test_a_step_balances_the_loss_and_the_penalty():
    """Loss (theta - c)^2 / 2 and strength F: the gradient is zero at (c + s F t) / (1 + s F)."""
    target, anchored = jnp.asarray([1.0, -2.0, 4.0]), jnp.asarray([0.0, 1.0, 4.0])
    importance, strength = jnp.asarray([2.0, 0.5, 3.0]), 4.0
    optimum = (target + strength * importance * anchored) / (1 + strength * importance)

    def loss(trainable, frozen, batch, key):
        return 0.5 * jnp.sum(jnp.square(trainable["a"] - target)), jnp.float32(1)

    optimizer = adamw(lambda step: jnp.float32(0.1))
    step = make_step(Objective(loss, ewc_penalty(strength)), optimizer, None)
    frozen = {"anchors": (Anchor({"a": importance}, {"a": anchored}),)}
    batch = TrainingBatch(*(jnp.ones((1, 1, 2), jnp.int32) for _ in TrainingBatch._fields))
    expected = strength / 2 * jnp.sum(importance * jnp.square(optimum - anchored))
    state = init_state({"a": optimum}, optimizer)
    _, metrics = step(state, frozen, batch, jax.random.key(0))
    assert metrics.gradient_norm < 1e-6
    assert_allclose(metrics.penalty, expected, rtol=1e-6)


@pytest.fixture
def anchor():
    random = np.random.default_rng(1)
    tree = {"layers": {"q_proj": {"kernel": (2, 3, 4)}}, "embed": {"embedding": (5, 3)}}

    def draw(shape):
        return random.standard_normal(shape).astype(np.float32)

    fisher, weights = (
        jax.tree.map(draw, tree, is_leaf=lambda x: isinstance(x, tuple)) for _ in range(2)
    )
    return Anchor(jax.tree.map(np.square, fisher), weights)


def test_an_anchor_comes_back_to_the_bit(anchor, tmp_path):
    path = tmp_path / "anchor.safetensors"
    save_anchor(path, anchor)
    assert sorted(load_file(path)) == [
        "fisher.embed.embedding",
        "fisher.layers.q_proj.kernel",
        "weights.embed.embedding",
        "weights.layers.q_proj.kernel",
    ]
    kernel = load_file(path)["weights.layers.q_proj.kernel"]
    assert_array_equal(kernel, anchor.weights["layers"]["q_proj"]["kernel"])
    jax.tree.map(assert_array_equal, load_anchor(path, anchor.weights), anchor)


@pytest.mark.parametrize("fault", ["missing", "extra", "shape"])
def test_the_anchor_of_another_model_is_refused(anchor, tmp_path, fault):
    path = tmp_path / "anchor.safetensors"
    save_anchor(path, anchor)
    tensors, name = load_file(path), "fisher.embed.embedding"
    if fault == "missing":
        del tensors[name]
    elif fault == "shape":
        tensors[name] = tensors[name][:-1]
    else:
        name = "fisher.embed.another"
        tensors[name] = np.ones(1, np.float32)
    save_file(tensors, path)
    with pytest.raises(InputError, match=name) as error:
        load_anchor(path, anchor.weights)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fisher.embed.embedding", np.nan),
        ("fisher.embed.embedding", -1.0),
        ("weights.embed.embedding", np.inf),
    ],
)
def test_an_anchor_of_impossible_numbers_is_refused(anchor, tmp_path, name, value):
    path = tmp_path / "anchor.safetensors"
    save_anchor(path, anchor)
    tensors = load_file(path)
    tensors[name][0, 0] = value
    save_file(tensors, path)
    with pytest.raises(InputError, match=f"{name} holds NaN, infinite or negative values"):
        load_anchor(path, anchor.weights)
