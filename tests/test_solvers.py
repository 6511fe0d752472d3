"""Both routes to the closed form: the same damped solution, and what float32 leaves of it."""

import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import two_cores

from lorapro_jax import _lapack, _orthogonal, _solve

S = 2.0
SOLVERS = {"gram": _solve.solve, "qr": _orthogonal.solve}
EPS = float(np.finfo(np.float32).eps)

both = pytest.mark.parametrize("solver", SOLVERS)


def solve(solver, a, b, G, damping=0.0, x="sylvester", dtype=None):
    h_a, h_b = oracle.factor_gradients(a, b, G, S)
    arguments = (jnp.asarray(y, dtype) for y in (a, b, h_a, h_b, S, damping))
    found = jax.jit(SOLVERS[solver], static_argnums=6)(*arguments, x)
    return tuple(np.asarray(y, np.float64) for y in found)


def step(a, b, da, db):
    return S * (da @ b + a @ db)


def graded(rng, m, r, n, kappa, which, shape):
    """Factors of condition number kappa, exact in float32, in bases that no axis is aligned with.

    Singular values in a geometric series or in two clusters, of a, of b or of both.
    """
    steep = np.geomspace(1, 1 / kappa, r)
    if shape == "clusters":
        steep = np.where(np.arange(r) < r // 2, 1.0, 1 / kappa)

    def factor(rows, values):
        frame, turn = (np.linalg.qr(rng.normal(size=(k, r)))[0] for k in (rows, r))
        return (frame * values @ turn).astype(np.float32).astype(np.float64)

    a = factor(m, steep if which != "b" else np.ones(r))
    b = factor(n, steep if which != "a" else np.ones(r)).T
    return a, b, rng.normal(size=(m, n))


def projection(a, b, G):
    """As the oracle's, from singular vectors: its pinv cuts off at 1e-15, too near 1 / kappa²."""
    A, B = np.linalg.svd(a, full_matrices=False)[0], np.linalg.svd(b, full_matrices=False)[2]
    rows = A @ (A.T @ G)
    return rows + (G - rows) @ B.T @ B


def damped_step(a, b, G, damping):
    """g~ of the damped solution, from the singular value decompositions of float64."""
    A, p, _ = np.linalg.svd(a, full_matrices=False)
    _, q, B = np.linalg.svd(b, full_matrices=False)
    p, q, lam = (p**2)[:, None], (q**2)[None, :], oracle.damping_of(a, b, damping)
    rows, columns = A.T @ G, G @ B.T
    core = A.T @ columns
    left = p / (p + lam) * (rows - core @ B)
    right = q / (q + lam) * (columns - A @ core)
    return A @ left + right @ B + A @ ((p + q) / (p + q + lam) * core) @ B


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@both
@pytest.mark.parametrize("damping", [1e-4, 1e-2, 1.0])
@pytest.mark.parametrize(
    "deficiency",
    [{}, {"rank_a": 2}, {"rank_b": 1}, {"rank_a": 3, "rank_b": 2}, {"rank_b": 0}, {"rank_a": 0}],
    ids=str,
)
def test_both_are_the_dense_damped_solve(x64, rng, solver, damping, deficiency):
    a, b, G = oracle.pair(rng, 11, 4, 8, **deficiency)
    found = solve(solver, a, b, G, damping)
    for ours, theirs in zip(found, oracle.damped_solution(a, b, G, S, damping), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@both
@pytest.mark.parametrize(("m", "r", "n"), [(3, 5, 8), (9, 6, 4), (2, 7, 3), (1, 1, 1), (6, 6, 6)])
def test_a_rank_above_the_sides_needs_no_special_case(x64, rng, solver, m, r, n):
    a, b, G = oracle.pair(rng, m, r, n)
    found = solve(solver, a, b, G, 1e-3)
    for ours, theirs in zip(found, oracle.damped_solution(a, b, G, S, 1e-3), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("x", _solve.CHOICES)
@pytest.mark.parametrize("damping", [1e-3, 1e-1])
def test_every_choice_of_x_is_the_grams(x64, rng, x, damping):
    a, b, G = oracle.pair(rng, 13, 4, 9)
    gram, qr = (solve(solver, a, b, G, damping, x) for solver in SOLVERS)
    for ours, theirs in zip(qr, gram, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-10)


@pytest.mark.parametrize("x", _solve.CHOICES)
def test_every_choice_of_x_has_the_step_of_the_projection(x64, rng, x):
    a, b, G = oracle.pair(rng, 13, 4, 9)
    g = step(a, b, *solve("qr", a, b, G, x=x))
    np.testing.assert_allclose(g, oracle.projection(a, b, G), atol=1e-10)


@pytest.mark.parametrize("ranks", [(4, 4), (2, 4), (4, 1), (2, 3), (4, 0), (0, 4), (0, 0)], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 2e-5)])
def test_without_damping_qr_is_the_pseudo_inverse(x64, rng, ranks, dtype, tolerance):
    """J⁺ G, the minimum-norm solution, of factors of any rank: λ = 0 divides nothing by zero."""
    a, b, G = oracle.pair(rng, 20, 4, 16, rank_a=ranks[0], rank_b=ranks[1])
    expected = oracle.minimum_norm_solution(a, b, G, S)
    scale = max(np.linalg.norm(y) for y in expected) + 1
    for ours, theirs in zip(solve("qr", a, b, G, dtype=dtype), expected, strict=True):
        assert np.linalg.norm(ours - theirs) <= tolerance * scale


KAPPAS = np.geomspace(1e1, 1e6, 6)


@pytest.mark.parametrize("which", ["both", "a", "b"])
@pytest.mark.parametrize("shape", ["geometric", "clusters"])
@pytest.mark.parametrize("kappa", KAPPAS)
def test_float32_error_of_qr_grows_as_the_condition_number(rng, kappa, which, shape):
    """Bound: 6 κ eps of the projection's norm (0.3 to 3 is measured), without damping."""
    a, b, G = graded(rng, 96, 8, 64, kappa, which, shape)
    expected = projection(a, b, G)
    error = step(a, b, *solve("qr", a, b, G, dtype=np.float32)) - expected
    assert np.linalg.norm(error) <= 6 * kappa * EPS * np.linalg.norm(expected)


@pytest.mark.parametrize("which", ["both", "a", "b"])
def test_float32_error_of_grams_grows_as_its_square(rng, which):
    """What the other route is for: hundredfold from κ = 10 to 100 here, tenfold there."""
    growth = {}
    for solver in SOLVERS:
        errors = []
        for kappa in (10.0, 100.0):
            a, b, G = graded(rng, 96, 8, 64, kappa, which, "clusters")
            errors.append(np.linalg.norm(
                step(a, b, *solve(solver, a, b, G, dtype=np.float32)) - projection(a, b, G)
            ))  # fmt: skip
        growth[solver] = errors[1] / errors[0]
    assert growth["gram"] > 40
    assert growth["qr"] < 25


@pytest.mark.parametrize("damping", [1e-10, 1e-8, 1e-6, 1e-4])
@pytest.mark.parametrize("which", ["both", "a", "b"])
def test_damping_bounds_the_float32_error_whatever_the_condition(rng, which, damping):
    """At κ = 1e6 the damped solution is right to 6 eps / sqrt(damping): for Grams eps / damping."""
    a, b, G = graded(rng, 96, 8, 64, 1e6, which, "geometric")
    expected = damped_step(a, b, G, damping)
    error = step(a, b, *solve("qr", a, b, G, damping, dtype=np.float32)) - expected
    assert np.linalg.norm(error) <= 6 * EPS / np.sqrt(damping) * np.linalg.norm(expected)


def test_the_truth_of_the_last_test_is_the_dense_one(x64, rng):
    a, b, G = oracle.pair(rng, 11, 4, 8)
    g = step(a, b, *oracle.damped_solution(a, b, G, S, 1e-2))
    np.testing.assert_allclose(damped_step(a, b, G, 1e-2), g, atol=1e-10)


def test_factors_of_very_different_size_are_right_to_float32(rng):
    """An early step: b is 1e-4 of a, and both are well conditioned."""
    a, b, G = oracle.pair(rng, 96, 8, 64)
    b = b * 1e-4
    expected = oracle.projection(a, b, G)
    error = step(a, b, *solve("qr", a, b, G, dtype=np.float32)) - expected
    assert np.linalg.norm(error) <= 20 * EPS * np.linalg.norm(expected)


@pytest.mark.parametrize("damping", [0.0, 1e-30, 1e-14, 1e-6])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-18, 1e18])
def test_any_size_of_b_stays_finite_in_float32(rng, size, damping):
    a, b, G = oracle.pair(rng, 20, 4, 16)
    for x in _solve.CHOICES:
        for update in solve("qr", a, b * size, G, damping, x, np.float32):
            assert np.all(np.isfinite(update))


