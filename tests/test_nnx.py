"""Adapters on NNX: the model stays itself, only the factors train, merging changes nothing."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lorapro_jax import nnx as lora

TARGETS = r".*/?(first|second|mix)"


class Model(nnx.Module):
    """Linear, LinearGeneral over two axes both ways, and layers that cannot be adapted."""

    def __init__(self, dtype=jnp.float32, **kwargs):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(10, 6, rngs=rngs)
        kwargs = dict(kwargs, param_dtype=dtype, rngs=rngs)
        self.first = nnx.Linear(6, 12, **kwargs)
        self.mix = nnx.LinearGeneral(12, (3, 4), **kwargs)
        self.second = nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), use_bias=False, **kwargs)

    def __call__(self, x):
        return self.second(self.mix(jnp.tanh(self.first(x))))


def trained(model, seed=3):
    """`model` with b away from zero."""
    key = jax.random.key(seed)
    for _, variable in nnx.iter_graph(model):
        if isinstance(variable, nnx.LoRAParam):
            key, sub = jax.random.split(key)
            variable[...] = jax.random.normal(sub, variable.shape, variable.dtype)
    return model


def adapted(targets=TARGETS, rank=2, dtype=jnp.float32, **kwargs):
    model = Model(dtype)
    lora.add_lora(model, rank, targets=targets, rngs=nnx.Rngs(1), **kwargs)
    return trained(model)


def inputs(dtype=jnp.float32, rows=(4, 5)):
    return jax.random.normal(jax.random.key(9), (*rows, 6), dtype)


def test_adapting_changes_no_output_and_no_path():
    plain, model = Model(), Model()
    lora.add_lora(model, targets=TARGETS, rngs=nnx.Rngs(1))
    np.testing.assert_allclose(model(inputs()), plain(inputs()), rtol=1e-6, atol=1e-6)
    params = nnx.state(model, lambda path, v: isinstance(v, nnx.Param) and "lora" not in path[-1])
    assert jax.tree.structure(params) == jax.tree.structure(nnx.state(plain, nnx.Param))
    assert isinstance(model.first, nnx.Linear)
    assert isinstance(model.mix, nnx.LinearGeneral)


def test_factors_are_flattened_pairs_of_the_kernel():
    shapes = jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(adapted(), nnx.LoRAParam)))
    assert shapes == {
        "first": {"lora_a": (6, 2), "lora_b": (2, 12)},
        "mix": {"lora_a": (12, 2), "lora_b": (2, 12)},
        "second": {"lora_a": (12, 2), "lora_b": (2, 5)},
    }


@pytest.mark.parametrize("rows", [(1,), (4, 5), (64,)])
def test_a_linear_is_flax_s_own_lora(rows, x64):
    model = adapted("first", dtype=jnp.float64, alpha=2.0)  # s = 1, flax's
    twin = nnx.LoRALinear(
        6, 12, lora_rank=2, param_dtype=jnp.float64, lora_param_dtype=jnp.float64, rngs=nnx.Rngs(5)
    )
    twin.kernel[...], twin.bias[...] = model.first.kernel[...], model.first.bias[...]
    twin.lora.lora_a[...], twin.lora.lora_b[...] = model.first.lora_a[...], model.first.lora_b[...]
    x = inputs(jnp.float64, rows)
    np.testing.assert_allclose(model.first(x), twin(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [(1,), (4, 5), (64,)])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-12)])
def test_merging_changes_the_class_back_and_no_output(rows, dtype, tolerance, request):
    if dtype == "float64":
        request.getfixturevalue("x64")
    model, x = adapted(dtype=dtype), inputs(dtype, rows)
    before = model(x)
    lora.merge_lora(model)
    np.testing.assert_allclose(model(x), before, rtol=tolerance, atol=tolerance)
    assert type(model.first) is nnx.Linear
    assert type(model.mix) is nnx.LinearGeneral
    plain = nnx.split(Model(dtype))[0]
    assert nnx.split(model)[0] == plain


@pytest.mark.parametrize(("rslora", "scale"), [(False, 4.0), (True, 8.0)])
def test_scale_is_static(rslora, scale):
    model = adapted(rank=4, alpha=16.0, rslora=rslora)
    assert model.first.lora_scale == scale
    assert all(leaf.ndim == 2 for leaf in jax.tree.leaves(nnx.state(model, nnx.LoRAParam)))


@pytest.mark.parametrize("rows", [(2,), (64,)])
def test_gradients_are_the_dense_formula_s(rows, x64):
    model, x = adapted("first", dtype=jnp.float64), inputs(jnp.float64, rows)
    layer = model.first
    kernel, bias, scale = layer.kernel[...], layer.bias[...], layer.lora_scale

    def dense(a, b):
        return jnp.sum(jnp.sin(x @ (kernel + scale * a @ b) + bias[None, :]))

    grads = nnx.grad(lambda m: jnp.sum(jnp.sin(m(x))), argnums=nnx.DiffState(0, nnx.LoRAParam))(
        layer
    )
    expected = jax.grad(dense, (0, 1))(layer.lora_a[...], layer.lora_b[...])
    np.testing.assert_allclose(grads["lora_a"][...], expected[0], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(grads["lora_b"][...], expected[1], rtol=1e-12, atol=1e-12)


def test_only_the_factors_train_in_a_jitted_nnx_loop():
    model, x = adapted(), inputs()
    before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(model)))
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.LoRAParam)

    @nnx.jit
    def step(model, optimizer):
        grad = nnx.value_and_grad(
            lambda m: jnp.mean(m(x) ** 2), argnums=nnx.DiffState(0, nnx.LoRAParam)
        )
        loss, grads = grad(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True)
    after = nnx.to_pure_dict(nnx.state(model))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), before, after)
    assert moved["first"] == {"bias": False, "kernel": False, "lora_a": True, "lora_b": True}


def test_clone_split_and_merge_keep_the_adapter():
    model, x = adapted(), inputs()
    twins = [nnx.clone(model), nnx.merge(*nnx.split(model, nnx.LoRAParam, ...))]
    for twin in twins:
        np.testing.assert_array_equal(twin(x), model(x))
        assert twin.first.lora_scale == model.first.lora_scale


def test_dropout_acts_on_the_adapter_s_input_only_and_in_training_only():
    model, x = adapted("first", dropout=0.5), inputs()
    layer = model.first
    plain = Model().first(x)
    layer.eval()
    whole = layer(x)
    layer.train()
    drawn = jnp.stack([layer(x) for _ in range(400)])
    assert (drawn[0] != drawn[1]).any()
    error = drawn.std(axis=0) / math.sqrt(400)
    assert (jnp.abs(drawn.mean(axis=0) - whole) < 6 * error + 1e-5).all()
    layer.lora_b[...] = jnp.zeros_like(layer.lora_b[...])
    np.testing.assert_allclose(layer(x), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("custom", ["precision", "dot_general", "bfloat16", "preferred"])
def test_a_layer_s_own_arithmetic_is_kept(custom):
    calls = []

    def dot_general(*args, **kwargs):
        calls.append(args[0].shape)
        return jax.lax.dot_general(*args, **kwargs)

    options = {
        "precision": {"precision": jax.lax.Precision.HIGHEST},
        "dot_general": {"dot_general": dot_general},
        "bfloat16": {"dtype": jnp.bfloat16},
        "preferred": {"preferred_element_type": jnp.float32},
    }[custom]
    plain, model = Model(**options), Model(**options)
    lora.add_lora(model, 2, targets=TARGETS, rngs=nnx.Rngs(1))
    x = inputs(rows=(64,))
    np.testing.assert_array_equal(model(x), plain(x))
    assert model(x).dtype == plain(x).dtype
    assert bool(calls) == (custom == "dot_general")


def test_factor_dtype_is_a_choice_and_float32_for_a_bfloat16_kernel():
    assert adapted(dtype=jnp.bfloat16).first.lora_a.dtype == jnp.float32
    assert adapted(dtype=jnp.float32, **{}).first.lora_b.dtype == jnp.float32
    model = Model()
    lora.add_lora(model, targets="first", dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    assert model.first.lora_a.dtype == model.first.lora_b.dtype == jnp.bfloat16
    assert model(inputs()).dtype == jnp.float32


def test_two_patterns_can_be_adapted_in_turn_with_their_own_rank():
    model = adapted("first", rank=2)
    lora.add_lora(model, 3, targets="mix", rngs=nnx.Rngs(1))
    assert (model.first.lora_a.shape[1], model.mix.lora_a.shape[1]) == (2, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "frist"}, "targets 'frist' matches none.*first"),
        ({"targets": "embed"}, "'embed' is a Embed; supported are exactly nnx.Linear"),
        ({"rank": 0}, "rank is 0"),
        ({"rank": True}, "rank is True"),
        ({"alpha": 0.0}, "alpha must be positive and finite, not 0.0"),
        ({"alpha": math.nan}, "alpha must be positive and finite, not nan"),
        ({"alpha": -1}, "alpha must be positive and finite, not -1"),
        ({"dropout": 1.0}, "dropout is 1.0"),
        ({"dropout": -0.1}, "dropout is -0.1"),
        ({"dtype": jnp.int8}, "dtype is int8"),
    ],
)
def test_bad_arguments_leave_the_model_unchanged(options, message):
    model = Model()
    before = nnx.split(model)[0]
    with pytest.raises(ValueError, match=message):
        lora.add_lora(model, **{"targets": TARGETS, "rngs": nnx.Rngs(1)} | options)
    assert nnx.split(model)[0] == before


def test_adapting_twice_and_merging_nothing_are_errors():
    model = adapted("first")
    with pytest.raises(ValueError, match="first has an adapter already"):
        lora.add_lora(model, targets="first|mix", rngs=nnx.Rngs(1))
    assert type(model.mix) is nnx.LinearGeneral
    with pytest.raises(ValueError, match="no adapter to merge"):
        lora.merge_lora(Model())


def test_kernels_that_are_more_than_one_matrix_are_errors():
    batched = nnx.LinearGeneral(4, 5, batch_axis={0: 2}, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="batch_axis"):
        lora.add_lora(batched, targets="", rngs=nnx.Rngs(1))
    stacked = nnx.vmap(lambda rngs: nnx.Linear(3, 4, rngs=rngs))(nnx.Rngs(0).split(2))
    with pytest.raises(ValueError, match=r"shape \(2, 3, 4\).*nnx.vmap"):
        lora.add_lora(stacked, targets="", rngs=nnx.Rngs(1))
