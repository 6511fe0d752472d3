"""`lorapro` and `minimum_norm`: what factors can reach of the full gradient, and its split."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from trees import SCALE, SIDES

import lorapro_jax as lp

every_shape = pytest.mark.parametrize("shape", SIDES, ids=str)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@functools.cache
def compiled(name, damping):
    """(a, b, x, y) -> (da, db) for a batch of pairs: `x, y` are gradients, or steps."""
    tx = {"lorapro": functools.partial(lp.lorapro, SCALE), "minimum_norm": lp.minimum_norm}[name](
        damping=damping
    )

    def one(a, b, x, y):
        params = {"q": trees.node(a, b)}
        updates, state = tx.update({"q": trees.node(x, y)}, tx.init(params), params)
        assert state == optax.EmptyState()
        return updates["q"]["lora_a"], updates["q"]["lora_b"]

    return jax.jit(jax.vmap(one))


def apply(name, *arrays, damping=0.0, dtype=None):
    found = compiled(name, damping)(*(jnp.asarray(x, dtype) for x in arrays))
    return tuple(np.asarray(x, np.float64) for x in found)


def project(a, b, G, **options):
    return apply("lorapro", a, b, *oracle.factor_gradients(a, b, G, SCALE), **options)


def batch(rng, shape, pairs=4, rank_a=None, rank_b=None):
    """Factors of the condition number 3, of these ranks, and full gradients."""
    m, r, n = shape
    a = np.stack([oracle.conditioned(rng, m, r, 3, rank_a) for _ in range(pairs)])
    b = np.stack([oracle.conditioned(rng, r, n, 3, rank_b) for _ in range(pairs)])
    return a, b, rng.normal(size=(pairs, m, n))


@every_shape
def test_the_product_moves_by_the_projected_gradient(x64, rng, shape):
    a, b, G = batch(rng, shape)
    found = oracle.step(a, b, *project(a, b, G), SCALE)
    for one in zip(found, a, b, G, strict=True):
        np.testing.assert_allclose(one[0], oracle.projection(*one[1:]), atol=1e-8)


@every_shape
def test_the_normal_equations_hold(x64, rng, shape):
    """Jᵀ (J z - G) = 0, which says that no other step of the factors is closer to G."""
    a, b, G = batch(rng, shape)
    residual = oracle.step(a, b, *project(a, b, G), SCALE) - G
    for x in oracle.factor_gradients(a, b, residual, SCALE):
        np.testing.assert_allclose(x, 0, atol=1e-8)


every_deficiency = pytest.mark.parametrize(
    "deficiency", [{}, {"rank_a": 1}, {"rank_b": 1}, {"rank_a": 1, "rank_b": 1}], ids=str
)
# Small beside 1/9 of the traces, and large enough for the null spaces' roundings.
DAMPING = 1e-8


@every_shape
@every_deficiency
def test_it_is_the_step_of_least_norm_also_of_deficient_factors(x64, rng, shape, deficiency):
    a, b, G = batch(rng, shape, **deficiency)
    found = project(a, b, G, damping=DAMPING)
    assert_close(
        found, [oracle.minimum_norm_solution(*x, SCALE) for x in zip(a, b, G, strict=True)]
    )


@every_shape
@every_deficiency
def test_minimum_norm_is_the_least_of_all_splits_of_one_step(x64, rng, shape, deficiency):
    a, b, _ = batch(rng, shape, **deficiency)
    da, db = (rng.normal(size=x.shape) for x in (a, b))
    found = apply("minimum_norm", a, b, da, db, damping=DAMPING)
    assert_close(found, [oracle.least_of_family(*x) for x in zip(a, b, da, db, strict=True)])


def assert_close(found, expected):
    """Each pair's (da, db), relative to its largest entry."""
    for i, pair in enumerate(expected):
        size = max(np.max(np.abs(x)) for x in pair)
        for x, y in zip(found, pair, strict=True):
            np.testing.assert_allclose(x[i], y, rtol=0, atol=1e-6 * size)


def test_minimum_norm_leaves_the_least_step_as_it_is(x64, rng):
    a, b, G = batch(rng, (9, 4, 17))
    step = project(a, b, G)
    for x, y in zip(apply("minimum_norm", a, b, *step), step, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-9)


def test_the_products_step_does_not_depend_on_the_gauge(x64, rng):
    """a W and W⁻¹ b are the same product, with the same tangent vectors."""
    a, b, G = batch(rng, (9, 4, 17))
    W = rng.normal(size=(4, 4))
    a2, b2 = a @ W, np.linalg.inv(W) @ b
    one = oracle.step(a, b, *project(a, b, G), SCALE)
    other = oracle.step(a2, b2, *project(a2, b2, G), SCALE)
    np.testing.assert_allclose(other, one, atol=1e-9)


