"""Errors at the door: what was expected, what came, where, what to do; nothing in silence."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from trees import SCALE

import lorapro_jax as lp

every_mode = pytest.mark.parametrize("mode", trees.MODES)


def tree(**shapes):
    return trees.make(shapes=shapes)[0]


def state_of(tx, params):
    return jax.eval_shape(tx.init, params)


def update(tx, state, params):
    return jax.eval_shape(tx.update, params, state, params)


# --- a state that does not fit -----------------------------------------------------------------

CHANGES = {
    "rank 2 to 3": ({"x": (6, 2, 5)}, {"x": (6, 3, 5)}),
    "rank 1 to 3": ({"x": (6, 1, 5)}, {"x": (6, 3, 5)}),
    "m 1 to 6": ({"x": (1, 2, 5)}, {"x": (6, 2, 5)}),
    "m 6 to 4": ({"x": (6, 2, 5)}, {"x": (4, 2, 5)}),
    "n 5 to 1": ({"x": (6, 2, 5)}, {"x": (6, 2, 1)}),
    "one layer's rank": (
        {"layers_0": (6, 2, 5), "layers_1": (6, 2, 5)},
        {"layers_0": (6, 2, 5), "layers_1": (6, 3, 5)},
    ),
    "a layer more": ({"layers_0": (6, 2, 5)}, {"layers_0": (6, 2, 5), "layers_1": (6, 2, 5)}),
    "a layer less": ({"layers_0": (6, 2, 5), "layers_1": (6, 2, 5)}, {"layers_0": (6, 2, 5)}),
    "two shapes become one": (
        {"x0": (6, 2, 5), "x1": (6, 2, 4)},
        {"x0": (6, 2, 5), "x1": (6, 2, 5)},
    ),
    "one shape becomes two": (
        {"x0": (6, 2, 5), "x1": (6, 2, 5)},
        {"x0": (6, 2, 5), "x1": (6, 2, 4)},
    ),
}


@pytest.mark.parametrize(
    ("mode", "change"),
    [
        (mode, change)
        for mode in trees.MODES
        for change in CHANGES
        # full mode's moments are the weight's, and go on at another rank
        if mode != "full" or not change.startswith("rank")
    ],
)
def test_a_state_of_other_pairs_names_the_group_and_both_shapes(mode, change):
    before, after = (tree(**shapes) for shapes in CHANGES[change])
    tx = trees.direction(mode)
    state = state_of(tx, before)
    message = (
        r"State\.\w+ does not fit the parameters: the state has (\(.*\)|nothing) for '(x|layers_).*"
    )
    with pytest.raises(ValueError, match=message + r"the pairs need (\(.*\)|nothing)\. .*init"):
        update(tx, state, after)


@pytest.mark.parametrize(
    ("made", "used"), [("full", "factored"), ("factored", "full"), ("muon", "full")]
)
def test_a_state_of_another_mode_names_both(made, used):
    params = tree(x=(6, 2, 5))
    state = state_of(trees.optimizer(made, 1e-3), params)
    with pytest.raises(ValueError, match=f"of {made.title()}State.* needs {used.title()}State"):
        update(lp.lorapro_adamw(1e-3, SCALE, mode=used), state, params)


# --- an empty tree -----------------------------------------------------------------------------

TRANSFORMS = {
    "lorapro": lambda **kw: lp.lorapro(SCALE, **kw),
    "minimum_norm": lambda **kw: lp.minimum_norm(**kw),
    "retract": lambda **kw: lp.retract(SCALE, **kw),
    "scale_by_lorapro_adam": lambda **kw: lp.scale_by_lorapro_adam(SCALE, **kw),
    "lorapro_adamw": lambda **kw: lp.lorapro_adamw(1e-3, SCALE, **kw),
}
every_transform = pytest.mark.parametrize("make", TRANSFORMS.values(), ids=TRANSFORMS)


@every_transform
def test_an_empty_tree_asks_whether_the_model_was_adapted(make):
    with pytest.raises(ValueError, match="tree is empty. Was the model adapted .*add_lora"):
        make().init({})
    make(require_pairs=False).init({})


@every_transform
def test_a_tree_without_a_pair_names_a_leaf_and_the_patterns(make):
    with pytest.raises(ValueError, match=r"none of 1 leaves is a LoRA factor \(such as dense/kern"):
        make().init({"dense": {"kernel": jnp.ones((3, 3))}})
    make(require_pairs=False).init({"dense": {"kernel": jnp.ones((3, 3))}})


@every_transform
def test_an_update_needs_the_parameters(make):
    params, tx = tree(x=(6, 2, 5)), make()
    with pytest.raises(ValueError, match="params"):
        tx.update(params, tx.init(params))


def test_optaxs_placeholder_is_no_empty_tree():
    tx = lp.lorapro_adamw(1e-3, SCALE)
    state = tx.init(tree(x=(6, 2, 5)))
    optax.tree.map_params(tx, lambda x: 2 * x, state)


# --- numbers -----------------------------------------------------------------------------------

NUMBERS = [
    ("b1", 1.0), ("b2", 1.0), ("b1", 1 - 1e-9), ("b2", 1 - 1e-9), ("b1", -0.1), ("eps", -1.0),
    ("b2", float("nan")), ("damping", -1e-6), ("damping", float("inf")), ("floor", -1.0),
    ("radius", -1.0), ("clipping_threshold", 0.0), ("learning_rate", -1.0), ("weight_decay", -1.0),
    ("scale", 0.0), ("scale", -2.0), ("scale", 1e20), ("scale", 1e-20), ("scale", float("nan")),
    ("scale", float("inf")), ("scale", 2**70),
]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), NUMBERS)
@pytest.mark.parametrize("kind", [np.float64, jnp.float32], ids=["float", "jax"])
def test_a_number_out_of_range_is_refused_by_name(name, value, kind):
    numbers = {"learning_rate": 1e-3, "scale": SCALE, name: kind(value)}
    with pytest.raises(ValueError, match=name):
        lp.lorapro_adamw(**numbers)


def test_a_callables_scale_is_refused_with_the_pairs_path():
    params = tree(x=(6, 2, 5))
    with pytest.raises(ValueError, match="x: scale must be positive"):
        update(lp.lorapro(lambda path: 0.0), optax.EmptyState(), params)


@pytest.mark.parametrize("mode", ["efficient", "qr", None])
def test_an_unknown_mode_lists_the_known_ones(mode):
    with pytest.raises((ValueError, TypeError), match="factored, full|mode"):
        lp.scale_by_lorapro_adam(SCALE, mode=mode)


@every_mode
def test_concrete_jax_arrays_are_numbers_under_jit(mode):
    """16 / jnp.sqrt(8) is how people write rsLoRA; traced numbers pass unseen."""
    params, grads, _ = trees.make(shapes={"x": (6, 2, 5)})

    def step(make, params, grads):
        tx = make()
        return tx.update(grads, tx.init(params), params)[0]

    numbers = {
        "rate": 1e-3, "scale": 16 / 8**0.5, "damping": 1e-5, "weight_decay": 0.1, "radius": 0.1
    }  # fmt: skip
    if mode == "muon":
        numbers |= {"beta": 0.9, "rms": 0.1, "adam_b1": 0.8, "adam_b2": 0.99, "adam_eps": 1e-7}
    else:
        numbers |= {"b1": 0.9, "b2": 0.99, "eps": 1e-7, "floor": 0.02, "clipping_threshold": 0.9}

    @jax.jit
    def concrete(params, grads):
        given = {k: jnp.asarray(v) for k, v in numbers.items()} | {"scale": 16 / jnp.sqrt(8)}
        return step(lambda: trees.optimizer(mode, **given), params, grads)

    @jax.jit
    def traced(given, params, grads):
        return step(lambda: trees.optimizer(mode, **given), params, grads)

    expected = jax.jit(functools.partial(step, lambda: trees.optimizer(mode, **numbers)))(
        params, grads
    )
    trees.assert_close(concrete(params, grads), expected, rtol=1e-5)
    trees.assert_close(traced(numbers, params, grads), expected, rtol=1e-5)


# --- leaves ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "axis"), [((4, 0, 5), "a"), ((0, 2, 5), "a"), ((4, 2, 0), "b")])
def test_a_factor_with_an_empty_axis_is_refused_by_path(shape, axis):
    m, r, n = shape
    params = {"x": {"lora_a": jnp.ones((m, r)), "lora_b": jnp.ones((r, n))}}
    for make in TRANSFORMS.values():
        with pytest.raises(ValueError, match=f"x/lora_{axis} is a LoRA factor of .*shape.*empty"):
            make().init(params)


@pytest.mark.parametrize(
    "dtype", ["complex64", "float8_e4m3fn", "float8_e5m2", "int8", "int32", "bool"]
)
def test_a_factor_of_a_dtype_that_cannot_be_trained_is_refused_by_path(dtype):
    params = {"x": {"lora_a": jnp.ones((4, 2), dtype), "lora_b": jnp.ones((2, 5), dtype)}}
    for make in TRANSFORMS.values():
        with pytest.raises(ValueError, match=f"x/lora_a .*dtype {dtype}"):
            make().init(params)


@pytest.mark.parametrize("make", [TRANSFORMS["lorapro"], TRANSFORMS["lorapro_adamw"]])
def test_two_leaves_of_one_path_are_refused(make):
    params = tree(q=(4, 2, 5)) | {"x/bias": jnp.ones(3), "x": {"bias": jnp.ones(3)}}
    tx = make()
    with pytest.raises(ValueError, match="share one path: x/bias"):
        tx.update(params, tx.init(params), params)


def test_two_pairs_of_one_path_are_refused():
    pair = tree(q=(4, 2, 5))["q"]
    params = {"x/q": pair, "x": {"q": pair}}
    with pytest.raises(ValueError, match="x/q"):
        lp.lorapro(SCALE).init(params)


def test_gradients_of_other_shapes_are_refused_by_path():
    params, grads, _ = trees.make()
    grads["up_0"], grads["down"] = grads["down"], grads["up_0"]
    tx = lp.lorapro_adamw(1e-3, SCALE)
    with pytest.raises(ValueError, match="down/lora_a: the update has shape"):
        jax.eval_shape(tx.update, grads, state_of(tx, params), params)


def test_a_pair_without_its_partner_is_refused_by_name():
    params = tree(q=(4, 2, 5))
    del params["q"]["lora_b"]
    with pytest.raises(ValueError, match=r"q has lora_a \(a\) but no matching b"):
        lp.lorapro(SCALE).init(params)
