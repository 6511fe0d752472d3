"""`retract`: the product moves by da b + a db; no step is far above the recent ones."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from trees import SCALE

import lorapro_jax as lp

EPS = {"float32": 2.0**-23, "float64": 2.0**-52}


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def retracted(a, b, da, db, dtype=None, **options):
    """(a', b') of a batch of pairs."""
    tx = lp.retract(SCALE, **options)

    def one(a, b, da, db):
        params = {"q": trees.node(a, b)}
        updates, _ = tx.update({"q": trees.node(da, db)}, tx.init(params), params)
        new = optax.apply_updates(params, updates)
        return new["q"]["lora_a"], new["q"]["lora_b"]

    found = jax.jit(jax.vmap(one))(*(jnp.asarray(x, dtype) for x in (a, b, da, db)))
    return tuple(np.asarray(x, np.float64) for x in found)


def dense_fit(a, b, da, db, damping, eps):
    """(a', b'): one factor takes its step, least squares for the other, with λ ||a' - a - da||²."""
    if np.sum(a * a) < np.sum(b * b):
        return tuple(x.T for x in dense_fit(b.T, a.T, db.T, da.T, damping, eps)[::-1])
    new = b + db
    floor = max(oracle.ridge(*x, damping, eps).item() for x in ((a, b), (new.T, new)))
    left = np.concatenate([new.T, np.sqrt(floor) * np.eye(len(new))])
    goal = a @ b + da @ b + a @ db
    right = np.concatenate([goal.T, np.sqrt(floor) * (a + da).T])
    return np.linalg.lstsq(left, right, rcond=None)[0].T, new


@pytest.mark.parametrize("shape", [*trees.SIDES, (9, 4, 30)], ids=str)
def test_it_is_the_dense_least_squares_fit(x64, rng, shape):
    """Either factor the larger, and b = 0, which needs no case."""
    m, r, n = shape
    sizes = [(1, 1), (3, 0.1), (0.1, 3), (1, 0), (0, 1)]
    a, b, da, db = (
        np.stack([rng.normal(size=dims) for _ in sizes]) for dims in ((m, r), (r, n)) * 2
    )
    a, b = (x * s[:, None, None] for x, s in zip((a, b), np.transpose(sizes), strict=True))
    found = retracted(a, b, da, db, radius=None)
    for i in range(len(sizes)):
        expected = dense_fit(a[i], b[i], da[i], db[i], 1e-6, EPS["float64"])
        for x, y in zip(found, expected, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-8 * np.max(np.abs(y)))


def test_steps_of_the_fit_leave_out_da_db(x64, rng):
    """The product ends nearer to where da b + a db would take it than by da b."""
    a, b, da, db = (rng.normal(size=(1, *x)) for x in ((9, 4), (4, 30), (9, 4), (4, 30)))
    a = 10 * a
    a2, b2 = retracted(a, b, da, db, radius=None, damping=0.0)
    goal = da @ b + a @ db
    assert np.linalg.norm(a2 @ b2 - a @ b - goal) < np.linalg.norm(da @ b)
    assert np.linalg.norm(da @ db) > np.linalg.norm(da @ b) / 2


@pytest.mark.float32
def test_a_step_far_larger_than_the_factors_stays_finite_in_float32(rng):
    """The new Gram is damped relative to its own size."""
    a, b, da, db = (rng.normal(size=(200, *x)) for x in ((16, 8), (8, 4), (16, 8), (8, 4)))
    found = retracted(1e-3 * a, 0 * b, 1e3 * da, 1e3 * db, jnp.float32, radius=None)
    assert all(np.all(np.isfinite(x)) for x in found)
    assert max(np.max(np.abs(x)) for x in found) < 1e5


# --- the bound ---------------------------------------------------------------------------------


def moves(rates, G, tx_of_rate, params):
    """(rates, steps): ||s d(ab)|| of every step at each rate, and how often the bound acted."""

    @jax.jit
    @jax.vmap
    def run(rate):
        tx = tx_of_rate(rate)

        def advance(carry, G):
            params, state = carry
            a, b = params["q"]["lora_a"], params["q"]["lora_b"]
            grads = {"q": trees.node(SCALE * G @ b.T, SCALE * a.T @ G)}
            updates, state = tx.update(grads, state, params)
            new = optax.apply_updates(params, updates)
            change = new["q"]["lora_a"] @ new["q"]["lora_b"] - a @ b
            return (new, state), SCALE * jnp.linalg.norm(change)

        (_, state), sizes = jax.lax.scan(advance, (params, tx.init(params)), G)
        return sizes, optax.tree.get(state, "bounded")["q"][0]

    return tuple(np.asarray(x) for x in run(jnp.asarray(rates, G.dtype)))


def start(rng, dtype=jnp.float32):
    """a as at the start of training, b = 0, and one gradient for all steps."""
    params = {"q": trees.node(rng.uniform(-0.25, 0.25, (16, 4)), np.zeros((4, 12)), dtype)}
    G = jnp.broadcast_to(jnp.asarray(rng.normal(size=(16, 12)), dtype), (30, 16, 12))
    radius = 0.05 * SCALE * float(jnp.sum(params["q"]["lora_a"] ** 2)) / 4
    return params, G, radius


@pytest.mark.float32
@pytest.mark.parametrize("mode", trees.MODES)
def test_no_step_is_above_the_bound_at_any_rate(rng, mode):
    """The radius at first, then a quarter more than the recent steps."""
    params, G, radius = start(rng)
    rates = [1e-4, 1e-2, 1.0, 1e3]
    sizes, bounded = moves(rates, G, lambda rate: trees.optimizer(mode, rate), params)
    assert np.all(np.isfinite(sizes))
    assert np.all(sizes[:, 0] <= 1.01 * radius)
    largest = np.maximum.accumulate(sizes, axis=1)
    assert np.all(sizes[:, 1:] <= 1.01 * np.maximum(1.25 * largest[:, :-1], 10 * radius))
    assert bounded[0] == 0
    assert bounded[-1] > 0


def test_a_steady_sequence_of_steps_is_never_cut(rng):
    """Also one that is above the radius, once the bound has grown to it."""
    params, G, radius = start(rng)

    def steady(rate):
        return optax.chain(lp.lorapro(SCALE), optax.scale(-rate), lp.retract(SCALE))

    size = float(jnp.linalg.norm(G[0]))
    sizes, bounded = moves([0.3 * radius / size, 3 * radius / size], G, steady, params)
    assert bounded[0] == 0
    assert 1 <= bounded[1] <= 12  # ln 3 / ln sqrt((1 + 1.25²) / 2), and two to begin with
    assert np.all(sizes[1, 6:] > 1.2 * radius)


def test_without_a_radius_nothing_is_cut_and_diagnose_tells_the_share(rng):
    params, grads, _ = trees.make()
    for radius, share in ((None, 0.0), (1e-9, 1.0)):
        tx = lp.lorapro_adamw(1e-2, SCALE, radius=radius)
        _, state = jax.jit(tx.update)(grads, tx.init(params), params)
        found = jax.jit(functools.partial(lp.diagnose, scale=SCALE))(params, grads, state=state)
        assert [float(x.bounded) for x in found.values()] == [share] * len(params)


def test_leaves_in_no_pair_pass_through_untouched():
    params, grads, _ = trees.make()
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)
    tx = lp.retract(SCALE)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["bias"] is grads["bias"]