@both
@pytest.mark.parametrize("r", [1, 2, 8, 33])
def test_batches_and_scans_give_what_single_pairs_give(x64, rng, solver, r):
    cases = [oracle.pair(rng, r + 9, r, r + 3) for _ in range(5)]
    inputs = tuple(
        jnp.stack(y)
        for y in zip(
            *[(a, b, *oracle.factor_gradients(a, b, G, S)) for a, b, G in cases], strict=True
        )
    )
    one = functools.partial(SOLVERS[solver], s=jnp.asarray(S), damping=jnp.asarray(1e-3))
    batched = jax.jit(jax.vmap(one))(*inputs)
    twice = jax.jit(jax.vmap(jax.vmap(one)))(*(y[None] for y in inputs))
    _, scanned = jax.jit(lambda ys: jax.lax.scan(lambda c, y: (c, one(*y)), 0, ys))(inputs)
    for i, (a, b, G) in enumerate(cases):
        expected = damped_step(a, b, G, 1e-3)
        for da, db in (batched, scanned, [y[0] for y in twice]):
            np.testing.assert_allclose(
                step(a, b, np.asarray(da[i]), np.asarray(db[i])), expected, atol=1e-9
            )


@both
def test_factors_with_several_axes_are_the_flattened_pair(x64, rng, solver):
    a, b, G = oracle.pair(rng, 12, 3, 20)
    h_a, h_b = oracle.factor_gradients(a, b, G, S)
    shaped = (
        a.reshape(3, 4, 3), b.reshape(3, 5, 2, 2), h_a.reshape(3, 4, 3), h_b.reshape(3, 5, 2, 2)
    )  # fmt: skip
    da, db = SOLVERS[solver](*map(jnp.asarray, (*shaped, S, 1e-3)))
    assert da.shape == (3, 4, 3)
    assert db.shape == (3, 5, 2, 2)
    flat_da, flat_db = oracle.damped_solution(a, b, G, S, 1e-3)
    np.testing.assert_allclose(da.reshape(12, 3), flat_da, atol=1e-10)
    np.testing.assert_allclose(db.reshape(3, 20), flat_db, atol=1e-10)