@pytest.mark.parametrize("shape", [(6, 6, 9), (9, 5, 5), (4, 4, 4)], ids=str)
def test_with_the_full_rank_it_is_the_gradient_itself(x64, rng, shape):
    a, b, G = batch(rng, shape)
    np.testing.assert_allclose(oracle.step(a, b, *project(a, b, G), SCALE), G, atol=1e-8)


def test_zero_b_needs_no_special_case(x64, rng):
    """The step is P_a G, all of it b's."""
    a, b, G = batch(rng, (9, 4, 17))
    da, db = project(a, 0 * b, G, damping=1e-6)
    np.testing.assert_allclose(da, 0, atol=1e-12)
    for i in range(len(a)):
        expected = a[i] @ np.linalg.pinv(a[i]) @ G[i]
        np.testing.assert_allclose(SCALE * a[i] @ db[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.float32
def test_the_float32_error_grows_with_the_condition_number(rng):
    """Of the product's step against the float64 definition, at κ of both factors up to 1e5.

    At most 20 eps κ while 1/κ² is above the damping (1e-6 / r of the trace), 2% beyond it.
    """
    kappas = [1, 10, 1e2, 1e3, 1e4, 1e5]
    a = np.stack([oracle.conditioned(rng, 48, 8, k) for k in kappas]).astype(np.float32)
    b = np.stack([oracle.conditioned(rng, 8, 40, k) for k in kappas]).astype(np.float32)
    G = rng.normal(size=(len(kappas), 48, 40))
    a, b = np.float64(a), np.float64(b)
    da, db = project(a, b, G, damping=1e-6, dtype=jnp.float32)
    exact = oracle.Damped(a, b, SCALE, 1e-6, 2.0**-23).nearest(G)
    error = oracle.norm(oracle.step(a, b, da, db, SCALE) - exact) / oracle.norm(exact)
    assert np.all(error <= np.minimum(20 * 2.0**-23 * np.array(kappas), 0.02))


# --- the transformation ------------------------------------------------------------------------


def test_with_sgd_it_is_the_papers_algorithm_1(x64):
    """Ten steps on a quadratic, against a dense loop with scipy's Sylvester solver."""
    params, _, dense = trees.make(seed=5)
    targets = {k: G for k, (_, _, G) in dense.items()}
    tx = optax.chain(lp.lorapro(SCALE, damping=0.0), optax.sgd(0.05))
    factors = {k: (a, b) for k, (a, b, _) in dense.items()}

    @jax.jit
    def advance(params, state):
        grads = {
            k: node_gradient(SCALE * x["lora_a"] @ x["lora_b"] - targets[k], x)
            for k, x in params.items()
        }
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def node_gradient(G, x):
        return trees.node(SCALE * G @ x["lora_b"].T, SCALE * x["lora_a"].T @ G)

    state = tx.init(params)
    for _ in range(10):
        params, state = advance(params, state)
        for k, (a, b) in factors.items():
            h = oracle.factor_gradients(a, b, SCALE * a @ b - targets[k], SCALE)
            da, db = oracle.sylvester_minimiser(a, b, *h, SCALE)
            factors[k] = (a - 0.05 * da, b - 0.05 * db)
    for k, (a, b) in factors.items():
        np.testing.assert_allclose(params[k]["lora_a"], a, atol=1e-9)
        np.testing.assert_allclose(params[k]["lora_b"], b, atol=1e-9)


def test_the_scale_may_differ_by_pair(x64):
    params, _, dense = trees.make()
    scales = {name: 0.5 + i for i, name in enumerate(dense)}
    grads = {k: trees.node(*oracle.factor_gradients(*x, scales[k])) for k, x in dense.items()}
    tx = lp.lorapro(scales.get, damping=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, (a, b, G) in dense.items():
        found = oracle.step(a, b, *trees.values(updates[name]), scales[name])
        np.testing.assert_allclose(found, oracle.projection(a, b, G), atol=1e-8)


def test_leaves_in_no_pair_pass_through_untouched():
    params, grads, _ = trees.make()
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)
    tx = lp.lorapro(SCALE)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["bias"] is grads["bias"]


def test_pairs_of_one_kind_may_differ_in_dtype():
    params, grads, _ = trees.make(dtype=jnp.float32, shapes={f"x{i}": (7, 2, 5) for i in range(3)})
    params["x1"], grads["x1"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (params["x1"], grads["x1"])
    )
    tx = lp.lorapro_adamw(1e-2, SCALE)
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    together = update(grads, params)
    for name in params:
        alone = update({name: grads[name]}, {name: params[name]})[name]
        for leaf, x in alone.items():
            assert together[name][leaf].dtype == x.dtype == params[name][leaf].dtype
            x, y = (np.asarray(v, np.float32) for v in (x, together[name][leaf]))
            rounding = 2.0**-7 if params[name][leaf].dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(y, x, rtol=rounding, atol=1e-6 * np.max(np.abs(x)))
