"""The adapted linear against the dense formula x (K + a b), its derivatives, and its two forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorapro_jax import _adapter

ROWS, M, N, R = (3, 5), 7, 4, 2
TOLERANCE = {"float32": 2e-5, "float64": 1e-12}
FORMS = {
    "merged": _adapter.merged,
    "low_rank": lambda x, kernel, a, b: jnp.matmul(x, kernel) + _adapter.low_rank(x, a, b),
}


def operands(dtype, rows=ROWS, m=M, n=N, r=R, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (*rows, m), (m, n), (m, r), (r, n)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def dense(x, kernel, a, b):
    return jnp.einsum("...m,mn->...n", x, kernel + jnp.einsum("mr,rn->mn", a, b))


def loss(form):
    return lambda *args: jnp.sum(jnp.sin(form(*args)))


def close(actual, expected, dtype):
    tolerance = TOLERANCE[dtype]
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance),
        actual,
        expected,
    )


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    if request.param == "float64":
        request.getfixturevalue("x64")
    return request.param


@pytest.fixture(params=list(FORMS))
def form(request):
    return FORMS[request.param]


def test_every_gradient_is_the_dense_formula_s(form, dtype):
    args = operands(dtype)
    argnums = (0, 1, 2, 3)
    got = jax.jit(jax.value_and_grad(loss(form), argnums))(*args)
    close(got, jax.value_and_grad(loss(dense), argnums)(*args), dtype)


@pytest.mark.parametrize("argnum", range(4))
def test_a_derivative_in_one_argument_alone(form, dtype, argnum):
    args = operands(dtype)
    close(jax.grad(loss(form), argnum)(*args), jax.grad(loss(dense), argnum)(*args), dtype)


def test_forward_mode_and_second_derivatives(form, dtype):
    args, tangents = operands(dtype), operands(dtype, seed=1)
    close(jax.jvp(form, args, tangents), jax.jvp(dense, args, tangents), dtype)

    def curvature(f):
        def slope(*args):
            grads = jax.grad(loss(f), (0, 1, 2, 3))(*args)
            return sum(jnp.vdot(g, t) for g, t in zip(grads, tangents, strict=True))

        return jax.grad(slope, (0, 1, 2, 3))(*args)

    close(curvature(form), curvature(dense), dtype)


def test_vmap_over_rows_and_over_factors(form, dtype):
    x, kernel, a, b = operands(dtype)
    stacked = [jnp.stack([leaf, -2 * leaf]) for leaf in (a, b)]
    for axes, args in (
        ((0, None, None, None), (x, kernel, a, b)),
        ((None, None, 0, 0), (x, kernel, *stacked)),
    ):

        def gradients(f, axes=axes, args=args):
            return jax.vmap(jax.grad(loss(f), (0, 2, 3)), axes)(*args)

        close(gradients(form), gradients(dense), dtype)


@settings(max_examples=10, deadline=None)
@given(
    rows=st.lists(st.integers(0, 4), max_size=3).map(tuple),
    m=st.integers(1, 9),
    n=st.integers(1, 9),
    r=st.integers(1, 11),
    name=st.sampled_from(list(FORMS)),
)
def test_any_shape_and_rank(rows, m, n, r, name):
    args = operands("float32", rows, m, n, r)
    np.testing.assert_allclose(FORMS[name](*args), dense(*args), rtol=1e-4, atol=1e-4)


def test_no_dense_weight_gradient_and_no_second_sum_over_the_rows():
    x, kernel, a, b = operands("float32", (64,), 16, 12)
    compiled = jax.jit(jax.grad(loss(_adapter.merged), (0, 2, 3))).lower(x, kernel, a, b).compile()
    flops = compiled.cost_analysis()["flops"]
    products = 2 * 64 * 16 * 12
    # One product forward and one backward; the dense weight gradient would be a third.
    thin = 2 * R * (64 * 16 * 2 + 64 * 12 * 2 + 16 * 12)
    assert flops < 2 * products + thin + 0.5 * products


@pytest.mark.parametrize(
    ("dtype", "rows", "expected"),
    [("float32", 8, True), ("float32", 7, False), ("bfloat16", 64, False), ("float16", 64, False)],
)
def test_the_merged_form_is_for_enough_rows_of_full_precision(dtype, rows, expected):
    on_cpu = jax.default_backend() == "cpu"
    assert _adapter.merge_pays(jnp.zeros((rows, 8), dtype)) is (expected and on_cpu)


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
    _, kernel, a, b = operands("float32")
    folded = _adapter.fold(kernel.astype(jnp.bfloat16), a, b, 0.5)
    exact = np.asarray(kernel.astype(jnp.bfloat16), np.float64) + 0.5 * np.asarray(
        a, np.float64
    ) @ np.asarray(b, np.float64)
    assert folded.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(folded, np.float64), exact, rtol=2**-8, atol=1e-6)
