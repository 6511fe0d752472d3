"""The closed form against the dense float64 oracle, its invariants, and its limits."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import two_cores
from hypothesis import example, given, settings
from hypothesis import strategies as st

from lorapro_jax import _solve

S = 2.0
TOLERANCE = 1e-10


def solve(a, b, G, s=S, damping=0.0, x="sylvester"):
    h_a, h_b = oracle.factor_gradients(a, b, G, s)
    arguments = map(jnp.asarray, (a, b, h_a, h_b, s, damping))
    return tuple(np.asarray(y) for y in jax.jit(_solve.solve, static_argnums=6)(*arguments, x))


def step(a, b, da, db, s=S):
    return s * (da @ b + a @ db)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


SHAPES = [(12, 4, 9), (5, 1, 7), (30, 8, 20), (6, 6, 11), (40, 16, 16)]


@pytest.mark.parametrize(("m", "r", "n"), SHAPES)
@pytest.mark.parametrize("x", _solve.CHOICES)
def test_the_step_is_the_projection_of_the_full_gradient(x64, rng, m, r, n, x):
    a, b, G = oracle.pair(rng, m, r, n)
    np.testing.assert_allclose(
        step(a, b, *solve(a, b, G, x=x)), oracle.projection(a, b, G), atol=TOLERANCE * 10
    )


@pytest.mark.parametrize(("m", "r", "n"), SHAPES[:3])
def test_sylvester_is_the_minimum_norm_solution(x64, rng, m, r, n):
    a, b, G = oracle.pair(rng, m, r, n)
    for ours, theirs in zip(solve(a, b, G), oracle.minimum_norm_solution(a, b, G, S), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


@pytest.mark.parametrize(("m", "r", "n"), [(12, 4, 9), (20, 8, 30)])
def test_sylvester_is_the_papers_theorem(x64, rng, m, r, n):
    """P != Q and a nonsymmetric right-hand side, where a swapped equation would show."""
    a, b, G = oracle.pair(rng, m, r, n)
    theirs = oracle.sylvester_minimiser(a, b, *oracle.factor_gradients(a, b, G, S), S)
    for ours, expected in zip(solve(a, b, G), theirs, strict=True):
        np.testing.assert_allclose(ours, expected, atol=TOLERANCE * 10)


@pytest.mark.parametrize("damping", [1e-6, 1e-3, 1.0])
@pytest.mark.parametrize(
    "deficiency",
    [{}, {"rank_a": 2}, {"rank_b": 1}, {"rank_a": 3, "rank_b": 2}, {"rank_b": 0}, {"rank_a": 0}],
    ids=str,
)
def test_damped_form_is_the_dense_damped_solve(x64, rng, damping, deficiency):
    a, b, G = oracle.pair(rng, 11, 4, 8, **deficiency)
    expected = oracle.damped_solution(a, b, G, S, damping)
    for ours, theirs in zip(solve(a, b, G, damping=damping), expected, strict=True):
        # The dense solve's own condition number is 1 / damping.
        np.testing.assert_allclose(ours, theirs, atol=1e-15 / damping + TOLERANCE)


def test_zero_b_needs_no_special_case(x64, rng):
    a, _, G = oracle.pair(rng, 12, 4, 9)
    b = np.zeros((4, 9))
    da, db = solve(a, b, G, damping=1e-6)
    np.testing.assert_array_equal(da, 0)
    ridge = a.T @ a + oracle.damping_of(a, b, 1e-6) * np.eye(4)
    np.testing.assert_allclose(db, np.linalg.solve(ridge, a.T @ G) / S, rtol=TOLERANCE)


@pytest.mark.parametrize("s", [1e-6, 0.25, 2.0, 1e6])
@pytest.mark.parametrize("dtype", ["float32", None])
def test_both_factors_zero_give_a_zero_update(s, dtype):
    a, b, s, damping = (
        jnp.asarray(x, dtype) for x in (np.zeros((6, 2)), np.zeros((2, 5)), s, 1e-6)
    )
    for update in jax.jit(_solve.solve)(a, b, a, b, s, damping):  # gradients are zeros, too
        np.testing.assert_array_equal(update, 0)


@pytest.mark.parametrize("x", _solve.CHOICES)
def test_normal_equations(x64, rng, x):
    """The residual J(da, db) - G is orthogonal to every direction the factors can take."""
    a, b, G = oracle.pair(rng, 14, 5, 10)
    residual = step(a, b, *solve(a, b, G, x=x)) - G
    for projection in oracle.factor_gradients(a, b, residual, S):
        np.testing.assert_allclose(projection, 0, atol=TOLERANCE * 100)


def test_no_other_update_comes_closer(x64, rng):
    a, b, G = oracle.pair(rng, 14, 3, 10)
    da, db = solve(a, b, G)
    best = np.linalg.norm(step(a, b, da, db) - G)
    for size in np.logspace(-6, 1, 40):
        other = da + size * rng.normal(size=da.shape), db + size * rng.normal(size=db.shape)
        assert np.linalg.norm(step(a, b, *other) - G) >= best


def test_descent_equals_the_squared_norm_of_the_step(x64, rng):
    """Theorem 2.2: <G, g~> = ||g~||² >= 0."""
    a, b, G = oracle.pair(rng, 14, 3, 10)
    g = step(a, b, *solve(a, b, G))
    np.testing.assert_allclose(np.sum(G * g), np.sum(g * g), rtol=TOLERANCE)


def test_full_rank_recovers_the_full_gradient(x64, rng):
    for m, n in [(6, 11), (11, 6), (7, 7)]:
        a, b, G = oracle.pair(rng, m, min(m, n), n)
        np.testing.assert_allclose(step(a, b, *solve(a, b, G)), G, atol=1e-8)


def test_the_step_does_not_depend_on_the_gauge(x64, rng):
    a, b, G = oracle.pair(rng, 14, 4, 10)
    R = rng.normal(size=(4, 4))
    moved = a @ R, np.linalg.inv(R) @ b
    np.testing.assert_allclose(
        step(*moved, *solve(*moved, G)), step(a, b, *solve(a, b, G)), atol=1e-9
    )


def test_symmetric_updates_move_with_the_gauge(x64, rng):
    a, b, G = oracle.pair(rng, 14, 4, 10)
    R = rng.normal(size=(4, 4))
    da, db = solve(a, b, G, x="symmetric")
    da_moved, db_moved = solve(a @ R, np.linalg.inv(R) @ b, G, x="symmetric")
    np.testing.assert_allclose(da_moved, da @ R, atol=1e-9)
    np.testing.assert_allclose(db_moved, np.linalg.inv(R) @ db, atol=1e-9)


@pytest.mark.parametrize("s", [0.01, 1.0, 2.0, 16 / np.sqrt(8), 100.0])
def test_the_optimum_does_not_depend_on_the_scale(x64, rng, s):
    a, b, G = oracle.pair(rng, 14, 4, 10)
    np.testing.assert_allclose(
        step(a, b, *solve(a, b, G, s=s), s=s), step(a, b, *solve(a, b, G)), atol=TOLERANCE
    )


@pytest.mark.parametrize("x", ["sylvester", "symmetric"])
@pytest.mark.parametrize("damping", [0.0, 1e-2])
def test_transposing_the_pair_transposes_the_answer(x64, rng, x, damping):
    a, b, G = oracle.pair(rng, 14, 4, 10)
    da, db = solve(a, b, G, damping=damping, x=x)
    db_t, da_t = solve(b.T, a.T, G.T, damping=damping, x=x)
    np.testing.assert_allclose(da_t.T, da, atol=TOLERANCE)
    np.testing.assert_allclose(db_t.T, db, atol=TOLERANCE)


@pytest.mark.parametrize("r", [1, 2, 7, 64, 256])
def test_every_rank_under_vmap_and_scan(x64, rng, r):
    """Batches and time steps give what single solves give."""
    m, n = r + 9, r + 3
    cases = [oracle.pair(rng, m, r, n) for _ in range(3)]
    inputs = [
        jnp.stack(x)
        for x in zip(
            *[(a, b, *oracle.factor_gradients(a, b, G, S)) for a, b, G in cases], strict=True
        )
    ]
    damping = jnp.asarray(1e-6)

    def one(a, b, h_a, h_b):
        return _solve.solve(a, b, h_a, h_b, jnp.asarray(S), damping)

    batched = jax.jit(jax.vmap(one))(*inputs)
    _, scanned = jax.jit(lambda xs: jax.lax.scan(lambda c, x: (c, one(*x)), 0, xs))(inputs)
    for i, (a, b, G) in enumerate(cases):
        expected = oracle.projection(a, b, G)
        for da, db in (batched, scanned):
            found = step(a, b, np.asarray(da[i]), np.asarray(db[i]))
            # damping moves each direction by at most λ over the smallest eigenvalue
            smallest = min(np.linalg.norm(a, -2), np.linalg.norm(b, -2)) ** 2
            bound = 2 * oracle.damping_of(a, b, 1e-6) / smallest
            assert np.linalg.norm(found - expected) <= max(bound, 1e-9) * np.linalg.norm(G)


# (m, r, n): r at, above and below either side, or both of them; sides and ranks of 1. One
# compilation each, so that the values are drawn more often than the shapes.
ANY_SHAPES = [
    (1, 1, 1), (1, 10, 1), (1, 3, 24), (24, 3, 1), (24, 1, 17), (5, 5, 5), (4, 9, 7), (7, 9, 4),
    (3, 7, 20), (20, 7, 3), (6, 6, 24), (24, 6, 6), (24, 10, 23), (13, 2, 24),
]  # fmt: skip


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from(ANY_SHAPES),
    damping=st.sampled_from([1e-6, 1e-3, 1e-1]),
    rank_b=st.integers(0, 10),
    seed=st.integers(0, 2**32 - 1),
)
@example(shape=(1, 10, 1), damping=1e-6, rank_b=0, seed=1377)  # P of rank 1
def test_any_shape_solves_the_damped_normal_equations(shape, damping, rank_b, seed):
    """Also r > min(m, n) and rank-deficient b: the residual of (JᵀJ + mu) z = Jᵀ G."""
    m, r, n = shape
    a, b, G = oracle.pair(np.random.default_rng(seed), m, r, n, rank_b=min(rank_b, r, n))
    da, db = solve(a, b, G, damping=damping)
    mu = S**2 * oracle.damping_of(a, b, damping)
    h = oracle.factor_gradients(a, b, G - step(a, b, da, db), S)
    scale = np.linalg.norm(G) * (np.linalg.norm(a) + np.linalg.norm(b)) + 1
    # A Gram-based solve loses the squared condition number: the largest eigenvalue over λ, which is
    # relative to the mean one. Of a P of rank 1 the largest is r times the mean.
    largest = max(np.linalg.norm(a, 2), np.linalg.norm(b, 2)) ** 2
    precision = 4 * jnp.finfo(da.dtype).eps * largest / oracle.damping_of(a, b, damping)
    for residual, update in zip(h, (da, db), strict=True):
        assert np.all(np.isfinite(update))
        assert np.linalg.norm(residual - mu * update) <= precision * scale


@pytest.mark.parametrize("kappa", [1.0, 10.0, 30.0])
def test_float32_error_grows_as_the_condition_number_squared(x64, rng, kappa):
    """Bound: 4e-7 κ² of the projection's norm, at damping 0; 1e-6 κ² more from damping 1e-6."""
    m, r, n = 96, 8, 64
    values = np.geomspace(1, 1 / kappa, r)
    a = np.linalg.qr(rng.normal(size=(m, r)))[0] * values
    b = (np.linalg.qr(rng.normal(size=(n, r)))[0] * values).T
    G = rng.normal(size=(m, n))
    expected = oracle.projection(a, b, G)
    for damping, bound in [(0.0, 4e-7), (1e-6, 1.4e-6)]:
        narrow = [np.asarray(y, np.float32) for y in (a, b, *oracle.factor_gradients(a, b, G, S))]
        da, db = _solve.solve(
            *map(jnp.asarray, narrow), jnp.float32(S), jnp.float32(damping), "sylvester"
        )
        assert da.dtype == db.dtype == jnp.float32
        error = step(a, b, np.asarray(da, np.float64), np.asarray(db, np.float64)) - expected
        assert np.linalg.norm(error) <= bound * max(kappa, 2) ** 2 * np.linalg.norm(expected)


