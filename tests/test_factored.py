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


@pytest.mark.parametrize("solver", ["gram", "qr"])
@pytest.mark.parametrize(("kappa", "error"), [(1e3, 0.1), (1e5, 0.6)])
def test_float32_keeps_its_head_at_ill_conditioned_factors(x64, kappa, error, solver):
    """The weight after four steps against float64's; beyond κ = 1e3 the damping bounds the error.

    Coefficients of size κ² squared had float32's range left behind there: NaN.
    """
    rng = np.random.default_rng(0)
    sizes, values = (96, 64), np.geomspace(1, 1 / kappa, 8)
    a, b = (np.linalg.qr(rng.normal(size=(k, 8)))[0] * values for k in sizes)
    a, b = (z @ np.linalg.qr(rng.normal(size=(8, 8)))[0] for z in (a, b / 2))
    start = {"q": {"lora_a": np.float32(a), "lora_b": np.float32(b.T)}}
    gradients = rng.normal(size=(4, *sizes))
    tx = lp.lorapro_adamw(1e-4, SCALE, mode="factored", solver=solver)
    update, changes = jax.jit(tx.update), []
    for dtype in (jnp.float64, jnp.float32):
        params = jax.tree.map(lambda x, dtype=dtype: jnp.asarray(x, dtype), start)
        state = tx.init(params)
        for G in gradients:
            a, b = (np.float64(params["q"][k]) for k in ("lora_a", "lora_b"))
            slopes = zip(("lora_a", "lora_b"), oracle.factor_gradients(a, b, G, SCALE), strict=True)
            grads = {"q": {k: jnp.asarray(x, dtype) for k, x in slopes}}
            updates, state = update(grads, state, params)
            params = optax.apply_updates(params, updates)
        a, b = (np.float64(params["q"][k]) for k in ("lora_a", "lora_b"))
        changes.append(a @ b - np.float64(start["q"]["lora_a"]) @ np.float64(start["q"]["lora_b"]))
    exact, found = changes
    assert np.linalg.norm(found - exact) <= error * np.linalg.norm(exact)


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


@pytest.mark.parametrize("make", [owned, composed])
def test_a_trajectory_does_not_depend_on_the_gauge(x64, make):
    """From (a R, R⁻¹ b) every product of the trajectory is the same, at zero damping."""
    params, _, dense = trees.make()
    rng = np.random.default_rng(3)
    targets = {name: jnp.asarray(G) for name, (_, _, G) in dense.items()}
    moved = {}
    for name, (a, b, _) in dense.items():
        R = rng.normal(size=(a.shape[1], a.shape[1]))
        moved[name] = {"lora_a": jnp.asarray(a @ R), "lora_b": jnp.asarray(np.linalg.solve(R, b))}
    tx = make("symmetric")
    for (one, _), (other, _) in zip(
        trajectory(params, targets, tx), trajectory(moved, targets, tx), strict=True
    ):
        for name in dense:
            products = [p[name]["lora_a"] @ p[name]["lora_b"] for p in (one, other)]
            np.testing.assert_allclose(*products, atol=1e-8 * np.abs(products[0]).max())


def shapes_in(jaxpr):
    """The shapes of all values of a jaxpr, those of its inner ones included."""
    for equation in jaxpr.eqns:
        yield from (v.aval.shape for v in equation.outvars)
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def dense_values(tx, m, n):
    """Shapes with an m and an n, or of m n entries, in one update of a pair and of a stack."""
    params = {
        "q": {"lora_a": jnp.ones((m, 3)), "lora_b": jnp.ones((3, n))},
        "layers_0": {"lora_a": jnp.ones((m, 3)), "lora_b": jnp.ones((3, n))},
        "layers_1": {"lora_a": jnp.ones((m, 3)), "lora_b": jnp.ones((3, n))},
    }
    jaxpr = jax.make_jaxpr(tx.update)(params, tx.init(params), params)
    return [s for s in shapes_in(jaxpr.jaxpr) if (m in s and n in s) or np.prod(s) >= m * n]


