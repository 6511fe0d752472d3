"""Every mode against its definition in dense float64 arrays (oracle.py)."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from trees import SCALE, SIDES

import lorapro_jax as lp

every_mode = pytest.mark.parametrize("mode", trees.MODES)
either_adam = pytest.mark.parametrize("mode", ["full", "factored"])
every_shape = pytest.mark.parametrize(
    "shape",
    [x if x in [(3, 8, 2), (9, 4, 17)] else pytest.param(x, marks=pytest.mark.slow) for x in SIDES],
    ids=str,
)
EPS = 2.0**-23
# Of a step in float32 at κ = 3; Muon's polynomial enlarges what is small up to 6,000 times.
ROUNDED = {"full": 3e-5, "factored": 3e-5, "muon": 1e-2}


@pytest.fixture
def rng():
    return np.random.default_rng(7)


def direction(mode, **options):
    return optax.chain(trees.direction(mode, **options), optax.scale(-1e-2))


def errors(mode, seen, *, rounding=2.0**-52, **options):
    """(steps, pairs): how far each step of the weight is from the definition's, over its norm."""
    truth = oracle.MODES[mode](SCALE, rounding=rounding, **options)
    found = []
    for a, b, h_a, h_b, da, db in zip(*seen, strict=True):
        expected = -1e-2 * truth(a, b, h_a, h_b)
        difference = oracle.norm(oracle.step(a, b, da, db, SCALE) - expected)
        found.append(difference / oracle.norm(expected))
    return np.stack(found)


# --- the definitions ---------------------------------------------------------------------------


