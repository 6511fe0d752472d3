"""The optax contract: optax's own contrib suite, and the same checks on a tree with pairs."""

import functools
import os
import pathlib
import subprocess
import sys

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import every_mode, every_optimizer, gradients, types
from trees import SCALE

# --- optax's suite: trees without a pair -------------------------------------------------------

CASES = [
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": 1e-3, "scale": SCALE, "require_pairs": False, **options},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name, options in contract.OPTIMIZERS
]
suite = contract.load(
    "optax.contrib._common_test",
    "product",
    lambda product: lambda theirs, **grid: product(CASES, **grid),
)
suite._get_opt_factory = contract.FACTORIES.get


class TestOptaxContribSuite(suite.ContribTest):
    """One test for each of its cases, as it stands in the wheel."""


# --- trees with pairs --------------------------------------------------------------------------


@functools.cache
def compiled(tx):
    """One compilation of an update for all tests."""
    return jax.jit(tx.update)


def stepped(tx, params, state, grads=None):
    """(params, state) after one compiled step."""
    grads = gradients(params) if grads is None else grads
    updates, state = compiled(tx)(grads, state, params)
    return optax.apply_updates(params, updates), state


@every_mode
def test_extra_arguments_change_nothing(tx):
    params = contract.make()
    grads, state = gradients(params), tx.init(params)
    extra = {"value": 1.0, "grad": grads, "unexpected": object()}
    with_them = jax.make_jaxpr(lambda *args: tx.update(*args, **extra))(grads, state, params)
    # the same program, operation by operation
    assert str(with_them) == str(jax.make_jaxpr(tx.update)(grads, state, params))


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, "mixed"])
def test_one_trace_serves_every_step(tx, dtype):
    """Types stay those of the first state, or the second call would trace again: nothing is run."""
    traces = []

    @jax.jit
    def update(grads, state, params):
        traces.append(1)
        return tx.update(grads, state, params)

    params = contract.make(dtype)
    state = tx.init(params)
    assert not any(x.weak_type for x in jax.tree.leaves(types(state)))
    for _ in range(3):
        updates, new_state = update.eval_shape(gradients.eval_shape(params), state, params)
        assert types(updates) == types(params)
        assert types(new_state) == types(state)
        params, state = jax.eval_shape(optax.apply_updates, params, updates), new_state
    assert len(traces) == 1


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.float64])
def test_other_dtypes_are_as_stable(tx, dtype, x64):
    params = contract.make(dtype)
    state = tx.init(params)
    updates, new_state = jax.eval_shape(tx.update, params, state, params)
    assert types(updates) == types(params)
    assert types(new_state) == types(state)


@every_mode
def test_eager_calls_give_what_compiled_ones_give(tx):
    params = contract.make("mixed")
    del params["head"]  # a third group, and every operation is compiled anew
    state = tx.init(params)
    contract.assert_same(jax.jit(tx.init)(params), state)
    params, state = stepped(tx, params, state)
    grads = gradients(params)
    contract.assert_same(tx.update(grads, state, params), compiled(tx)(grads, state, params))


@every_optimizer
def test_init_needs_only_shapes(tx):
    """As optax's own: `init` on jax.ShapeDtypeStruct, whose zeros are those of the parameters."""
    params = contract.make()
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    contract.assert_same(tx.init(shapes), tx.init(params))


@every_optimizer
def test_map_params_finds_the_moments_of_parameters(tx):
    """They stand at paths that end in the parameter's own; a group's moments of g~ do not.

    Full mode's groups are one non-parameter field each, whatever they hold.
    """
    params = contract.make()
    _, state = stepped(tx, params, tx.init(params))
    names = jax.tree.map_with_path(lambda path, _: jax.tree_util.keystr(path), params)

    def ends_in(path, name):
        return jax.tree_util.keystr(path).endswith(name)

    found = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    for path, is_param in jax.tree.leaves_with_path(jax.tree.broadcast(found, state)):
        assert is_param == any(ends_in(path, name) for name in jax.tree.leaves(names)), path
    specs = optax.tree.map_params(
        tx,
        lambda _, name: name,
        state,
        names,
        transform_non_params=lambda _: "",
        is_leaf=lambda x: isinstance(x, optax.MaskedNode),  # full mode masks the pairs
    )
    for path, name in jax.tree.leaves_with_path(specs):
        assert ends_in(path, name)
    assert types(optax.tree.map_params(tx, lambda x: 2 * x, state)) == types(state)


