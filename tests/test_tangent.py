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
    T = jax.tree.map(lambda z: np.asarray(z, np.float64), T)
    eye = np.eye(len(T.b))
    S_a, S_b = (eye, eye) if T.S is None else T.S
    W = np.kron(np.eye(2), eye) if T.W is None else T.W
    return S * np.concatenate([T.x, T.a @ S_a], axis=1) @ W @ np.concatenate([S_b @ T.b, T.y])


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


@pytest.mark.parametrize("kappas", [(1e3, 1), (1, 1e4), (1e3, 1e3), (1e4, 1e4), (1e5, 1e5)])
def test_float32_means_have_the_error_of_what_they_are_means_of(x64, rng, kappas):
    """κ² eps, at most eps / damping: a quarter of it. Squares take the coefficients twice."""
    a, b = (np.linalg.qr(rng.normal(size=(k, 8)))[0] for k in (96, 64))
    turns = (np.linalg.qr(rng.normal(size=(8, 8)))[0] for _ in range(2))
    a, b = (
        np.float64(np.float32(z * np.geomspace(1, 1 / kappa, 8) @ turn))
        for z, kappa, turn in zip((a, b), kappas, turns, strict=True)
    )
    G, damping = rng.normal(size=(96, 64)), 1e-6
    da, db = oracle.damped_solution(a, b.T, G, S, damping)
    squares = (S * (da @ b.T + a @ db)) ** 2
    T = known("gram", a, b.T, G, damping=damping, dtype=jnp.float32)
    bound = np.finfo(np.float32).eps * min(max(kappas) ** 2, 1 / damping) / 4
    for found, axis in zip(_tangent.mean_squares(T, jnp.float32(S)), (1, 0), strict=True):
        expected = squares.mean(axis=axis)
        assert np.linalg.norm(found - expected) <= bound * np.linalg.norm(expected)


def arrays(rng, shape_m, shape_n, kind, r=3):
    """A Tangent of random arrays, or a step as one, and two factors: all of them unrelated."""
    sizes = (*shape_m, r), (*shape_m, r), (r, *shape_n), (r, *shape_n)
    x, a, b, y = (jnp.asarray(rng.normal(size=size)) for size in sizes)
    W, S_a, S_b = (jnp.asarray(rng.normal(size=(k, k))) for k in (2 * r, r, r))
    T = {
        "step": _tangent.of_step(a, b, x, y),
        "W": _tangent.Tangent(x, a, b, y, W),
        "W and S": _tangent.Tangent(x, a, b, y, W, (S_a, S_b)),
    }[kind]
    return T, *(jnp.asarray(rng.normal(size=size)) for size in sizes[1:3])


def flat(T, m, n):
    x, a = (z.reshape(m, -1) for z in (T.x, T.a))
    b, y = (z.reshape(-1, n) for z in (T.b, T.y))
    return T._replace(x=x, a=a, b=b, y=y)


every_kind = pytest.mark.parametrize("kind", ["step", "W", "W and S"])
SHAPES = [((14,), (10,)), ((7, 2), (5, 2)), ((3, 1, 4), (6,))]


@pytest.mark.parametrize(("m", "n"), SHAPES)
@every_kind
def test_means_of_the_dense_squares(x64, rng, m, n, kind):
    T, _, _ = arrays(rng, m, n, kind)
    squares = dense(flat(T, np.prod(m), np.prod(n))) ** 2
    row, col = jax.jit(_tangent.mean_squares)(T, jnp.asarray(S))
    np.testing.assert_allclose(row, squares.mean(axis=1).reshape(m), rtol=1e-10)
    np.testing.assert_allclose(col, squares.mean(axis=0).reshape(n), rtol=1e-10)


@pytest.mark.parametrize("scaled", [False, True])
@every_kind
@pytest.mark.parametrize(("m", "n"), SHAPES)
def test_projections_of_the_dense_vector(x64, rng, m, n, kind, scaled):
    T, a, b = arrays(rng, m, n, kind)
    X = dense(flat(T, np.prod(m), np.prod(n))).reshape(*m, *n)
    scales = None
    if scaled:
        scales = tuple(jnp.asarray(rng.uniform(0.1, 9, size=size)) for size in (m, n))
        X = X * np.multiply.outer(*scales)
    h_a, h_b, core = jax.jit(_tangent.seen)(T, a, b, jnp.asarray(S), scales)
    k = len(m)
    np.testing.assert_allclose(
        h_a, S * np.tensordot(X, np.moveaxis(b, 0, -1), axes=len(n)), atol=1e-9
    )
    np.testing.assert_allclose(h_b, S * np.tensordot(np.moveaxis(a, -1, 0), X, axes=k), atol=1e-9)
    np.testing.assert_allclose(core, np.tensordot(np.moveaxis(a, -1, 0), h_a, axes=k), atol=1e-8)