def test_an_unknown_choice_is_refused(rng):
    a, b, G = oracle.pair(rng, 5, 2, 4)
    with pytest.raises(ValueError, match="x must be one of sylvester, zero, symmetric"):
        solve("qr", a, b, G, x="newton")


def test_a_batch_of_batches_has_the_singular_vectors_of_each(x64, rng):
    for shape in [(3, 5, 2, 16, 16), (7, 4, 4), (2, 33, 33)]:
        y = rng.normal(size=shape)
        f = _lapack.svd
        for _ in shape[:-3]:
            f = jax.vmap(f)
        W, values, Zt = jax.jit(f)(y)
        np.testing.assert_allclose(values, np.linalg.svd(y, compute_uv=False), rtol=1e-10)
        np.testing.assert_allclose((W * values[..., None, :]) @ Zt, y, atol=1e-10)


def assert_decomposed(x, values, vectors):
    np.testing.assert_allclose(values, np.linalg.eigvalsh(x), atol=1e-12)
    again = (vectors * values[:, None, :]) @ np.swapaxes(vectors, 1, 2)
    np.testing.assert_allclose(again, x, atol=1e-12)


@pytest.mark.parametrize("count", [1, 19, 24, 125, 127, 250])  # 19 of rank 8 are one call
def test_eigenvectors_of_several_batches_are_those_of_each(x64, rng, count):
    one = rng.normal(size=(8, 8))
    several = rng.normal(size=(count, 8, 8))
    shared, batched = one + one.T, several + np.swapaxes(several, 1, 2)
    both = jax.jit(jax.vmap(lambda x, y: _lapack.eigh(x, y), (None, 0)))(shared, batched)
    for y, (values, vectors) in zip((shared, batched), both, strict=True):
        assert_decomposed(np.broadcast_to(y, (count, 8, 8)), values, vectors)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_several_batches_in_one_call_are_each_as_alone(x64, rng, count):
    """As where the eigensolver is not LAPACK's: nothing here calls it so."""
    several = [jnp.asarray(x + np.swapaxes(x, 1, 2)) for x in rng.normal(size=(count, 5, 4, 4))]
    for y, (values, vectors) in zip(
        several, _lapack._stacked(_lapack._syevd, *several), strict=True
    ):
        assert_decomposed(y, values, vectors)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cannot choose the cores here")
@pytest.mark.parametrize("rank", [16, 64])
def test_many_shapes_on_two_cores_do_not_wait_for_each_other(rank):
    """In a process of its own: what is tested for is that it ends."""
    # LAPACK's own threads have no part in it, and spin where other processes want the cores
    two_cores.run("_orthogonal", rank, rounds=10, OPENBLAS_NUM_THREADS="1")


_SHARDED = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from lorapro_jax import _orthogonal

mesh = jax.make_mesh((2, 2), ("rows", "columns"), axis_types=(AxisType.Explicit,) * 2)
jax.set_mesh(mesh)
rng = np.random.default_rng(0)
a, b, h_a, h_b = (rng.normal(size=k).astype("f") for k in [(3, 8, 2), (3, 2, 6)] * 2)
solve = lambda *y: _orthogonal.solve(*y, jnp.float32(2), jnp.float32(1e-6))
expected = jax.jit(jax.vmap(solve))(a, b, h_a, h_b)
specs = [P(None, "rows", None), P(None, None, "columns")] * 2
placed = [jax.device_put(y, NamedSharding(mesh, k)) for y, k in zip((a, b, h_a, h_b), specs)]
program = jax.jit(jax.vmap(solve)).lower(*placed).compile()
found = program(*placed)
for ours, theirs, spec in zip(found, expected, specs):
    assert ours.sharding.spec == spec, ours.sharding
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
assert "all-gather" not in program.as_text()
"""


def test_sharded_factors_are_neither_gathered_nor_moved():
    """Four devices in a process of its own, explicit mesh axes: only (r, r) sums are exchanged."""
    flags = "--xla_force_host_platform_device_count=4"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    subprocess.run([sys.executable, "-c", _SHARDED], env=environment, check=True, timeout=120)
