"""Explicit meshes: types, sharding included, of updates and states. Run by test_contract.py.

Needs eight devices: XLA_FLAGS=--xla_force_host_platform_device_count=8 pytest explicit_mesh.py
"""

import functools
from unittest import mock

import contract
import jax
import optax
import pytest
from contract import MODES, every_mode, gradients, types
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorapro_jax as lp

# --- optax's suite: trees without a pair -------------------------------------------------------

CASES = {
    "-".join([name, *mode.values()]): contract.FACTORIES[name](
        **contract.DEFAULTS[name], **mode, require_pairs=False
    )
    for name, mode in contract.OPTIMIZERS
}
suite = contract.load(
    "optax._src.sharding_test",
    "named_parameters",  # given the optimizers as one argument; its own two cases, as two
    lambda named: lambda *theirs: named(CASES.items()) if len(theirs) == 1 else named(*theirs),
)


class TestOptaxShardingSuite(suite.ShardingTest):
    """One test for each of its cases, as it stands in the wheel."""

    def setUp(self):
        super().setUp()
        # It skips where jax.__version__ < "0.7.2", which holds for "0.10" as a string.
        self.enterContext(mock.patch.object(jax, "__version__", "1"))


# --- trees with pairs --------------------------------------------------------------------------

LAYERS = ("layers_0", "layers_1", "layers_2")


def layers(a=(), b=()):
    """The axes of the group's pairs, all alike."""
    return {f"{k}/lora_a": a for k in LAYERS} | {f"{k}/lora_b": b for k in LAYERS}


def scanned(a=(), b=()):
    return {"stack/lora_a": a, "stack/lora_b": b}


# How leaves lie on a 4 x 2 mesh, {path: axes}; the others are on every device.
PLACEMENTS = {
    "rows and columns over one axis; those of a scan": layers(("x", None), (None, "x"))
    | scanned((None, "x", None), (None, None, "y")),
    "rows and columns; layers and columns of a scan": layers(("x", None), (None, "y"))
    | scanned(("x", None, None), ("x", None, "y"))
    | {"bias": ("x",)},
    "rows over two axes; the rank of a scan": layers(a=(("x", "y"), None))
    | scanned((None, None, "y"), (None, "y", None)),
    "pairs of one group differ; layers of one factor": {
        "layers_0/lora_a": ("x", None),
        "layers_1/lora_b": (None, "x"),
    }
    | scanned(a=("x", None, None)),
}
MIXED = PLACEMENTS["rows and columns; layers and columns of a scan"]
every_placement = pytest.mark.parametrize("axes", PLACEMENTS.values(), ids=PLACEMENTS.keys())


def explicit_mesh():
    return jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit,) * 2)


def place(tree, axes, mesh):
    """Parameters or their gradients on the mesh."""

    def one(path, x):
        spec = PartitionSpec(*axes.get(contract.path_str(path), ()))
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree.map_with_path(one, tree)


@functools.cache
def on_one_device(tx, dtype=None):
    """[(params, grads, updates, state)] of two steps without a mesh, and the first state."""
    params = contract.make(dtype)
    state = first = tx.init(params)
    steps = []
    for _ in range(2):
        grads = gradients(params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        steps.append((params, grads, updates, state))
        params = jax.jit(optax.apply_updates)(params, updates)
    return first, steps


def assert_same_values(x, y):
    contract.assert_same(*jax.device_get((x, y)))


def check(tx, axes, wrapper, dtype=None, steps=2):
    """A few steps under a mesh: types are stable, values are those of one device."""
    first, truth = on_one_device(tx, dtype)
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        init, update = wrapper(tx.init), wrapper(tx.update)
        state = init(place(truth[0][0], axes, mesh))
        assert_same_values(state, first)
        for params, grads, expected, expected_state in truth[:steps]:
            params = place(params, axes, mesh)
            updates, new_state = update(place(grads, axes, mesh), state, params)
            assert types(updates) == types(params)
            assert types(new_state) == types(state)
            assert_same_values((updates, new_state), (expected, expected_state))
            state = new_state


def test_there_are_eight_devices():
    assert jax.device_count() == 8


@every_placement
@every_mode
def test_compiled_steps(tx, axes):
    check(tx, axes, jax.jit)


def test_eager_steps():
    """Of efficient mode: operations have the same types here, and are compiled one by one."""
    check(MODES["efficient"], MIXED, lambda function: function, steps=1)


def test_steps_of_bf16_factors_among_float32_ones():
    """Of efficient mode: how factors are widened is common to the modes."""
    check(MODES["efficient"], MIXED, jax.jit, "mixed", steps=1)


@every_placement
@every_mode
def test_init_gives_one_state_eager_and_compiled(tx, axes):
    mesh = explicit_mesh()
    with jax.set_mesh(mesh):
        params = place(contract.make(), axes, mesh)
        state = tx.init(params)
        assert types(jax.jit(tx.init)(params)) == types(state)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        assert types(tx.init(shapes)) == types(state)


@pytest.mark.parametrize(
    ("group", "spec"), [("layers_0", (None, "x", "y")), ("stack", ("x", None, "y"))]
)
def test_full_modes_moments_lie_as_the_kernel_would(group, spec):
    mesh = explicit_mesh()
    tx = lp.scale_by_lorapro_adam(contract.SCALE, mode="full", layout=contract.LAYOUT)
    with jax.set_mesh(mesh):
        state = tx.init(place(contract.make(), MIXED, mesh))
        for moment in (state.mu, state.nu):
            assert moment[group].sharding.spec == PartitionSpec(*spec)
