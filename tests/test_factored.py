"""Factored mode: against its dense definition, in any gauge, and without an (m, n) array."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from trees import SCALE

import lorapro_jax as lp

STEPS = 60
RATE = 1e-2


def trajectory(params, targets, tx, steps=STEPS):
    """[(params, updates)] of `steps` steps on sum ||s a b - target||² / 2."""

    def loss(params):
        return sum(
            jnp.sum((SCALE * p["lora_a"] @ p["lora_b"] - targets[k]) ** 2) / 2
            for k, p in params.items()
        )

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), updates, state

    state, taken = tx.init(params), []
    for _ in range(steps):
        before = params
        params, updates, state = step(params, state)
        taken.append((before, updates))
    return taken


def owned(x):
    return lp.lorapro_adamw(RATE, SCALE, mode="factored", x=x, damping=0.0, radius=None)


def composed(x):
    direction = lp.scale_by_lorapro_adam(SCALE, mode="factored", x=x, damping=0.0)
    return optax.chain(direction, optax.scale_by_learning_rate(RATE))


@pytest.mark.parametrize("x", ["sylvester", "symmetric", "zero"])
@pytest.mark.parametrize("make", [owned, composed])
def test_every_step_is_the_dense_definitions(x64, make, x):
    """The momentum carried over as two projections, or with the old factors, is P(T) dense."""
    params, _, dense = trees.make()
    targets = {name: jnp.asarray(G) for name, (_, _, G) in dense.items()}
    references = {name: oracle.Factored(G.shape) for name, (_, _, G) in dense.items()}
    for before, updates in trajectory(params, targets, make(x)):
        for name, reference in references.items():
            a, b = (np.asarray(before[name][k]) for k in ("lora_a", "lora_b"))
            expected = reference(a, b, SCALE * a @ b - targets[name])
            found = trees.step(before[name], updates[name]) / -RATE
            np.testing.assert_allclose(found, expected, atol=1e-7 * np.abs(expected).max())
