"""The transformations: against dense references, and among optax's own."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
import trees
from hypothesis import given, settings
from hypothesis import strategies as st
from trees import SCALE

import lorapro_jax as lp

MODES = ["full", "factored", "efficient"]
# for claims about what surrounds the pairs, which are quick to compile
ONE_GROUP = {name: trees.SHAPES[name] for name in ("up_0", "up_1")}
TRANSFORMS = {
    "lorapro": lambda **kw: lp.lorapro(SCALE, **kw),
    "full": lambda **kw: lp.scale_by_lorapro_adam(SCALE, mode="full", **kw),
    "efficient": lambda **kw: lp.scale_by_lorapro_adam(SCALE, mode="efficient", **kw),
    "adamw full": lambda **kw: lp.lorapro_adamw(1e-2, SCALE, mode="full", weight_decay=0.1, **kw),
    "adamw factored": lambda **kw: lp.lorapro_adamw(1e-2, SCALE, weight_decay=0.1, **kw),
    "adamw efficient": lambda **kw: lp.lorapro_adamw(1e-2, SCALE, mode="efficient", **kw),
}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS.keys())
every_mode = pytest.mark.parametrize("mode", MODES)


def quadratic(dense, targets):
    """The gradients that autodiff gives for sum ||K0 + s a b - T||² / 2."""

    def loss(params):
        terms = [
            jnp.sum((SCALE * params[k]["lora_a"] @ params[k]["lora_b"] - targets[k]) ** 2) / 2
            for k in dense
        ]
        return sum(terms)

    return loss


def compiled_step(tx, loss):
    """(params, state) after a step, of them before it."""

    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    return jax.jit(step)


# --- lorapro ---------------------------------------------------------------------------------


def test_lorapro_is_the_damped_solution_of_every_pair(x64):
    params, grads, dense = trees.make()
    tx = lp.lorapro(SCALE, damping=1e-4)
    updates, state = jax.jit(tx.update)(grads, tx.init(params), params)
    assert state == optax.EmptyState()
    for name, (a, b, G) in dense.items():
        da, db = oracle.damped_solution(a, b, G, SCALE, 1e-4)
        np.testing.assert_allclose(updates[name]["lora_a"], da, atol=1e-10)
        np.testing.assert_allclose(updates[name]["lora_b"], db, atol=1e-10)


def test_more_pairs_than_one_batch_holds(x64):
    """Chunks of one shape, two shapes of one rank, remainders, and a pair of another rank."""
    shapes = {f"x{i:03d}": (6 + i % 2, 2, 5) for i in range(274)} | {"y": (6, 3, 5)}
    params, grads, dense = trees.make(shapes=shapes)
    tx = lp.lorapro(SCALE, damping=1e-4)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, (a, b, G) in dense.items():
        expected = oracle.damped_solution(a, b, G, SCALE, 1e-4)
        for leaf, truth in zip(("lora_a", "lora_b"), expected, strict=True):
            np.testing.assert_allclose(updates[name][leaf], truth, atol=1e-9)


@every_mode
def test_a_pair_steps_as_it_would_alone(x64, mode):
    """133 pairs of one kind, more than one batch holds, each with a scale of its own."""
    params, grads, _ = trees.make(shapes={f"x{i:03d}": (7, 2, 5) for i in range(133)})
    tx = lp.scale_by_lorapro_adam(lambda path: 1.0 + int(path[1:]), mode=mode)
    state, update = tx.init(params), jax.jit(tx.update)
    sizes = [len(x) for x in (state.nu if mode == "full" else state.mu_a).values()]
    assert sizes == [67, 66]  # as even as can be
    for _ in range(2):
        together, state = update(grads, state, params)

    @jax.jit  # once for all pairs
    def two_steps(grads, params, scale):
        tx = lp.scale_by_lorapro_adam(scale, mode=mode)
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]

    for name in params:
        alone = two_steps({"x": grads[name]}, {"x": params[name]}, 1.0 + int(name[1:]))
        trees.assert_same_computation({"x": together[name]}, alone)


@every_mode
def test_a_kind_steps_as_it_would_alone(x64, mode):
    """Three kinds of one shape, of which a CPU takes two at once in full mode, and another."""
    shapes = {f"{kind}_{i}": (7, 2, 5) for kind in "qkv" for i in range(3)}
    params, grads, _ = trees.make(shapes=shapes | {"o_0": (5, 2, 7), "o_1": (5, 2, 7)})
    tx = lp.scale_by_lorapro_adam(SCALE, mode=mode)

    @jax.jit
    def two_steps(grads, params):
        _, state = tx.update(grads, tx.init(params), params)
        return tx.update(grads, state, params)[0]

    together = two_steps(grads, params)
    for kind in "qkvo":
        own_params, own_grads, own = (
            {k: v for k, v in tree.items() if k[0] == kind} for tree in (params, grads, together)
        )
        trees.assert_same_computation(own, two_steps(own_grads, own_params))


@every_transform
def test_pairs_of_one_kind_may_differ_in_dtype(make):
    params, grads, _ = trees.make(dtype=jnp.float32, shapes={f"x{i}": (7, 2, 5) for i in range(3)})
    params["x1"], grads["x1"] = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16), (params["x1"], grads["x1"])
    )
    tx = make()
    update = jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])
    together = update(grads, params)
    for name in params:
        alone = update({name: grads[name]}, {name: params[name]})[name]
        for leaf, x in alone.items():
            assert together[name][leaf].dtype == x.dtype == params[name][leaf].dtype
            x, y = (np.asarray(v, np.float32) for v in (x, together[name][leaf]))
            rounding = 2.0**-8 if params[name][leaf].dtype == jnp.bfloat16 else 1e-5
            np.testing.assert_allclose(y, x, rtol=rounding, atol=1e-6 * np.max(np.abs(x)))


def kernels(compiled):
    """The distinct fused computations of a program, whatever their values are called."""
    bodies = re.findall(r"^%\S*fused_computation\S* \(.*?^}", compiled.as_text(), re.M | re.S)
    return {re.sub(r"%[\w.-]+|, metadata={.*?}|[\w.]+: ", "", body) for body in bodies}


@every_transform
def test_more_pairs_of_one_shape_are_no_more_kernels(make):
    """On one CPU, where XLA compiles each."""
    counts = []
    for pairs in (9, 27):
        params, grads, _ = trees.make(shapes={f"x{i}": (7, 2, 5) for i in range(pairs)})
        tx = make()
        compiled = jax.jit(tx.update).lower(grads, tx.init(params), params).compile()
        counts.append(len(kernels(compiled)))
    assert 0 < counts[0] == counts[1]


def test_the_scale_may_differ_by_pair(x64):
    params, _, dense = trees.make()
    scales = {name: 0.5 + i for i, name in enumerate(dense)}
    grads = {}
    for name, (a, b, G) in dense.items():
        h_a, h_b = oracle.factor_gradients(a, b, G, scales[name])
        grads[name] = {"lora_a": jnp.asarray(h_a), "lora_b": jnp.asarray(h_b)}
    tx = lp.lorapro(lambda path: scales[path], damping=0.0)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name, (a, b, G) in dense.items():
        da, db = (np.asarray(updates[name][k]) for k in ("lora_a", "lora_b"))
        step = scales[name] * (da @ b + a @ db)
        np.testing.assert_allclose(step, oracle.projection(a, b, G), atol=1e-8)


def test_leaves_in_no_pair_pass_through_untouched():
    params, grads, _ = trees.make(shapes=ONE_GROUP)
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)
    tx = lp.lorapro(SCALE)
    updates, _ = tx.update(grads, tx.init(params), params)
    assert updates["bias"] is grads["bias"]


def test_with_sgd_it_is_the_papers_algorithm_1(x64):
    """Ten steps on a quadratic, against a dense loop with scipy's Sylvester solver."""
    params, _, dense = trees.make(seed=5)
    targets = {k: G for k, (_, _, G) in dense.items()}
    tx = optax.chain(lp.lorapro(SCALE, damping=0.0), optax.sgd(0.05))
    state, step = tx.init(params), compiled_step(tx, quadratic(dense, targets))
    reference = {k: (a, b) for k, (a, b, _) in dense.items()}
    for _ in range(10):
        params, state = step(params, state)
        for k, (a, b) in reference.items():
            h = oracle.factor_gradients(a, b, SCALE * a @ b - targets[k], SCALE)
            da, db = oracle.sylvester_minimiser(a, b, *h, SCALE)
            reference[k] = (a - 0.05 * da, b - 0.05 * db)
    for k, (a, b) in reference.items():
        np.testing.assert_allclose(params[k]["lora_a"], a, atol=1e-9)
        np.testing.assert_allclose(params[k]["lora_b"], b, atol=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_tree_of_pairs_and_other_leaves(data):
    """Random nesting, shapes, ranks and dtypes: each pair its oracle's step, the rest untouched."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    dtypes = st.sampled_from([jnp.float32, jnp.bfloat16])
    params, grads, truth = {}, {}, {}
    for name in data.draw(st.lists(st.sampled_from("abcdef"), min_size=1, max_size=4, unique=True)):
        # few shapes: pairs of one kind are stacked, and take no longer to compile than one
        m, r, n = data.draw(st.sampled_from([(3, 1, 9), (9, 3, 5), (6, 2, 6)]))
        a, b, G = oracle.pair(rng, m, r, n)
        dtype = data.draw(dtypes)
        leaves = (*oracle.factor_gradients(a, b, G, SCALE), a, b)
        h_a, h_b, a, b = (jnp.asarray(x, dtype) for x in leaves)
        truth[name] = [np.asarray(x, np.float64) for x in (a, b, h_a, h_b)]
        depth = data.draw(st.integers(0, 2))
        params[name] = _nested(depth, {"lora_a": a, "lora_b": b, "bias": jnp.ones(n, dtype)})
        grads[name] = _nested(depth, {"lora_a": h_a, "lora_b": h_b, "bias": jnp.ones(n, dtype)})
    tx = lp.lorapro(SCALE, damping=1e-3)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.map(jax.typeof, updates) == jax.tree.map(jax.typeof, grads)
    for name, (a, b, h_a, h_b) in truth.items():
        node, given_node = _innermost(updates[name]), _innermost(grads[name])
        np.testing.assert_array_equal(node["bias"], given_node["bias"])
        mu = SCALE**2 * oracle.damping_of(a, b, 1e-3)
        J = oracle.jacobian(a, b, SCALE)
        # The two projections of one rounded G no longer agree; their mean core is what we solve,
        # so compare the normal equations' residual, whose size is that of the rounding.
        z = np.concatenate(
            [np.ravel(np.asarray(node[k], np.float64)) for k in ("lora_a", "lora_b")]
        )
        h = np.concatenate([h_a.ravel(), h_b.ravel()])
        coarse = given_node["lora_a"].dtype == jnp.bfloat16
        residual = np.linalg.norm(J.T @ (J @ z) + mu * z - h)
        size = np.linalg.norm(J, 2) ** 2 * np.linalg.norm(z) + np.linalg.norm(h)
        assert residual <= (2e-2 if coarse else 1e-4) * size


def _nested(depth, node):
    return node if depth == 0 else {f"layer_{depth}": _nested(depth - 1, node)}


def _innermost(node):
    return node if "lora_a" in node else _innermost(next(iter(node.values())))


# --- modes -----------------------------------------------------------------------------------


def test_full_mode_is_a_dense_numpy_adam_over_100_steps(x64):
    """Algorithm 2 with bias correction from step 1, every pair, moments and parameters."""
    shapes = {"q_0": (10, 3, 8), "q_1": (10, 3, 8), "up": (7, 2, 12)}
    params, _, dense = trees.make(seed=1, shapes=shapes)
    targets = {k: 3 * G for k, (_, _, G) in dense.items()}
    rate = 1e-2
    tx = lp.lorapro_adamw(rate, SCALE, mode="full", damping=0.0, x="sylvester", radius=None)
    factors = {k: (a, b) for k, (a, b, _) in dense.items()}
    adams = {k: oracle.Adam(G.shape) for k, (_, _, G) in dense.items()}
    state, step = tx.init(params), compiled_step(tx, quadratic(dense, targets))
    for _ in range(100):
        params, state = step(params, state)
        for k, (a, b) in factors.items():
            G = SCALE * a @ b - targets[k]
            U = adams[k](oracle.projection(a, b, G))
            h = oracle.factor_gradients(a, b, U, SCALE)
            da, db = oracle.sylvester_minimiser(a, b, *h, SCALE)
            factors[k] = (a - rate * da, b - rate * db)
    full = state
    assert int(full.count) == 100
    for k, (a, b) in factors.items():
        np.testing.assert_allclose(params[k]["lora_a"], a, atol=1e-8)
        np.testing.assert_allclose(params[k]["lora_b"], b, atol=1e-8)
    for group in (["q_0", "q_1"], ["up"]):  # named by the first; moments in the order of the paths
        for name, moments in (("m", full.mu), ("v", full.nu)):
            expected = np.stack([getattr(adams[k], name) for k in group])
            np.testing.assert_allclose(moments[group[0]], expected, atol=1e-8)


def test_efficient_mode_is_adam_on_the_projected_factors(x64):
    params, _, dense = trees.make(seed=1)
    targets = {k: G for k, (_, _, G) in dense.items()}
    tx = lp.lorapro_adamw(1e-2, SCALE, mode="efficient", damping=0.0)
    factors = {k: (a, b) for k, (a, b, _) in dense.items()}
    adams = {k: (oracle.Adam(a.shape), oracle.Adam(b.shape)) for k, (a, b, _) in dense.items()}
    state, step = tx.init(params), compiled_step(tx, quadratic(dense, targets))
    for _ in range(20):
        params, state = step(params, state)
        for k, (a, b) in factors.items():
            h = oracle.factor_gradients(a, b, SCALE * a @ b - targets[k], SCALE)
            da, db = oracle.sylvester_minimiser(a, b, *h, SCALE)
            factors[k] = a - 1e-2 * adams[k][0](da), b - 1e-2 * adams[k][1](db)
    for k, (a, b) in factors.items():
        np.testing.assert_allclose(params[k]["lora_a"], a, atol=1e-8)
        np.testing.assert_allclose(params[k]["lora_b"], b, atol=1e-8)


@every_mode
def test_stacked_layers_train_as_separate_ones(x64, mode):
    params, _, dense = trees.make(shapes={f"l{i}": (8, 3, 12) for i in range(3)})
    stacked = {"q": jax.tree.map(lambda *x: jnp.stack(x), *params.values())}
    targets = {k: G for k, (_, _, G) in dense.items()}
    layout = lp.layouts.FLAX.declare({"q": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
    loss = quadratic(dense, targets)

    def stacked_loss(p):
        return loss({k: jax.tree.map(lambda x, i=i: x[i], p["q"]) for i, k in enumerate(dense)})

    def train(tx, p, loss):
        state, step = tx.init(p), compiled_step(tx, loss)
        for _ in range(5):
            p, state = step(p, state)
        return p

    one = train(lp.lorapro_adamw(1e-2, SCALE, mode=mode), params, loss)
    other = train(lp.lorapro_adamw(1e-2, SCALE, mode=mode, layout=layout), stacked, stacked_loss)
    trees.assert_close(
        other, {"q": jax.tree.map(lambda *x: jnp.stack(x), *one.values())}, atol=1e-9
    )


@every_mode
def test_leaves_in_no_pair_get_plain_adamw(x64, mode):
    params, grads, _ = trees.make(shapes=ONE_GROUP)
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)
    tx = lp.lorapro_adamw(1e-2, SCALE, mode=mode, weight_decay=0.1)
    adamw = optax.adamw(1e-2, weight_decay=0.1)
    state, other, update = tx.init(params), adamw.init(params["bias"]), jax.jit(tx.update)
    for _ in range(3):
        updates, state = update(grads, state, params)
        expected, other = adamw.update(grads["bias"], other, params["bias"])
        np.testing.assert_allclose(updates["bias"], expected, rtol=1e-12)


def test_decay_shrinks_the_product_by_one_minus_lr_wd(x64):
    params, grads, dense = trees.make()
    zero = jax.tree.map(jnp.zeros_like, grads)
    schedule = optax.piecewise_constant_schedule(1e-2, {1: 0.5})
    tx = lp.lorapro_adamw(schedule, SCALE, weight_decay=0.3)
    state, decayed, update = tx.init(params), 1.0, jax.jit(tx.update)
    for rate in (1e-2, 5e-3):
        updates, state = update(zero, state, params)
        params = optax.apply_updates(params, updates)
        decayed *= 1 - rate * 0.3
    for name, (a, b, _) in dense.items():
        product = params[name]["lora_a"] @ params[name]["lora_b"]
        np.testing.assert_allclose(product, decayed * a @ b, rtol=1e-10)


def test_a_tiny_decay_survives_float32():
    """sqrt(1 - 1e-8) is 1 in float32; the update must still be -lr wd / 2 of the factor."""
    params, grads, _ = trees.make(dtype=jnp.float32)
    zero = jax.tree.map(jnp.zeros_like, grads)
    tx = lp.lorapro_adamw(1e-4, SCALE, weight_decay=1e-4)
    updates, _ = jax.jit(tx.update)(zero, tx.init(params), params)
    trees.assert_close(updates, jax.tree.map(lambda p: -0.5e-8 * p, params), rtol=1e-5)


@pytest.mark.parametrize("mode", ["full", "factored", "efficient"])
def test_a_pair_of_zeros_stays_there(mode):
    """Its gradients are zero, whatever the loss; a small scale must not make them NaN."""
    zeros = jax.tree.map(jnp.zeros_like, trees.make(dtype=jnp.float32)[0])
    tx = lp.lorapro_adamw(1e-3, 0.25, mode=mode)
    updates, state = jax.jit(tx.update)(zeros, tx.init(zeros), zeros)
    jax.tree.map(lambda x: np.testing.assert_array_equal(x, 0), updates)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(state))


@pytest.mark.parametrize("mode", ["lorapro", "full", "factored", "efficient"])
def test_an_empty_leaf_may_come_first(mode):
    """On a CPU, where a group of many pairs waits for another: for a factor, not for any leaf."""
    pair = {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.zeros((2, 4))}
    params = {"empty": jnp.zeros((0,))} | {f"layers_{i}": pair for i in range(100)}
    tx = lp.lorapro(SCALE) if mode == "lorapro" else lp.lorapro_adamw(1e-3, SCALE, mode=mode)
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["empty"].shape == (0,)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


# --- state -----------------------------------------------------------------------------------


def byte_count(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree) if x.ndim)


def test_efficient_holds_what_adam_holds():
    params, _, _ = trees.make(dtype=jnp.float32)
    efficient = lp.scale_by_lorapro_adam(SCALE, mode="efficient").init(params)
    assert byte_count(efficient) == byte_count(optax.scale_by_adam().init(params))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_full_holds_two_float32_kernels_a_pair(dtype):
    params, _, dense = trees.make(dtype=dtype)
    state = lp.scale_by_lorapro_adam(SCALE, mode="full").init(params)
    assert byte_count(state) == sum(2 * 4 * G.size for _, _, G in dense.values())


@pytest.mark.parametrize("scanned", [False, True])
def test_full_mode_holds_the_intermediates_of_a_few_pairs_at_a_time(scanned):
    """24 pairs: the equivalent gradients and directions of all of them would be 48 kernels."""
    shapes = {f"x{i:02d}": (256, 4, 256) for i in range(24)}
    params, grads, _ = trees.make(dtype=jnp.float32, shapes=shapes)
    layout = None
    if scanned:
        params, grads = (
            {"x": jax.tree.map(lambda *x: jnp.stack(x), *tree.values())} for tree in (params, grads)
        )
        layout = lp.layouts.FLAX.declare({"x": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,))})
    tx = lp.scale_by_lorapro_adam(SCALE, mode="full", layout=layout)
    program = jax.jit(tx.update, donate_argnums=1).lower(grads, tx.init(params), params).compile()
    assert program.memory_analysis().temp_size_in_bytes < 8 * 256 * 256 * 4


@every_mode
def test_the_second_moment_is_never_bf16(mode):
    params, grads, _ = trees.make(dtype=jnp.bfloat16, shapes=ONE_GROUP)
    tx = lp.scale_by_lorapro_adam(SCALE, mode=mode, mu_dtype=jnp.bfloat16)
    state = tx.init(params)
    _, new = jax.jit(tx.update)(grads, state, params)
    for s in (state, new):
        dtypes = {str(x.dtype) for x in jax.tree.leaves(s) if x.ndim}
        assert dtypes == {"bfloat16", "float32"}


@every_mode
def test_a_bf16_second_moment_would_not_decay_and_ours_does(mode):
    params, grads, _ = trees.make(dtype=jnp.bfloat16, shapes=ONE_GROUP)
    tx = lp.scale_by_lorapro_adam(SCALE, mode=mode)
    state, update = tx.init(params), jax.jit(tx.update)
    _, state = update(grads, state, params)
    zero = jax.tree.map(jnp.zeros_like, grads)
    _, later = update(zero, state, params)
    assert _second_moments(state)
    for x, y in zip(_second_moments(state), _second_moments(later), strict=True):
        np.testing.assert_allclose(y, 0.999 * x, rtol=1e-5)


def _second_moments(state):
    return [
        leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
        if any(getattr(key, "name", "") in ("nu", "nu_a", "nu_b", "row", "col") for key in path)
    ]


# --- precision -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "bound"), [(jnp.float32, 3e-5), (jnp.bfloat16, 4e-2)])
def test_narrow_factors_come_within_a_stated_bound_of_float64(x64, dtype, bound):
    """Relative error of the step, with the oracle given the same rounded inputs."""
    params, grads, dense = trees.make(dtype=dtype)
    tx = lp.lorapro(SCALE)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    for name in dense:
        assert {x.dtype for x in jax.tree.leaves(updates[name])} == {jnp.dtype(dtype)}
        a, b, h_a, h_b = (
            np.asarray(tree[name][leaf], np.float64)
            for tree in (params, grads)
            for leaf in ("lora_a", "lora_b")
        )
        da, db = oracle.sylvester_minimiser(a, b, h_a, h_b, SCALE)
        expected = SCALE * (da @ b + a @ db)
        error = np.linalg.norm(trees.step(params[name], updates[name]) - expected)
        assert error <= bound * np.linalg.norm(expected)


# --- among other transformations; tests/test_contract.py has the rest of the optax contract -----


def _apply(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


@every_transform
def test_donated_buffers_give_the_same_step(make):
    params, grads, _ = trees.make()
    tx = make()
    apply = functools.partial(_apply, tx)
    expected, _ = jax.jit(apply)(grads, tx.init(params), params)
    step = jax.jit(apply, donate_argnums=(1, 2))
    got, state = step(grads, tx.init(params), jax.tree.map(jnp.copy, params))
    trees.assert_same_computation(got, expected)
    step(grads, state, got)


@every_transform
def test_an_empty_tree_has_an_empty_step(make):
    tx = make()
    empty = tx.init({})
    updates, after = tx.update({}, empty, {})
    assert updates == {}
    assert jax.tree.structure(after) == jax.tree.structure(empty)


@every_transform
def test_masked_and_partition_see_only_their_part(make):
    params, grads, _ = trees.make(shapes=ONE_GROUP)
    params["bias"], grads["bias"] = jnp.ones(3), jnp.ones(3)
    plain = make()
    lora = {k: v for k, v in params.items() if k != "bias"}
    expected, _ = jax.jit(plain.update)({k: grads[k] for k in lora}, plain.init(lora), lora)
    label = {k: jax.tree.map(lambda _: "lora" if k != "bias" else "rest", v)  # noqa: B023
             for k, v in params.items()}  # fmt: skip
    masked = optax.masked(make(), jax.tree.map(lambda name: name == "lora", label))
    parts = optax.partition({"lora": make(), "rest": optax.set_to_zero()}, label)
    for tx in (masked, parts):
        updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
        trees.assert_same_computation({k: updates[k] for k in lora}, expected)


@every_transform
def test_non_finite_gradients_are_skipped_with_the_state_intact(make):
    params, grads, _ = trees.make(shapes=ONE_GROUP)
    tx = optax.apply_if_finite(make(), max_consecutive_errors=3)
    update = jax.jit(tx.update)
    _, state = update(grads, tx.init(params), params)
    for poison in (jnp.nan, jnp.inf):
        bad = jax.tree.map(lambda g: g, grads)
        bad["up_0"]["lora_a"] = bad["up_0"]["lora_a"].at[0, 0].set(poison)
        updates, after = update(bad, state, params)
        assert all(not np.any(x) for x in jax.tree.leaves(updates))
        trees.assert_close(after.inner_state, state.inner_state)
        assert int(after.notfinite_count) == 1


@every_transform
def test_non_finite_gradients_of_one_pair_do_not_reach_another(make):
    params, grads, _ = trees.make()
    tx = make()
    update = jax.jit(tx.update)
    clean, _ = update(grads, tx.init(params), params)
    # of the first group, for which the others wait, and of a pair that shares a batch
    for ill, poison in (("down", jnp.nan), ("up_0", -jnp.inf)):
        bad = {**grads, ill: jax.tree.map(lambda g, p=poison: g * p, grads[ill])}
        updates, _ = update(bad, tx.init(params), params)
        assert not np.all(np.isfinite(updates[ill]["lora_a"]))
        for name in params.keys() - {ill}:
            trees.assert_close(updates[name], clean[name], rtol=0)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_a_scale_that_is_no_scale(scale):
    for make in (lp.lorapro, functools.partial(lp.lorapro_adamw, 1e-3)):
        with pytest.raises(ValueError, match="scale must be positive and finite"):
            make(scale)
    params, grads, _ = trees.make()
    tx = lp.lorapro(lambda path: scale)
    with pytest.raises(ValueError, match="down: scale must be positive"):
        tx.update(grads, tx.init(params), params)


def test_unknown_names_and_numbers_out_of_range():
    with pytest.raises(
        ValueError, match="mode must be one of full, factored, efficient, not 'fast'"
    ):
        lp.scale_by_lorapro_adam(SCALE, mode="fast")
    with pytest.raises(ValueError, match="x must be one of sylvester, zero, symmetric"):
        lp.lorapro(SCALE, x="newton")
    for kwargs in ({"b1": 1.0}, {"b2": -0.1}, {"eps": float("nan")}, {"damping": -1.0}):
        with pytest.raises(ValueError, match=rf"{next(iter(kwargs))} must be in"):
            lp.scale_by_lorapro_adam(SCALE, **kwargs)
    for kwargs in ({"learning_rate": -1.0}, {"weight_decay": -0.1, "learning_rate": 1e-3}):
        with pytest.raises(ValueError, match="must be in"):
            lp.lorapro_adamw(scale=SCALE, **kwargs)


@every_transform
def test_params_are_required(make):
    params, grads, _ = trees.make()
    tx = make()
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        tx.update(grads, tx.init(params))


@every_transform
def test_an_integer_leaf_is_refused_by_name(make):
    params, grads, _ = trees.make()
    params["table"] = grads["table"] = jnp.arange(3)
    tx = make()
    with pytest.raises(ValueError, match="table has dtype int"):
        tx.init(params)
    good, _, _ = trees.make()
    with pytest.raises(ValueError, match="table has dtype int"):
        tx.update(grads, tx.init(good), params)


@every_transform
def test_no_pair_is_an_error_unless_asked_for(make):
    params = {"kernel": jnp.ones((3, 3))}
    with pytest.raises(ValueError, match="none of 1 leaves is a LoRA factor"):
        make().init(params)
    tx = make(require_pairs=False)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["kernel"].shape == (3, 3)