def test_full_mode_is_a_dense_numpy_adam_over_100_steps(x64):
    """Algorithm 2 with bias correction from step 1, every pair, moments and parameters."""
    shapes = {"q_0": (10, 3, 8), "q_1": (10, 3, 8), "up": (7, 2, 12)}
    params, _, dense = trees.make(seed=1, shapes=shapes)
    targets = {k: 3 * G for k, (_, _, G) in dense.items()}
    rate = 1e-2
    tx = optax.chain(
        lp.scale_by_lorapro_adam(
            SCALE, mode="full", floor=0.0, clipping_threshold=None, damping=0.0
        ),
        lp.minimum_norm(damping=0.0),
        optax.scale_by_learning_rate(rate),
    )
    factors = {k: (a, b) for k, (a, b, _) in dense.items()}
    adams = {k: oracle.Adam(G.shape) for k, (_, _, G) in dense.items()}

    def loss(params):
        products = {k: SCALE * x["lora_a"] @ x["lora_b"] for k, x in params.items()}
        return sum(jnp.sum((products[k] - targets[k]) ** 2) / 2 for k in products)

    def advance(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    run = jax.jit(lambda params: jax.lax.scan(advance, (params, tx.init(params)), length=100)[0])
    params, state = run(params)
    for _ in range(100):
        for k, (a, b) in factors.items():
            G = SCALE * a @ b - targets[k]
            U = adams[k](oracle.projection(a, b, G))
            h = oracle.factor_gradients(a, b, U, SCALE)
            da, db = oracle.sylvester_minimiser(a, b, *h, SCALE)
            factors[k] = (a - rate * da, b - rate * db)
    for k, (a, b) in factors.items():
        np.testing.assert_allclose(params[k]["lora_a"], a, atol=1e-8)
        np.testing.assert_allclose(params[k]["lora_b"], b, atol=1e-8)
    mu, rms = (optax.tree.get_all_with_path(state, name)[-1][1] for name in ("mu", "rms"))
    for group, names in {"q_*": ["q_0", "q_1"], "up": ["up"]}.items():
        np.testing.assert_allclose(mu[group], [adams[k].m for k in names], atol=1e-8)
        np.testing.assert_allclose(rms[group] ** 2, [adams[k].v for k in names], atol=1e-8)


@every_mode
@every_shape
def test_every_step_is_the_definitions(x64, rng, mode, shape):
    """Six steps at κ = 10, and from b = 0.

    Where r is above a side, the averages' part along null spaces vanishes but for the rounding
    over the damping, r · 2e-16 / 1e-6, which the division by small means enlarges threefold. Muon's
    core is exact for orthonormal frames, so for little damping, with which the oracle's own inverse
    is off by 2e-16 / 1e-9 where r is above a side.
    """
    a, b, G, _, _ = trees.many(rng, 8, shape, 10)
    b[:2] = 0
    m, r, n = shape
    options, allowed = {}, 1e-9 if r <= min(m, n) else 3e-8
    if mode == "muon":
        options, allowed = ({"damping": 0.0}, 1e-9) if r <= min(m, n) else ({"damping": 1e-9}, 1e-5)
    seen, _ = trees.run(direction(mode, **options), a, b, G)
    assert np.max(errors(mode, seen, **options)) < allowed


NUMBERS = [
    *itertools.product(
        ["full", "factored"],
        [
            {"floor": 0.3, "clip": 0.5},
            {"floor": 0.0, "clip": None, "b1": 0.0, "b2": 0.5},
            {"eps": 1.0, "damping": 1e-2},
        ],
    ),
    ("muon", {"beta": 0.5, "nesterov": False, "rms": 1.0, "damping": 0.0}),
    ("muon", {"beta": 0.0, "damping": 0.0}),
]


@pytest.mark.parametrize(("mode", "options"), NUMBERS, ids=str)
def test_every_number_does_what_the_definition_says(x64, rng, mode, options):
    a, b, G, _, _ = trees.many(rng, 4, (9, 4, 17), 10)
    given = {"clipping_threshold" if k == "clip" else k: v for k, v in options.items()}
    seen, _ = trees.run(direction(mode, **given), a, b, G)
    assert np.max(errors(mode, seen, **options)) < 1e-9


def test_with_the_full_rank_factored_mode_is_adafactors_second_moment(x64, rng):
    """r = min(m, n): g~ = G, and without momentum the step is optax's factored RMS of G."""
    a, b, G = oracle.pair(rng, 6, 6, 9)
    theirs = optax.scale_by_factored_rms(
        min_dim_size_to_factor=1, decay_rate=0.0, step_offset=0, epsilon=0.0
    )
    options = {"b1": 0.0, "b2": 0.0, "eps": 0.0, "damping": 0.0, "floor": 0.0}
    tx = direction("factored", clipping_threshold=None, **options)
    (_, _, _, _, da, db), _ = trees.run(tx, a[None], b[None], G[None, None])
    kernel = jnp.asarray(G)
    expected, _ = theirs.update(kernel, theirs.init(kernel), kernel)
    found = oracle.step(a, b, da[0, 0], db[0, 0], SCALE) / -1e-2
    np.testing.assert_allclose(found, expected, atol=1e-7)


# --- sizes -------------------------------------------------------------------------------------


@pytest.mark.float32
@every_mode
def test_gradients_of_any_size_give_the_definitions_step_in_float32(rng, mode):
    """Also where their squares have no place in float32."""
    a, b, G, _, _ = trees.many(rng, 8, (9, 4, 17), 3)
    sizes = np.repeat([1e-30, 1e-8, 1.0, 1e30], 2)[:, None, None, None]
    seen, state = trees.run(direction(mode), a, b, sizes * G, jnp.float32)
    assert np.max(errors(mode, seen, rounding=EPS)) < ROUNDED[mode]
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


@pytest.mark.float32
@every_mode
def test_gradients_may_grow_and_shrink_by_orders_of_magnitude(rng, mode):
    a, b, G, _, _ = trees.many(rng, 4, (9, 4, 17), 3)
    sizes = np.array([1e-30, 1e30, 0.0, 1.0, 1e-20, 1e25])
    seen, _ = trees.run(direction(mode), a, b, sizes[:, None, None] * G, jnp.float32)
    assert all(np.all(np.isfinite(x)) for x in seen)
    assert np.max(errors(mode, seen, rounding=EPS)) < ROUNDED[mode]


@pytest.mark.float32
@every_mode
def test_zero_factors_and_any_gradient_of_them_give_finite_steps(rng, mode):
    """Also gradients that autodiff would not give. One program for all cases."""
    cases = list(itertools.product(((0, 1), (1, 0), (0, 0)), (0.0, 1e-30, 1.0, 1e30)))
    shapes = (len(cases), 9, 4), (len(cases), 4, 17)
    zero, sizes = (np.array(x, float) for x in zip(*cases, strict=True))
    params, grads = (
        {"q": trees.node(*(x[:, None, None] * rng.normal(size=shape)
                           for x, shape in zip(factors, shapes, strict=True)), jnp.float32)}
        for factors in (zero.T, (sizes, sizes))
    )  # fmt: skip
    tx = trees.optimizer(mode, 1e-2)

    @jax.jit
    @jax.vmap
    def three_steps(params, grads):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, state

    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(three_steps(params, grads)))


@every_mode
def test_zero_gradients_are_no_step(mode):
    params, grads, _ = trees.make()
    tx = trees.optimizer(mode, 1e-3)
    update = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))
    updates, state = update(jax.tree.map(jnp.zeros_like, grads), params)
    assert not any(np.any(x) for x in jax.tree.leaves(updates))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(state))


# --- state and memory --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "numbers"),
    [
        ("full", lambda m, r, n: 2 * m * n + 1),
        ("factored", lambda m, r, n: (m + n) * (r + 1)),
        ("muon", lambda m, r, n: (m + n) * r),
    ],
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_state_is_as_large_as_documented(mode, numbers, dtype):
    params, _, dense = trees.make(dtype=dtype)
    state = trees.direction(mode).init(params)
    held = [x for x in jax.tree.leaves(state) if x.ndim]
    shapes = [(*a.shape, b.shape[1]) for a, b, _ in dense.values()]
    assert sum(x.size for x in held) == sum(numbers(*shape) for shape in shapes)
    assert {x.dtype for x in held} == {jnp.dtype(jnp.float32)}