@pytest.mark.parametrize("owns", [True, False])
def test_no_array_of_the_kernels_size(owns):
    m, n = 211, 157
    tx = (
        lp.lorapro_adamw(1e-3, SCALE, mode="factored")
        if owns
        else lp.scale_by_lorapro_adam(SCALE, mode="factored")
    )
    assert dense_values(tx, m, n) == []
    assert dense_values(lp.lorapro_adamw(1e-3, SCALE, mode="full"), m, n)  # it would be seen


def test_groups_in_turn_share_their_temporary_memory():
    """On a CPU an update of three groups of 96 pairs needs little more than one of them.

    1.6 times as much, for a group's step and the next one's stacking overlap; 2.9 without turns.
    """

    def temporary(pairs):
        params = {
            f"layers_{i}": {"lora_a": jnp.ones((96, 4)), "lora_b": jnp.ones((4, 80))}
            for i in range(pairs)
        }
        tx = lp.lorapro_adamw(1e-3, SCALE, mode="factored")
        update = jax.jit(tx.update).lower(params, tx.init(params), params).compile()
        return update.memory_analysis().temp_size_in_bytes

    assert temporary(288) < 1.75 * temporary(96)


@pytest.mark.parametrize(
    ("make", "numbers"),
    [
        (lambda: lp.lorapro_adamw(1e-3, SCALE, mode="factored"), lambda m, n, r: (m + n) * (r + 1)),
        (
            lambda: lp.scale_by_lorapro_adam(SCALE, mode="factored"),
            lambda m, n, r: (m + n) * (2 * r + 1),
        ),
    ],
    ids=["knows the step", "does not"],
)
def test_state_of_loras_size(make, numbers):
    params, _, dense = trees.make()
    held = sum(x.size for x in jax.tree.leaves(make().init(params)) if x.ndim)
    assert held == sum(numbers(*G.shape, a.shape[1]) for a, _, G in dense.values())
    # bf16 parameters: the state is in float32 all the same
    narrow, _, _ = trees.make(dtype=jnp.bfloat16)
    leaves = jax.tree.leaves(make().init(narrow))
    assert {x.dtype for x in leaves if x.ndim} == {jnp.dtype(jnp.float32)}


def test_the_first_moment_may_be_bfloat16(x64):
    params, grads, _ = trees.make()
    tx = lp.lorapro_adamw(1e-3, SCALE, mode="factored", mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    _, after = jax.jit(tx.update)(grads, state, params)
    assert {x.dtype for x in jax.tree.leaves((after.mu_a, after.mu_b))} == {jnp.dtype(jnp.bfloat16)}
    assert {x.dtype for x in jax.tree.leaves((after.row, after.col))} == {jnp.dtype(jnp.float64)}
    jax.tree.map(lambda x, y: x.dtype == y.dtype or pytest.fail("dtype changed"), state, after)


def test_zero_gradients_at_zero_b_are_no_step():
    params, grads, _ = trees.make()
    params = {k: {**v, "lora_b": jnp.zeros_like(v["lora_b"])} for k, v in params.items()}
    zeros = jax.tree.map(jnp.zeros_like, grads)
    tx = lp.lorapro_adamw(1e-3, SCALE, mode="factored")
    updates, state = jax.jit(tx.update)(zeros, tx.init(params), params)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


def test_full_rank_is_adafactors_second_moment(x64):
    """r = min(m, n): g~ = G, and without momentum the step is optax's factored RMS of G."""
    rng = np.random.default_rng(5)
    a, b, G = oracle.pair(rng, 6, 6, 9)
    params = {"q": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}
    theirs = optax.scale_by_factored_rms(
        min_dim_size_to_factor=1, decay_rate=0.0, step_offset=0, epsilon=0.0
    )
    tx = lp.scale_by_lorapro_adam(SCALE, mode="factored", b1=0.0, b2=0.0, eps=0.0, damping=0.0)
    update = jax.jit(tx.update)
    for _ in range(2):
        G = rng.normal(size=G.shape)
        kernel = jnp.asarray(G)
        expected, _ = theirs.update(kernel, theirs.init(kernel), kernel)
        grads = {"q": trees.gradient_node(a, b, G)}
        found, _ = update(grads, tx.init(params), params)
        np.testing.assert_allclose(trees.step(params["q"], found["q"]), expected, atol=1e-7)
