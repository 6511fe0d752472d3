"""The low-rank term of a linear layer against the dense formula x (a b), and its derivatives."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapro_jax import _adapter

ROWS, M, N, R = (3, 5), 7, 4, 2
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}


def operands(dtype, rows=ROWS, m=M, n=N, r=R, seed=0):
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in ((*rows, m), (m, r), (r, n))]


def dense(x, a, b):
    return jnp.einsum("...m,mn->...n", x, jnp.einsum("mr,rn->mn", a, b))


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


def test_every_derivative_is_the_dense_formulas(dtype):
    """Values and gradients, forward mode and curvature."""
    args, tangents = (tuple(operands(dtype, seed=seed)) for seed in (0, 1))

    def figures(f):
        def loss(*args):
            return jnp.sum(jnp.sin(f(*args)))

        slope = jax.grad(loss, (0, 1, 2))
        return slope(*args), jax.jvp(f, args, tangents), jax.jvp(slope, args, tangents)

    found, expected = jax.jit(figures, static_argnums=0)(_adapter.low_rank), figures(dense)
    tolerance = TOLERANCE[dtype]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=10 * tolerance),
        found,
        expected,
    )


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    r=st.integers(1, 11),
)
def test_any_shape_and_rank(rows, m, n, r):
    args = operands("float32", rows, m, n, r)
    np.testing.assert_allclose(_adapter.low_rank(*args), dense(*args), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("axis", "order"), [((-1,), (0, 1, 2)), ((1,), (0, 2, 1)), ((-1, 1), (0, 1, 2))]
)
def test_contracted_axes_come_last_in_ascending_order(axis, order):
    x = np.arange(24).reshape(2, 3, 4)
    expected = x.transpose(order)
    if len(axis) == 2:
        expected = expected.reshape(2, 12)
    np.testing.assert_array_equal(_adapter.inputs_last(jnp.asarray(x), axis), expected)


def test_a_is_kaiming_uniform_and_b_is_zero():
    m, r = 400, 64
    a, b = _adapter.init_pair(jax.random.key(0), "layer", (m, 30), r, jnp.float32)
    bound = 1 / np.sqrt(m)  # gain sqrt(1/3) of a = sqrt(5), times sqrt(3 / fan_in)
    assert np.abs(a).max() <= bound
    assert np.abs(a).max() > 0.99 * bound
    np.testing.assert_allclose(np.var(a), bound**2 / 3, rtol=0.02)
    np.testing.assert_allclose(np.mean(a), 0, atol=4 * bound / np.sqrt(3 * m * r))
    assert not b.any()


def test_the_start_depends_on_the_path_and_the_key():
    def start(seed, path):
        return _adapter.init_pair(jax.random.key(seed), path, (4, 4), 2, jnp.float32)[0]

    assert (start(0, "x") == start(0, "x")).all()
    assert (start(0, "x") != start(0, "y")).any()
    assert (start(0, "x") != start(1, "x")).any()


def test_folding_rounds_once_to_the_kernel_s_dtype():
    _, a, b = operands("float32")
    kernel = jnp.asarray(np.random.default_rng(2).normal(size=(M, N)), jnp.float32)
    folded = _adapter.fold(kernel.astype(jnp.bfloat16), a, b, 0.5)
    exact = np.asarray(kernel.astype(jnp.bfloat16), np.float64) + 0.5 * np.asarray(
        a, np.float64
    ) @ np.asarray(b, np.float64)
    assert folded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(folded, np.float64), exact, rtol=2**-8, atol=1e-6)