@every_mode
def test_cond_and_scan_take_the_steps_of_a_python_loop(tx):
    params = contract.make()
    carry = expected = params, tx.init(params)

    def maybe(carry, flag):
        return jax.lax.cond(flag, lambda c: contract.step(tx, *c), lambda c: c, carry), None

    got, _ = jax.lax.scan(maybe, carry, jnp.asarray([True, False, True]))
    for _ in range(2):
        expected = stepped(tx, *expected)
    contract.assert_same(got, expected)


@every_mode
def test_multi_steps_takes_a_step_on_the_mean_gradient(tx):
    """Two rounds of three different gradients; in between nothing moves."""
    params = contract.make()
    dtype = params["bias"].dtype
    multi = optax.MultiSteps(tx, every_k_schedule=3, accumulator_dtype=dtype)
    state, update = multi.init(params), jax.jit(multi.update)
    expected = params, tx.init(params)
    for cycle in range(2):
        grads = [gradients(contract.make(seed=10 * cycle + i)) for i in range(3)]
        for micro in grads[:2]:
            updates, state = update(micro, state, params)
            assert not any(np.any(x) for x in jax.tree.leaves(updates))
            contract.assert_same(state.inner_opt_state, expected[1])
        updates, state = update(grads[2], state, params)
        params = optax.apply_updates(params, updates)
        mean = jax.tree.map(lambda *g: jnp.asarray(np.mean(g, 0), dtype), *grads)
        expected = stepped(tx, *expected, mean)
        contract.assert_same((params, state.inner_opt_state), expected)


CHANGED = {
    "learning_rate": 0.02,
    "scale": 3.0,
    "damping": 1e-2,
    "b1": 0.5,
    "b2": 0.9,
    "eps": 0.1,
    "weight_decay": 0.3,
}


@pytest.mark.parametrize(("name", "mode"), contract.PAIRED[1:], ids=contract.PAIRED_NAMES[1:])
def test_every_number_may_be_injected_and_changed(name, mode):
    """One compiled update: all of them changed, against an optimizer so built; then each."""
    params, defaults = contract.make(), contract.DEFAULTS[name]
    tx = optax.inject_hyperparams(contract.FACTORIES[name])(
        **defaults, **mode, layout=contract.LAYOUT
    )
    update, grads = jax.jit(tx.update), gradients(params)
    _, state = update(grads, jax.jit(tx.init)(params), params)
    changed = {k: jnp.asarray(CHANGED[k], params["bias"].dtype) for k in defaults}

    def with_numbers(numbers):
        return update(grads, state._replace(hyperparams=state.hyperparams | numbers), params)

    usual, _ = with_numbers({})
    updates, after = with_numbers(changed)
    plain = contract.optimizer(name, mode, **{k: CHANGED[k] for k in defaults})
    expected = jax.jit(plain.update)(grads, state.inner_state, params)
    contract.assert_same((updates, after.inner_state), expected)
    for number, value in changed.items():
        updates, _ = with_numbers({number: value})
        moved = jax.tree.map(lambda x, y: np.any(x != y), updates, usual)
        assert any(jax.tree.leaves(moved)), f"{number} changes nothing"
    assert update._cache_size() == 1


# --- under an explicit mesh --------------------------------------------------------------------


def test_explicit_meshes_in_a_process_with_eight_devices():
    """tests/explicit_mesh.py: jax takes the number of its devices when it starts."""
    flags = (
        "--xla_force_host_platform_device_count=8",
        # types and values need no optimised code, which takes long to compile
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
    )
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--no-header",
            "--tb=short",
            "tests/explicit_mesh.py",
        ],
        cwd=pathlib.Path(__file__).parent.parent,
        env=os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-10000:] + run.stderr[-2000:]