@pytest.mark.parametrize(("rank_a", "rank_b"), [(3, 4), (4, 2), (2, 2), (4, 0)])
@pytest.mark.parametrize("damping", [0.0, 1e-6])
def test_deficient_factors_stay_finite_in_float32(rng, rank_a, rank_b, damping):
    a, b, G = (np.float32(y) for y in oracle.pair(rng, 20, 4, 16, rank_a=rank_a, rank_b=rank_b))
    h_a, h_b = (np.float32(y) for y in oracle.factor_gradients(a, b, G, S))
    for x in _solve.CHOICES:
        updates = _solve.solve(
            *map(jnp.asarray, (a, b, h_a, h_b)), jnp.float32(S), jnp.float32(damping), x
        )
        for update in updates:
            assert bool(jnp.all(jnp.isfinite(update)))


def test_factors_with_several_axes_are_the_flattened_pair(x64, rng):
    """Heads and head size, or any split of m and n, without a reshape."""
    a, b, G = oracle.pair(rng, 12, 3, 20)
    h_a, h_b = oracle.factor_gradients(a, b, G, S)
    shaped = (
        a.reshape(3, 4, 3), b.reshape(3, 5, 2, 2), h_a.reshape(3, 4, 3), h_b.reshape(3, 5, 2, 2)
    )  # fmt: skip
    da, db = _solve.solve(*map(jnp.asarray, shaped), jnp.asarray(S), jnp.asarray(0.0))
    flat_da, flat_db = solve(a, b, G)
    np.testing.assert_allclose(da.reshape(12, 3), flat_da, atol=TOLERANCE)
    np.testing.assert_allclose(db.reshape(3, 20), flat_db, atol=TOLERANCE)
    arguments = map(jnp.asarray, (shaped[0], shaped[1], da, db, S))
    g = _solve.equivalent_gradient(*arguments)
    assert g.shape == (3, 4, 5, 2, 2)


