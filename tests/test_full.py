"""Full mode by blocks of rows: a dense Adam's steps, whatever the block, in a block's memory."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from trees import SCALE

import lorapro_jax as lp
from lorapro_jax import _full

R, STEPS = 2, 4
# m, n, batch; the first m axis is 13, a prime, or 12
CASES = {
    "prime rows": ((13,), (5,), ()),
    "even rows": ((12,), (5,), ()),
    "several axes": ((13, 2), (3, 2), ()),
    "batch": ((13,), (5,), (3,)),
    "two batch axes, several axes": ((12, 2), (3, 2), (2, 3)),
}
ROWS = (1, 3, 4, 5, 12, 100)  # of a block
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def cut(monkeypatch, case, rows, itemsize):
    """Blocks of that many rows of the first m axis."""
    (_, *rest), n, _ = case
    monkeypatch.setattr(_full, "_CPU_BLOCK", rows * int(np.prod([*rest, *n])) * itemsize)
    monkeypatch.setattr(_full, "_ROWS_PER_RANK", 0)


def layout(batch, m):
    axes = tuple(range(len(batch)))
    dims = lp.LoRADimensionNumbers(
        a_rank=len(batch) + len(m), b_rank=len(batch), a_batch=axes, b_batch=axes
    )
    return lp.layouts.FLAX.declare({"q.*": dims})


def random(case, seed, pairs):
    """[(a, b, G)] of flat pairs, `pairs` times the batch's, in float64."""
    m, n, batch = case
    rng = np.random.default_rng(seed)
    count = pairs * int(np.prod(batch))
    return [oracle.pair(rng, int(np.prod(m)), R, int(np.prod(n))) for _ in range(count)]


def tree(case, flat, dtype):
    """Pairs q0, q1, ... of the case's shape from flat (a, b)."""
    m, n, batch = case
    size = int(np.prod(batch))
    result = {}
    for k in range(len(flat) // size):
        a, b = (np.stack(x) for x in zip(*flat[k * size : (k + 1) * size], strict=True))
        a, b = a.reshape(*batch, *m, R), b.reshape(*batch, R, *n)
        result[f"q{k}"] = {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}
    return result


def run(case, dtype=None, mu_dtype=None, pairs=1):
    """(directions of the last step, state) after some steps at fixed factors."""
    factors = [(a, b) for a, b, _ in random(case, 0, pairs)]
    tx = lp.scale_by_lorapro_adam(
        SCALE, mode="full", damping=0.0, mu_dtype=mu_dtype, layout=layout(case[2], case[0])
    )
    params = tree(case, factors, dtype)
    state, update, updates = tx.init(params), jax.jit(tx.update), None
    for seed in range(1, STEPS + 1):
        slopes = [
            oracle.factor_gradients(a, b, G, SCALE)
            for (a, b), (_, _, G) in zip(factors, random(case, seed, pairs), strict=True)
        ]
        updates, state = update(tree(case, slopes, dtype), state, params)
    return updates, state


def truth(case, pairs=1):
    """The same by a dense numpy Adam on the projected gradient: [(da, db, m, v)]."""
    result = []
    gradients = [random(case, seed, pairs) for seed in range(1, STEPS + 1)]
    for i, (a, b, _) in enumerate(random(case, 0, pairs)):
        adam, U = oracle.Adam((len(a), b.shape[1])), None
        for step in gradients:
            U = adam(oracle.projection(a, b, step[i][2]))
        da, db = oracle.minimum_norm_solution(a, b, U, SCALE)
        result.append((da, db, adam.m, adam.v))
    return result


def flattened(case, updates, state):
    """[(da, db, m, v)] as of `truth`."""
    m, n, batch = case
    rows, cols, size = (int(np.prod(x)) for x in (m, n, batch))
    mu, nu = (np.asarray(x["q0"], np.float64).reshape(-1, rows, cols) for x in (state.mu, state.nu))
    result = []
    for k, node in enumerate(updates.values()):
        a = np.asarray(node["lora_a"]).reshape(size, rows, R)
        b = np.asarray(node["lora_b"]).reshape(size, R, cols)
        result += [(a[i], b[i], mu[k * size + i], nu[k * size + i]) for i in range(size)]
    return result


@every_case
@pytest.mark.parametrize("rows", ROWS)
def test_any_block_takes_a_dense_adams_steps(x64, monkeypatch, case, rows):
    """Also where the last block is a smaller one, and where there is only one."""
    cut(monkeypatch, case, rows, 8)
    for got, expected in zip(flattened(case, *run(case)), truth(case), strict=True):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * np.max(np.abs(y)))


def test_any_block_of_stacked_pairs(x64, monkeypatch):
    case = CASES["prime rows"]
    cut(monkeypatch, case, 5, 8)
    pairs = flattened(case, *run(case, pairs=3)), truth(case, pairs=3)
    assert len(pairs[1]) == 3
    for got, expected in zip(*pairs, strict=True):
        for x, y in zip(got, expected, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-10 * np.max(np.abs(y)))


@pytest.mark.parametrize("rows", [1, 5])
def test_a_bf16_first_moment_is_within_its_rounding(x64, monkeypatch, rows):
    """Each of the steps rounds by half a unit of bf16's 8 bits at most, relative to |m|'s bound."""
    case = CASES["prime rows"]
    cut(monkeypatch, case, rows, 4)
    updates, state = run(case, jnp.float32, jnp.bfloat16)
    assert (state.mu["q0"].dtype, state.nu["q0"].dtype) == (jnp.bfloat16, jnp.float32)
    ((_, _, m, v),), ((_, _, exact_m, exact_v),) = flattened(case, updates, state), truth(case)
    np.testing.assert_allclose(m, exact_m, rtol=0, atol=STEPS * 2**-9 * np.max(np.abs(exact_m)))
    np.testing.assert_allclose(v, exact_v, rtol=0, atol=1e-4 * np.max(exact_v))


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("m", [4096, 4099])
def test_temporary_memory_is_that_of_a_few_blocks(layers, m):
    """Not of a kernel, which is 64 MiB: neither g~ nor U nor a copy of a moment is there whole."""
    r, n = 8, 4096
    node = {
        "lora_a": jax.ShapeDtypeStruct((m, r), jnp.float32),
        "lora_b": jax.ShapeDtypeStruct((r, n), jnp.float32),
    }
    params = {f"layer_{i}": node for i in range(layers)}
    tx = lp.scale_by_lorapro_adam(SCALE, mode="full")
    state = jax.eval_shape(tx.init, params)
    program = jax.jit(tx.update, donate_argnums=1).lower(params, state, params).compile()
    factors = 4 * layers * r * (m + n)
    bound = 3 * _full._CPU_BLOCK + 8 * factors
    assert bound < 4 * m * n
    assert program.memory_analysis().temp_size_in_bytes < bound
