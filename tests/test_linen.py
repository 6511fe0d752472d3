"""Adapters on Linen: the model's code untouched, gradients by the formula, merging is exact."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax.core import freeze, meta

from lorapro_jax import linen as lora

TARGETS = "first|mix|second"
INPUT_AXES = {"mix": 1, "second": 2}
SHAPES = {
    "first": {"lora_a": (6, 2), "lora_b": (2, 12)},
    "mix": {"lora_a": (12, 2), "lora_b": (2, 12)},
    "second": {"lora_a": (12, 2), "lora_b": (2, 5)},
}


class Model(nn.Module):
    """Dense, DenseGeneral over two axes both ways, dropout, and a method that runs one layer."""

    dtype: object = jnp.float32
    options: object = ()
    wrap: object = staticmethod(lambda layer: layer)

    def setup(self):
        options = dict(self.options, param_dtype=self.dtype)
        self.first = self.wrap(nn.Dense)(12, **options)
        self.mix = nn.DenseGeneral((3, 4), **options)
        self.second = nn.DenseGeneral(5, axis=(-2, -1), use_bias=False, **options)
        self.dropout = nn.Dropout(0.5)

    def __call__(self, x, train=False):
        x = self.dropout(jnp.tanh(self.first(x)), deterministic=not train)
        self.sow("intermediates", "hidden", x)
        return self.second(self.mix(x))

    def head(self, x):
        return self.first(x)


def inputs(dtype=jnp.float32, rows=(4, 5)):
    return jax.random.normal(jax.random.key(9), (*rows, 6), dtype)


def grown(factors, seed=3):
    """Factors with b away from zero."""
    leaves, tree = jax.tree.flatten(factors)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    drawn = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def setup(dtype=jnp.float32, targets=TARGETS, **kwargs):
    """(model, variables, factors away from their start)."""
    model = Model(dtype, **kwargs)
    variables = model.init(jax.random.key(0), inputs(dtype))
    variables = {"params": variables["params"]}
    factors = lora.init_lora(
        jax.random.key(1), variables["params"], 2, targets=targets, input_axes=INPUT_AXES
    )
    return model, variables, grown(factors)


def dense(variables, factors, scale, path="first"):
    """K + s a b of a 2-D kernel, by numpy."""
    kernel = np.asarray(meta.unbox(variables["params"])[path]["kernel"])
    pair = factors[path]
    return kernel + scale * np.asarray(pair["lora_a"]) @ np.asarray(pair["lora_b"])


def test_the_factors_are_a_pruned_tree_of_flat_pairs_and_start_at_the_model():
    model, variables, _ = setup()
    factors = lora.init_lora(
        jax.random.key(1), variables["params"], 2, targets=TARGETS, input_axes=INPUT_AXES
    )
    assert jax.tree.map(jnp.shape, factors) == SHAPES
    y = lora.apply_with_lora(model, variables, factors, inputs())
    np.testing.assert_allclose(y, model.apply(variables, inputs()), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", [(1,), (4, 5), (64,)])
def test_a_dense_is_the_dense_formula(rows, x64):
    model, variables, factors = setup(jnp.float64, "first")
    x = inputs(jnp.float64, rows)
    y = lora.apply_with_lora(model, variables, factors, x, scale=0.7, method="head")
    expected = np.asarray(x) @ dense(variables, factors, 0.7)
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(1,), (4, 5), (64,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-12)])
def test_merged_and_unmerged_agree(rows, dtype, tolerance, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    model, variables, factors = setup(dtype)
    x = inputs(dtype, rows)
    y = lora.apply_with_lora(model, variables, factors, x, scale=0.5)
    merged = lora.merge_lora(variables["params"], factors, 0.5)
    expected = model.apply({"params": merged}, x)
    np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])


@pytest.mark.parametrize("rows", [(2,), (64,)])
def test_gradients_are_those_of_the_merged_kernels(rows, x64):
    model, variables, factors = setup(jnp.float64)
    x = inputs(jnp.float64, rows)

    def ours(factors):
        return jnp.sum(jnp.sin(lora.apply_with_lora(model, variables, factors, x, scale=0.5)))

    def truth(factors):
        params = lora.merge_lora(variables["params"], factors, 0.5)
        return jnp.sum(jnp.sin(model.apply({"params": params}, x)))

    got, expected = jax.jit(jax.grad(ours))(factors), jax.grad(truth)(factors)
    jax.tree.map(
        lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-11, atol=1e-11), got, expected
    )


@pytest.mark.parametrize("kind", ["frozen", "boxed"])
def test_frozen_and_boxed_params(kind):
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
    model = nn.Dense(5, kernel_init=init if kind == "boxed" else nn.initializers.lecun_normal())
    variables, x = model.init(jax.random.key(0), inputs()), inputs()
    if kind == "frozen":
        variables = freeze(variables)
    factors = grown(lora.init_lora(jax.random.key(1), variables["params"], 2, targets=""))
    assert jax.tree.map(jnp.shape, factors) == {"lora_a": (6, 2), "lora_b": (2, 5)}
    merged = lora.merge_lora(variables["params"], factors, 0.5)
    assert jax.tree.structure(merged) == jax.tree.structure(variables["params"])
    y = lora.apply_with_lora(model, variables, factors, x, scale=0.5)
    np.testing.assert_allclose(y, model.apply({"params": merged}, x), rtol=1e-5, atol=1e-5)


def test_init_needs_shapes_only():
    model = Model()
    shapes = jax.eval_shape(model.init, jax.random.key(0), inputs())
    factors = lora.init_lora(jax.random.key(1), shapes["params"], 2, targets="first")
    assert jax.tree.map(jnp.shape, factors) == {"first": SHAPES["first"]}


def test_rngs_mutable_and_method_pass_through():
    model, variables, factors = setup()
    x, key = inputs(), jax.random.key(4)
    y, state = lora.apply_with_lora(
        model, variables, factors, x, train=True, rngs={"dropout": key}, mutable=["intermediates"]
    )
    merged = {"params": lora.merge_lora(variables["params"], factors, 2.0)}
    expected, expected_state = model.apply(
        merged, x, train=True, rngs={"dropout": key}, mutable=["intermediates"]
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    hidden, expected_hidden = (s["intermediates"]["hidden"][0] for s in (state, expected_state))
    np.testing.assert_allclose(hidden, expected_hidden, rtol=1e-4, atol=1e-4)


def test_scale_by_path():
    model, variables, factors = setup()
    scales = {"first": 0.5, "mix": 1.0, "second": 3.0}
    y = lora.apply_with_lora(model, variables, factors, inputs(), scale=scales.__getitem__)
    merged = lora.merge_lora(variables["params"], factors, scales.__getitem__)
    np.testing.assert_allclose(y, model.apply({"params": merged}, inputs()), rtol=1e-4, atol=1e-4)


class Activated(nn.Dense):
    """A subclass whose output is not linear: the adapter belongs inside the activation."""

    @nn.compact
    def __call__(self, inputs):
        return jnp.tanh(super().__call__(inputs))


@pytest.mark.parametrize("wrap", [nn.remat, nn.jit, lambda layer: Activated])
def test_lifted_and_derived_layers_are_adapted_once_where_they_multiply(wrap):
    model, variables, factors = setup(wrap=wrap)

    def loss(apply, factors):
        return jnp.sum(apply(factors) ** 2)

    def ours(factors):
        return lora.apply_with_lora(model, variables, factors, inputs(), scale=0.5)

    def truth(factors):
        params = lora.merge_lora(variables["params"], factors, 0.5)
        return model.apply({"params": params}, inputs())

    for f, g in (
        (ours, truth),
        (jax.grad(lambda x: loss(ours, x)), jax.grad(lambda x: loss(truth, x))),
    ):
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-3),
            f(factors),
            g(factors),
        )


@pytest.mark.parametrize("rows", [(2,), (64,)])
def test_an_inner_interceptor_still_sees_the_call(rows):
    model, variables, factors = setup(targets="first")
    seen = []

    def spy(next_call, args, kwargs, context):
        seen.append("/".join(context.module.path))
        return next_call(*args, **kwargs)

    with nn.intercept_methods(spy):
        lora.apply_with_lora(model, variables, factors, inputs(rows=rows))
    assert "first" in seen


@pytest.mark.parametrize("custom", ["precision", "dot_general", "bfloat16"])
def test_a_layer_s_own_arithmetic_is_kept(custom):
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(args[0].shape)
        return jax.lax.dot_general(*args, **kwargs)

    options = {
        "precision": {"precision": jax.lax.Precision.HIGHEST},
        "dot_general": {"dot_general": dot_general},
        "bfloat16": {"dtype": jnp.bfloat16},
    }[custom]
    model, variables, factors = setup(options=options)
    factors = jax.tree.map(jnp.zeros_like, factors)
    calls.clear()
    x = inputs(rows=(64,))
    y = lora.apply_with_lora(model, variables, factors, x)
    assert bool(calls) == (custom == "dot_general")
    expected = model.apply(variables, x)
    np.testing.assert_array_equal(y, expected)
    assert y.dtype == expected.dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "frist"}, "targets 'frist' matches none.*first"),
        ({"input_axes": None}, r"mix/kernel has shape \(12, 3, 4\).*input_axes=\{'mix': 1\}"),
        ({"input_axes": {"mix": 3, "second": 2}}, "declares 3 input axes"),
        ({"input_axes": {"mix|second": 1, "second": 2}}, "disagree"),
        ({"rank": 0}, "rank is 0"),
        ({"dtype": jnp.int8}, "dtype is int8"),
    ],
)
def test_bad_targets(options, message):
    _, variables, _ = setup()
    with pytest.raises(ValueError, match=message):
        lora.init_lora(
            jax.random.key(1),
            variables["params"],
            **{"rank": 2, "targets": TARGETS, "input_axes": INPUT_AXES} | options,
        )


def test_an_adapter_that_no_layer_used_is_an_error():
    model, variables, factors = setup()
    with pytest.raises(ValueError, match=r"ran at mix, second: .*allow_unused"):
        lora.apply_with_lora(model, variables, factors, inputs(), method="head")
    y = lora.apply_with_lora(
        model, variables, factors, inputs(), method="head", allow_unused=True, scale=0.5
    )
    bias = variables["params"]["first"]["bias"]
    expected = np.asarray(inputs()) @ dense(variables, factors, 0.5) + np.asarray(bias)[None, None]
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_scales(scale):
    model, variables, factors = setup(targets="first")
    with pytest.raises(ValueError, match="first: scale must be positive and finite"):
        lora.apply_with_lora(model, variables, factors, inputs(), scale=scale)
    with pytest.raises(ValueError, match="first: scale must be positive and finite"):
        lora.merge_lora(variables["params"], factors, scale)


def test_malformed_factors():
    model, variables, factors = setup(targets="first")
    half = {"first": {"lora_a": factors["first"]["lora_a"]}}
    with pytest.raises(ValueError, match="first has no lora_b"):
        lora.apply_with_lora(model, variables, half, inputs())
    with pytest.raises(ValueError, match="first/kernel in the lora tree is neither"):
        lora.apply_with_lora(model, variables, {"first": {"kernel": jnp.ones(2)}}, inputs())
    stacked = jax.tree.map(lambda leaf: leaf[None], factors)
    with pytest.raises(ValueError, match=r"first: the kernel \(6, 12\).*nn.scan"):
        lora.apply_with_lora(model, variables, stacked, inputs())
    with pytest.raises(ValueError, match="matches none"):
        lora.merge_lora(variables["params"], {"frist": factors["first"]}, 1.0)
    wrong = {"first": factors["first"] | {"lora_b": jnp.ones((2, 3))}}
    with pytest.raises(ValueError, match="do not make a matrix"):
        lora.merge_lora(variables["params"], wrong, 1.0)


def test_batch_dims_are_an_error():
    model, x = nn.DenseGeneral(3, axis=-1, batch_dims=(0,)), jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    factors = lora.init_lora(
        jax.random.key(1), variables["params"], 2, targets="", input_axes={"": 2}
    )
    with pytest.raises(ValueError, match="batch_dims"):
        lora.apply_with_lora(model, variables, factors, x)