def test_project_is_what_autodiff_gives(x64, rng):
    a, b, U = oracle.pair(rng, 12, 3, 20)
    found = _solve.project(*map(jnp.asarray, (a, b, U, S)))
    loss = lambda ab: jnp.sum(jnp.asarray(U) * (S * ab[0] @ ab[1]))  # noqa: E731
    expected = jax.grad(loss)((jnp.asarray(a), jnp.asarray(b)))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=TOLERANCE)


def test_an_unknown_choice_is_refused(rng):
    a, b, G = oracle.pair(rng, 5, 2, 4)
    with pytest.raises(ValueError, match="x must be one of sylvester, zero, symmetric"):
        solve(a, b, G, x="newton")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose the cores here")
@pytest.mark.parametrize("rank", [16, 64])
def test_many_shapes_on_two_cores_do_not_wait_for_each_other(x64, rank):
    """In a process of its own, the same in both legs: what is tested for is that it ends."""
    two_cores.run("_solve", rank, rounds=15)


def test_a_batch_of_batches_has_the_eigenvectors_of_each(x64):
    x = np.random.default_rng(0).normal(size=(3, 5, 2, 16, 16))
    x = x @ np.swapaxes(x, -1, -2)
    ((values, vectors),) = jax.jit(jax.vmap(jax.vmap(_solve.eigh)))(x)
    np.testing.assert_allclose(values, np.linalg.eigvalsh(x), rtol=1e-10, atol=1e-10)
    rebuilt = (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
    np.testing.assert_allclose(rebuilt, x, rtol=1e-10, atol=1e-10)
