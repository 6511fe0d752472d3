"""Tangent vectors by their coefficients: the dense vector they stand for, its means, its views."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from lorapro_jax import _closed_form, _solve, _tangent

S = 2.0
both = pytest.mark.parametrize("solver", _closed_form.SOLVERS)


@pytest.fixture
def rng():
    return np.random.default_rng(5)


def known(solver, a, b, G, x="sylvester", damping=0.0, dtype=jnp.float64):
    """The Tangent that a solver knows g~ by, from the projections of G."""
    form = _closed_form.ClosedForm(x, damping, solver)
    factors = [jnp.asarray(z, dtype) for z in (a, b, *oracle.factor_gradients(a, b, G, S))]
    found = form.decompose(*factors[:2])
    return form.tangent(found, *factors, jnp.asarray(S, dtype))


def dense(T):
    """The (m, n) array, in float64."""
    x, A, B, y = (np.asarray(z, np.float64) for z in (T.x, T.A, T.B, T.y))
    W = np.eye(2 * len(B)) if T.W is None else np.asarray(T.W, np.float64)
    return S * np.concatenate([x, A], axis=1) @ W @ np.concatenate([B, y], axis=0)


@both
@pytest.mark.parametrize("x", _solve.CHOICES)
@pytest.mark.parametrize(("m", "r", "n"), [(12, 4, 9), (5, 1, 7), (9, 6, 40)])
def test_it_is_the_projection_of_the_full_gradient(x64, rng, solver, x, m, r, n):
    a, b, G = oracle.pair(rng, m, r, n)
    T = known(solver, a, b, G, x)
    np.testing.assert_allclose(dense(T), oracle.projection(a, b, G), atol=1e-9)


@both
@pytest.mark.parametrize("deficiency", [{}, {"rank_a": 2}, {"rank_b": 0}, {"rank_a": 3}], ids=str)
def test_damped_it_is_the_dense_damped_solves(x64, rng, solver, deficiency):
    a, b, G = oracle.pair(rng, 11, 4, 8, **deficiency)
    da, db = oracle.damped_solution(a, b, G, S, 1e-3)
    T = known(solver, a, b, G, damping=1e-3)
    np.testing.assert_allclose(dense(T), S * (da @ b + a @ db), atol=1e-10)


@pytest.mark.parametrize(
    ("solver", "growth", "kappa"),
    [("gram", 2, 1e1), ("gram", 2, 1e2), ("gram", 2, 3e2), ("qr", 1, 1e2), ("qr", 1, 1e4)],
)
def test_its_float32_error_is_the_solvers(x64, rng, solver, growth, kappa):
    """κ² eps by Grams and κ eps by frames; ten times that, for G has entries of one."""
    values = np.geomspace(1, 1 / kappa, 6)
    a, b = (np.linalg.qr(rng.normal(size=(k, 6)))[0] * values for k in (40, 30))
    turn = np.linalg.qr(rng.normal(size=(6, 6)))[0]
    a, b = (np.float64(np.float32(z)) for z in (a @ turn, (b @ turn).T))
    G = rng.normal(size=(40, 30))
    A, B = np.linalg.qr(a)[0], np.linalg.qr(b.T)[0]
    expected = A @ A.T @ G + (G - A @ A.T @ G) @ B @ B.T
    error = dense(known(solver, a, b, G, dtype=jnp.float32)) - expected
    bound = 10 * np.finfo(np.float32).eps * kappa**growth
    assert np.linalg.norm(error) <= bound * np.linalg.norm(expected)


def arrays(rng, shape_m, shape_n, step, r=3):
    """A Tangent of random arrays, or a step as one, and two factors: all of them unrelated."""
    sizes = [(*shape_m, r), (*shape_m, r), (2 * r, 2 * r), (r, *shape_n), (r, *shape_n)]
    T = _tangent.Tangent(*(jnp.asarray(rng.normal(size=size)) for size in sizes))
    if step:
        T = _tangent.of_step(T.A, T.B, T.x, T.y)
    return T, *(jnp.asarray(rng.normal(size=size)) for size in (sizes[0], sizes[3]))


def flat(T, m, n):
    x, A = (z.reshape(m, -1) for z in (T.x, T.A))
    B, y = (z.reshape(-1, n) for z in (T.B, T.y))
    return T._replace(x=x, A=A, B=B, y=y)


SHAPES = [((14,), (10,)), ((7, 2), (5, 2)), ((3, 1, 4), (6,))]


@pytest.mark.parametrize(("m", "n"), SHAPES)
@pytest.mark.parametrize("step", [False, True])
def test_means_of_the_dense_squares(x64, rng, m, n, step):
    T, _, _ = arrays(rng, m, n, step)
    squares = dense(flat(T, np.prod(m), np.prod(n))) ** 2
    row, col = jax.jit(_tangent.mean_squares)(T, jnp.asarray(S))
    np.testing.assert_allclose(row, squares.mean(axis=1).reshape(m), rtol=1e-10)
    np.testing.assert_allclose(col, squares.mean(axis=0).reshape(n), rtol=1e-10)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("step", [False, True])
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_projections_of_the_dense_vector(x64, rng, m, n, step, scaled):
    T, a, b = arrays(rng, m, n, step)
    X = dense(flat(T, np.prod(m), np.prod(n))).reshape(*m, *n)
    scales = None
    if scaled:
        scales = tuple(jnp.asarray(rng.uniform(0.1, 9, size=size)) for size in (m, n))
        X = X * np.multiply.outer(*scales)
    h_a, h_b = jax.jit(_tangent.seen)(T, a, b, jnp.asarray(S), scales)
    k = len(m)
    np.testing.assert_allclose(
        h_a, S * np.tensordot(X, np.moveaxis(b, 0, -1), axes=len(n)), atol=1e-9
    )
    np.testing.assert_allclose(h_b, S * np.tensordot(np.moveaxis(a, -1, 0), X, axes=k), atol=1e-9)
