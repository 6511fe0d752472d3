"""Eight devices against one: the same updates, no factor gathered, the state sharded as told."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import trees
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorapro_jax as lp

MODES = ("lorapro", "factored", "full", "muon")
AXES = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}
R = 5
# name: shapes of a and b, and their specs. Every factor has an axis of a size in FACTOR_SIZES.
SHAPES = {
    "fsdp rows": ((16, R), (R, 40), P("fsdp", None), P()),
    "fsdp columns": ((16, R), (R, 40), P(), P(None, "fsdp")),
    "column parallel": ((16, R), (R, 40), P(), P(None, "tensor")),
    "row parallel": ((16, R), (R, 40), P("tensor", None), P()),
    "both": ((16, R), (R, 40), P("fsdp", None), P(None, "tensor")),
    "two axes on rows": ((16, R), (R, 40), P(("fsdp", "tensor"), None), P()),
    "heads": ((16, R), (R, 2, 7), P("fsdp", None), P(None, "tensor", None)),
    "heads in": ((2, 7, R), (R, 16), P("tensor", None, None), P(None, "fsdp")),
    "layers": ((3, 16, R), (3, R, 40), P(None, "fsdp", None), P(None, None, "tensor")),
    "scan on axis 1": ((16, 3, R), (R, 3, 40), P("fsdp", None, None), P(None, None, "tensor")),
    "layers of experts": ((3, 8, 16, R), (3, 8, R, 40), P(None, "fsdp"), P(None, "fsdp", None)),
}
EXPERTS = {"experts": ((8, 16, R), (8, R, 40), P("fsdp"), P("fsdp", None, "tensor"))}
# rows and columns that want the same mesh axis: one of them must be gathered to form the kernel
CLASH = {"clash": ((16, R), (R, 40), P("fsdp", None), P(None, "fsdp"))}
FACTOR_SIZES = {"16", "40", "7"}
DIMS = {
    "layers": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,)),
    "experts": lp.LoRADimensionNumbers(a_batch=(0,), b_batch=(0,)),
    "scan on axis 1": lp.LoRADimensionNumbers(a_batch=(1,), b_batch=(1,)),
    "layers of experts": lp.LoRADimensionNumbers(a_batch=(0, 1), b_batch=(0, 1)),
}


def layout_of(params):
    return lp.layouts.FLAX.declare({name: DIMS[name] for name in params if name in DIMS})


def mesh(kind, shape=(4, 2)):
    return jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AXES[kind],) * 2)


def transformation(mode, params):
    layout = layout_of(params)
    if mode == "lorapro":
        return optax.chain(lp.lorapro(2.0, layout=layout), optax.sgd(0.1))
    return trees.optimizer(mode, 1e-2, weight_decay=0.1, layout=layout)


def sharded(shapes, seed=0):
    """(params, grads, specs): two separate layers of every pair, so that pairs are stacked."""
    rng = np.random.default_rng(seed)

    def tree(entry):
        return {
            name: {leaf: entry(i, row) for i, leaf in enumerate(("lora_a", "lora_b"))}
            for name, row in shapes.items()
        }

    params, grads = (tree(lambda i, row: rng.normal(size=row[i])) for _ in range(2))
    return params, grads, tree(lambda i, row: row[2 + i])


def place(tree, specs, on):
    put = functools.partial(
        jax.tree.map, lambda x, spec: jax.device_put(x, NamedSharding(on, spec))
    )
    return put(tree, specs)


def steps(update, params, grads, state, count=3):
    """Parameters and state after some steps of a compiled update."""
    apply = jax.jit(optax.apply_updates)
    for _ in range(count):
        updates, state = update(grads, state, params)
        params = apply(params, updates)
    return params, state


def moves(text):
    """Collectives, but for sums: how factors would travel. Gathered Grams (r, r) are no factors."""
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather(?:-start)?\(", text)
    found = {f"all-gather [{dims}]" for dims in gathered if FACTOR_SIZES & set(dims.split(","))}
    others = ("all-to-all", "collective-permute", "reduce-scatter")
    return found | {op for op in others if re.search(rf"= \S+ {op}(-start)?\(", text)}


@functools.cache
def on_one_device(mode, names):
    shapes = {name: (SHAPES | EXPERTS | CLASH)[name] for name in names}
    params, grads, _ = jax.tree.map(
        lambda x: x if isinstance(x, P) else jnp.asarray(x),
        sharded(shapes),
        is_leaf=lambda x: isinstance(x, P),
    )
    tx = transformation(mode, params)
    return jax.tree.map(np.asarray, steps(jax.jit(tx.update), params, grads, tx.init(params)))


def check(kind, mode, shapes, may_move=False):
    on = mesh(kind)
    params, grads, specs = sharded(shapes)
    params, grads = place(params, specs, on), place(grads, specs, on)
    tx = transformation(mode, params)
    shardings = lp.state_shardings(tx, params, layout=layout_of(params))
    with jax.set_mesh(on):
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        update = jax.jit(tx.update).lower(grads, state, params).compile()
        new, state = steps(update, params, grads, state)
    assert may_move or not moves(update.as_text())
    for ours, theirs in zip(
        jax.tree.leaves((new, state)),
        jax.tree.leaves(on_one_device(mode, tuple(shapes))),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=1e-10, atol=1e-10)
    same = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y, x.ndim), state, shardings)
    assert all(jax.tree.leaves(same)), same
    kept = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim), new, params)
    assert all(jax.tree.leaves(kept)), kept


@pytest.mark.parametrize(
    "mode", [pytest.param("lorapro", marks=pytest.mark.slow), "factored", "full"]
)
@pytest.mark.parametrize("kind", AXES)
def test_sharded_factors_give_the_same_steps_and_only_small_sums_travel(kind, mode):
    check(kind, mode, SHAPES)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", AXES)
def test_experts_on_their_own_devices(kind, mode):
    """With automatic axes full mode cannot know that its loop runs over a sharded axis."""
    check(kind, mode, EXPERTS, may_move=(kind, mode) == ("auto", "full"))


@pytest.mark.parametrize("kind", AXES)
def test_rows_and_columns_on_one_mesh_axis(kind):
    for mode in (mode for mode in MODES if mode != "full"):
        check(kind, mode, CLASH)
    check(kind, "full", CLASH, may_move=True)


@pytest.mark.parametrize("kind", AXES)
def test_moments_are_sharded_as_the_kernel_where_factors_are_replicated(kind):
    on = mesh(kind)
    params, grads, _ = sharded({"q": ((16, R), (R, 40), P(), P())})
    specs = jax.tree.map(lambda _: P(), params)
    params, grads = place(params, specs, on), place(grads, specs, on)
    tx = lp.lorapro_adamw(1e-2, 2.0, mode="full")
    update = jax.jit(tx.update)
    shardings = lp.state_shardings(tx, params, kernels=lambda path: P("fsdp", "tensor"))
    with jax.set_mesh(on):
        state = jax.jit(tx.init, out_shardings=shardings)(params)
        new, state = steps(update, params, grads, state)
    moment = optax.tree.get(state, "rms")["q"]
    assert moment.sharding.spec == P(None, "fsdp", "tensor")
    assert moment.addressable_shards[0].data.shape == (1, 4, 20)
    one = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (params, grads))
    expected, _ = steps(update, *one, tx.init(one[0]))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), new, expected)


@pytest.mark.parametrize("mode", ["factored", pytest.param("full", marks=pytest.mark.slow)])
def test_a_state_saved_on_one_mesh_goes_on_on_another(tmp_path, mode):
    params, grads, specs = sharded({name: SHAPES[name] for name in ("both", "layers", "heads")})
    tx = transformation(mode, params)
    update = jax.jit(tx.update)
    manager = ocp.StandardCheckpointer()
    results = []
    for i, (kind, shape) in enumerate([("auto", (4, 2)), ("auto", (2, 2)), ("explicit", (8, 1))]):
        on = jax.make_mesh(shape, ("fsdp", "tensor"), axis_types=(AXES[kind],) * 2,
                           devices=jax.devices()[: int(np.prod(shape))])  # fmt: skip
        here, there = place(params, specs, on), place(grads, specs, on)
        shardings = lp.state_shardings(tx, here, layout=layout_of(params))
        with jax.set_mesh(on):
            if i == 0:
                state = jax.jit(tx.init, out_shardings=shardings)(here)
                here, state = steps(update, here, there, state)
                manager.save(tmp_path / "step", {"params": here, "state": state})
                manager.wait_until_finished()
            wanted = jax.tree.map(
                lambda x, y: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=y),
                jax.eval_shape(tx.init, here),
                shardings,
            )
            abstract = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), here
            )
            back = manager.restore(tmp_path / "step", {"params": abstract, "state": wanted})
            assert all(
                jax.tree.leaves(
                    jax.tree.map(lambda x, y: x.sharding == y, back["state"], shardings)
                )
            )
            new, _ = steps(update, back["params"], there, back["state"], count=2)
        results.append(jax.tree.map(np.asarray, new))
    for other in results[1:]:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-10), results[0], other)


def test_parameters_without_a_mesh_are_an_error():
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
    with pytest.raises(ValueError, match="q/lora_a has sharding .*every parameter needs a Named"):
        lp.state_shardings(lp.lorapro_adamw(1e-3, 2.0), params)
    with pytest.raises(ValueError, match="no leaves"):
        lp.state_shardings(lp.lorapro_adamw(1e-3, 2.0), {})


def test_a_kernel_spec_that_is_too_long_is_an_error():
    one = NamedSharding(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)), P())
    params = {"q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4))}}
    params = jax.device_put(params, one)
    tx = lp.lorapro_adamw(1e-3, 2.0, mode="full")
    with pytest.raises(ValueError, match="q, whose moments are one array.*of 2 axes at most"):
        lp.state_shardings(tx, params, kernels=lambda path: P(None, None, None))


def test_state_of_frozen_and_masked_parts_is_told_too():
    one = NamedSharding(jax.make_mesh((1,), ("x",), axis_types=(AxisType.Auto,)), P("x"))
    params = {
        "q": {"lora_a": jnp.ones((6, 2)), "lora_b": jnp.ones((2, 4)), "kernel": jnp.ones((6, 4))}
    }
    params = jax.device_put(params, one)
    for tx in (
        lp.freeze_base(lp.lorapro_adamw(1e-3, 2.0, mode="full")),
        optax.MultiSteps(lp.freeze_base(lp.lorapro_adamw(1e-3, 2.0)), 2),
        optax.inject_hyperparams(lp.lorapro_adamw)(
            learning_rate=1e-3, scale=2.0, require_pairs=False
        ),
    ):  # fmt: skip
        shardings = lp.state_shardings(tx, params)
        state = tx.init(params)
        assert jax.tree.structure(shardings) == jax.tree.structure(state)
        for leaf, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True):
            # as a's rows, in a group too; MultiSteps' gradients as each parameter
            rows = 6 in leaf.shape or leaf.shape == (2, 4)
            assert ("x" in sharding.spec) == rows, (leaf.shape, sharding)


SIDES = {"wide": (13, 3, 11), "odd": (17, 4, 9), "r above n": (7, 5, 2), "one row": (1, 2, 9)}


@pytest.mark.float32
def test_eight_devices_and_one_agree_in_float32_where_r_is_above_a_side():
    """Three steps; of the change of the product, 1e-5, and the last digit of the factors.

    The one row has a direction in which a is nothing. The averages have a part of the step's size
    there, which vanishes but for the Gram's rounding over the damping, an eighth.
    """
    params, _, dense = trees.make(dtype=jnp.float32, shapes=SIDES)
    rate, bounds = 1e-3, dict.fromkeys(SIDES, 1e-5)
    bounds["one row"] = rate / 8
    tx = lp.lorapro_adamw(rate, trees.SCALE)

    @jax.jit
    def three_steps(params, G):
        state = tx.init(params)
        for _ in range(3):
            grads = {
                k: trees.node(2 * G[k] @ x["lora_b"].T, 2 * x["lora_a"].T @ G[k])
                for k, x in params.items()
            }
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params

    G = {k: jnp.asarray(G, jnp.float32) for k, (_, _, G) in dense.items()}
    one = three_steps(params, G)
    everywhere = NamedSharding(mesh("auto"), P())
    eight = three_steps(*jax.device_put((params, G), everywhere))
    for name, start in params.items():
        before, x, y = (
            a @ b for a, b in (trees.values(node) for node in (start, one[name], eight[name]))
        )
        bound = bounds[name] * np.linalg.norm(x - before)
        last_digit = np.finfo(np.float32).eps * np.linalg.norm(before)
        assert np.linalg.norm(x - y) <= bound + last_digit, name
