"""The (r, r) matrices: J of P = L Lᵀ with J = L⁻¹, and Z of P Z + Z Q = R, by products only."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from lorapro_jax import _small

RANKS = [1, 2, 8, 9, 31, 100]
EPS = {"float32": 2.0**-23, "float64": 2.0**-52}
dtypes = pytest.mark.parametrize("dtype", EPS)


@pytest.fixture(autouse=True)
def rng(request):
    if "float64" in request.node.name:
        request.getfixturevalue("x64")
    return np.random.default_rng(5)


def grams(rng, r, kappas, rank=None):
    """Positive semidefinite matrices of trace about 1, one for each κ."""
    rank = r if rank is None else rank
    return np.stack(
        [
            (u * np.geomspace(1, 1 / kappa, rank)) @ u.T
            for kappa in kappas
            for u in [np.linalg.qr(rng.normal(size=(r, rank)))[0]]
        ]
    )


def inverse(P, floor):
    return jax.jit(jax.vmap(_small.inverse_cholesky, (0, None)))(P, floor)


@pytest.mark.float32
@dtypes
@pytest.mark.parametrize("r", [*RANKS, pytest.param(300, marks=pytest.mark.slow)])
def test_it_is_the_inverse_of_choleskys_factor(rng, r, dtype):
    P = grams(rng, r, [1, 10, 1e2])
    found = np.asarray(inverse(jnp.asarray(P, dtype), jnp.asarray(1e-3, dtype)))
    exact = np.linalg.inv(np.linalg.cholesky(np.float64(np.asarray(jnp.asarray(P, dtype)))))
    assert not np.any(np.triu(found, 1))
    error = np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(exact, axis=(1, 2))
    assert np.all(error < 8 * EPS[dtype] * np.array([1, 10, 1e2]) * np.sqrt(r))


@pytest.mark.float32
@pytest.mark.parametrize(("r", "rank"), [(8, 2), (16, 8), (16, 15), (64, 8), (100, 60)])
def test_eight_roundings_of_damping_suffice_for_any_gram(rng, r, rank):
    """||J|| <= 1 / sqrt(λ) up to a half, for deficient factors' Grams as float32 has them."""
    pairs = 4000 if r <= 16 else 200
    u, v = (np.linalg.qr(rng.normal(size=(pairs, k, rank)))[0] for k in (r, rank))
    values = np.geomspace(1, 10.0 ** -rng.uniform(0, 4, pairs), rank, axis=1)
    b = jnp.asarray((u * values[:, None]) @ np.swapaxes(v, 1, 2), jnp.float32)

    @jax.jit
    @jax.vmap
    def size(b):
        P = jnp.matmul(b, b.T, precision="highest")
        floor = 8 * EPS["float32"] * jnp.trace(P)
        J = _small.inverse_cholesky(P + floor * jnp.eye(r, dtype=P.dtype), floor)
        return jnp.linalg.norm(J @ jnp.ones(r, J.dtype)) * jnp.sqrt(floor / r)

    assert np.max(size(b)) < 1.5


@pytest.mark.parametrize("r", [1, 5, 64])
def test_matrices_of_zeros_give_the_floors_root(rng, r):
    J = inverse(1e-6 * jnp.eye(r, dtype=jnp.float32)[None], jnp.float32(1e-6))
    np.testing.assert_allclose(J[0], 1e3 * np.eye(r), rtol=1e-6)


@dtypes
@pytest.mark.parametrize("r", [1, 3, 8, 24])
def test_sylvesters_equation_is_solved_as_scipy_does(rng, r, dtype):
    kappas = [(1, 1), (1e2, 1), (1e2, 1e2), (1, 1e3)]
    P, Q = (grams(rng, r, column) for column in zip(*kappas, strict=True))
    R = rng.normal(size=P.shape)
    P, Q, R = (np.float64(np.asarray(jnp.asarray(x, dtype))) for x in (P, Q, R))
    solve = jax.jit(jax.vmap(_small.sylvester, (0, 0, 0, None)))
    found = solve(*(jnp.asarray(x, dtype) for x in (P, Q, R)), jnp.asarray(1e-3, dtype))
    for Z, *of, kappa in zip(found, P, Q, R, kappas, strict=True):
        exact = scipy.linalg.solve_sylvester(*of)
        bound = 100 * EPS[dtype] * max(kappa)
        assert np.linalg.norm(Z - exact) <= bound * np.linalg.norm(exact), kappa


@pytest.mark.parametrize("r", [1, 8, 64])
@pytest.mark.parametrize("name", ["inverse_cholesky", "sylvester"])
def test_no_custom_call_is_compiled(rng, name, r):
    P = jnp.ones((4, r, r), jnp.float32)
    arguments = {"inverse_cholesky": (P, P[:, 0, 0]), "sylvester": (P, P, P, P[:, 0, 0])}[name]
    text = jax.jit(jax.vmap(getattr(_small, name))).lower(*arguments).compile().as_text()
    assert "custom-call" not in text
