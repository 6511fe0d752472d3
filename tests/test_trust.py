"""How a step is taken: the weight moves as was asked, within the bound, and the loss falls."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from trees import SCALE

import lorapro_jax as lp

PROJECTING = ["full", "factored"]


def node(a, b):
    return {"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}


def weight(params):
    return SCALE * np.asarray(params["q"]["lora_a"] @ params["q"]["lora_b"])


def direction(mode, a, b, G):
    """The tangent vector of a first step, dense: Adam's or the factored one's, projected."""
    if mode == "full":
        return oracle.projection(a, b, oracle.Adam(G.shape)(oracle.projection(a, b, G)))
    return oracle.Factored(G.shape)(a, b, G)


@functools.cache
def compiled(mode, **kwargs):
    """The factors after one step, for any rate."""

    @jax.jit
    def step(params, grads, rate):
        tx = lp.lorapro_adamw(lambda _: rate, SCALE, mode=mode, damping=0.0, **kwargs)
        updates, _ = tx.update(grads, tx.init(params), params)
        return optax.apply_updates(params, updates)

    return step


def stepped(mode, a, b, G, rate, **kwargs):
    """The factors after one step."""
    grads = node(*oracle.factor_gradients(a, b, G, SCALE))
    return compiled(mode, **kwargs)(node(a, b), grads, rate)


def one_step(mode, a, b, G, rate, **kwargs):
    """The change of the weight."""
    return weight(stepped(mode, a, b, G, rate, **kwargs)) - weight(node(a, b))


def right_fit(first, target):
    """The a of least ||a first - target||."""
    return np.linalg.lstsq(first.T, target.T, rcond=None)[0].T


@pytest.mark.parametrize("mode", PROJECTING)
@pytest.mark.parametrize("larger", ["a", "b"])
def test_the_second_factor_is_the_least_squares_fit(x64, mode, larger):
    """To K - t U given the first one's new value, as the first is given the second's old value."""
    rng = np.random.default_rng(1)
    a, b, G = oracle.pair(rng, 14, 3, 10)
    a, b = (3 * a, b) if larger == "a" else (a, 3 * b)
    rate = 0.05
    target = (SCALE * a @ b - rate * direction(mode, a, b, G)) / SCALE
    new = stepped(mode, a, b, G, rate, radius=None)["q"]
    new_a, new_b = np.asarray(new["lora_a"]), np.asarray(new["lora_b"])
    if larger == "b":  # the same, transposed
        a, b, new_a, new_b, target = b.T, a.T, new_b.T, new_a.T, target.T
    np.testing.assert_allclose(new_a, right_fit(new_b, target), atol=1e-8)
    np.testing.assert_allclose(new_b, right_fit(a.T, target.T).T, atol=1e-8)


@pytest.mark.parametrize("mode", PROJECTING)
@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
@pytest.mark.parametrize("rate", [1e-4, 1e-1, 10.0])
def test_the_weight_moves_by_no_more_than_the_radius(x64, mode, size, rate):
    """Also where b is small, where the sum of both factors' steps would be mostly da db."""
    a, b, G = oracle.pair(np.random.default_rng(2), 40, 4, 30)
    b = size * b
    bound = 0.1 * SCALE * max(np.sum(a * a), np.sum(b * b)) / 4
    asked = rate * np.linalg.norm(direction(mode, a, b, G))
    moved = np.linalg.norm(one_step(mode, a, b, G, rate, radius=0.1))
    assert moved <= min(bound, asked) * (1 + 1e-9)
    assert moved > 0.4 * min(bound, asked)  # of the size that was asked for, or of the bound


@pytest.mark.parametrize("mode", PROJECTING)
def test_within_the_radius_nothing_changes(x64, mode):
    a, b, G = oracle.pair(np.random.default_rng(2), 40, 4, 30)
    steps = [one_step(mode, a, b, G, 1e-3, radius=radius) for radius in (None, 10.0)]
    np.testing.assert_array_equal(*steps)