@pytest.mark.float32
@every_mode
def test_only_the_first_moment_takes_mu_dtype(rng, mode):
    """And a step on bfloat16 moments is the float32 one, up to their rounding."""
    params, grads, _ = trees.make(dtype=jnp.float32)

    @functools.partial(jax.jit, static_argnums=0)
    def update(mu_dtype, grads, params):
        tx = trees.direction(mode, mu_dtype=mu_dtype)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)

    narrow, state = update(jnp.bfloat16, grads, params)
    wide, _ = update(None, grads, params)
    for field, dtype in {
        "mu": jnp.bfloat16, "mu_a": jnp.bfloat16, "mu_b": jnp.bfloat16,
        "rms": jnp.float32, "row": jnp.float32, "col": jnp.float32, "size": jnp.float32,
    }.items():  # fmt: skip
        for x in [v for _, v in optax.tree.get_all_with_path(state, field)]:
            assert {leaf.dtype for leaf in jax.tree.leaves(x)} <= {jnp.dtype(dtype)}, field
    for name, x in wide.items():
        one, other = (trees.step(params[name], node) for node in (x, narrow[name]))
        assert np.linalg.norm(one - other) < 2.0**-7 * np.linalg.norm(one)


def shapes_in(jaxpr):
    """Shapes of all values of a jaxpr and of those inside its equations."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for value in equation.params.values():
            for inner in jax.tree.leaves(value, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from shapes_in(inner)


@every_mode
def test_only_full_mode_forms_an_array_of_the_kernels_size(mode):
    m, n = 211, 157
    params = {"q": {"lora_a": jnp.ones((m, 3)), "lora_b": jnp.ones((3, n))}}
    tx = trees.optimizer(mode, 1e-3)
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    dense = [s for s in shapes_in(jaxpr.jaxpr) if (m in s and n in s) or math.prod(s) >= m * n]
    assert bool(dense) == (mode == "full")  # where they would be seen


# --- groups ------------------------------------------------------------------------------------


@every_mode
def test_a_pair_steps_as_it_would_alone(x64, mode):
    """Several kinds and layers in one tree, each pair with a scale of its own."""
    shapes = {f"{kind}_{i}": (7, 2, 5) for kind in "qk" for i in range(3)} | {"o_0": (5, 2, 7)}
    params, grads, _ = trees.make(shapes=shapes)
    scales = {name: 1.0 + i for i, name in enumerate(shapes)}

    @jax.jit
    def two_steps(grads, params, scales):
        tx = trees.direction(mode, scales.get)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]

    together = two_steps(grads, params, scales)
    for name in params:
        alone = two_steps(*({"x": tree[name]} for tree in (grads, params, scales)))
        trees.assert_close({"x": together[name]}, alone, rtol=1e-9, atol=1e-12)


@every_mode
def test_stacked_layers_train_as_separate_ones(x64, mode):
    params, grads, _ = trees.make(shapes={f"l{i}": (8, 3, 12) for i in range(3)})
    stacked, stacked_grads = (
        {"q": jax.tree.map(lambda *x: jnp.stack(x), *tree.values())} for tree in (params, grads)
    )
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})

    def three_steps(tx, params, grads):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    one = jax.jit(functools.partial(three_steps, trees.optimizer(mode, 1e-2)))
    tx = trees.optimizer(mode, 1e-2, layout=layout)
    other = jax.jit(functools.partial(three_steps, tx))(stacked, stacked_grads)
    expected = jax.tree.map(lambda *x: jnp.stack(x), *one(params, grads).values())
    trees.assert_close(other, {"q": expected}, atol=1e-9)


@every_mode
def test_leaves_in_no_pair_get_plain_adamw(x64, mode):
    params, grads, _ = trees.make(shapes={"q": (6, 2, 5)})
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)
    ours = trees.optimizer(mode, 1e-2, weight_decay=0.1)
    theirs = optax.adamw(1e-2, weight_decay=0.1)

    @functools.partial(jax.jit, static_argnums=0)
    def three_steps(tx, grads, params):
        state, bias = tx.init(params), []
        for i in range(3):
            now = jax.tree.map(lambda x, i=i: x / (i + 1), grads)
            updates, state = tx.update(now, state, params)
            params = optax.apply_updates(params, updates)
            bias.append(updates["bias"])
        return bias

    found, expected = (three_steps(tx, grads, params) for tx in (ours, theirs))
    trees.assert_close(found, expected, rtol=1e-12)
