"""The optax contract: optax's own two suites, and the same checks on a tree with pairs."""

import functools
import re
from unittest import mock

import contract
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from contract import FACTORIES, LAYOUT, NUMBERS, every_optimizer, gradients, types
from trees import SCALE

# --- optax's suites: trees without a pair ------------------------------------------------------

CASES = [
    {
        "opt_name": name,
        "opt_kwargs": {"learning_rate": 1e-3, "scale": SCALE, "require_pairs": False},
        "wrapper_name": None,
        "wrapper_kwargs": None,
    }
    for name in NUMBERS
]
contrib = contract.load(
    "optax.contrib._common_test",
    "product",
    lambda product: lambda theirs, **grid: product(CASES, **grid),
)
contrib._get_opt_factory = FACTORIES.get
OPTIMIZERS = {n: FACTORIES[n](**NUMBERS[n], require_pairs=False) for n in FACTORIES}
sharding = contract.load(
    "optax._src.sharding_test",
    "named_parameters",  # given the optimizers as one argument; its own two cases, as two
    lambda named: lambda *theirs: named(OPTIMIZERS.items()) if len(theirs) == 1 else named(*theirs),
)


class TestOptaxContribSuite(contrib.ContribTest):
    """One test for each of its cases, as it stands in the wheel."""


class TestOptaxShardingSuite(sharding.ShardingTest):
    """One test for each of its cases, as it stands in the wheel."""

    def setUp(self):
        super().setUp()
        # It skips where jax.__version__ < "0.7.2", which holds for "0.10" as a string.
        self.enterContext(mock.patch.object(jax, "__version__", "1"))


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


@every_optimizer
def test_extra_arguments_change_nothing(tx):
    params = contract.make()
    grads, state = gradients(params), tx.init(params)
    extra = {"value": 1.0, "grad": grads, "unexpected": object()}
    with_them = jax.make_jaxpr(lambda *args: tx.update(*args, **extra))(grads, state, params)
    # the same program, operation by operation
    assert str(with_them) == str(jax.make_jaxpr(tx.update)(grads, state, params))


@every_optimizer
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16, "mixed"])
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
def test_eager_calls_give_what_compiled_ones_give(tx):
    params = contract.make()
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
def test_map_params_finds_the_moments_of_leaves_in_no_pair(tx):
    """They stand at paths that end in the parameter's own; what a group holds is no parameter."""
    params = contract.make()
    _, state = stepped(tx, params, tx.init(params))
    found = optax.tree.map_params(tx, lambda _: True, state, transform_non_params=lambda _: False)
    for path, is_param in jax.tree.leaves_with_path(jax.tree.broadcast(found, state)):
        name = contract.path_str(path)
        moment = re.search(r"/(mu|nu)/(bias|temperature)$", name)
        assert is_param == bool(moment), name
    assert types(optax.tree.map_params(tx, lambda x: 2 * x, state)) == types(state)


@every_optimizer
def test_cond_and_scan_take_the_steps_of_a_python_loop(tx):
    params = contract.make()
    carry = expected = params, tx.init(params)

    def step(carry):
        params, state = carry
        updates, state = tx.update(gradients(params), state, params)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def run(carry, flags):
        return jax.lax.scan(
            lambda c, flag: (jax.lax.cond(flag, step, lambda c: c, c), None), carry, flags
        )[0]

    for _ in range(2):
        expected = stepped(tx, *expected)
    contract.assert_same(run(carry, jnp.asarray([True, False, True])), expected)


@every_optimizer
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
    "learning_rate": 0.02, "scale": 3.0, "damping": 1e-2, "b1": 0.5, "b2": 0.9, "eps": 0.1,
    "weight_decay": 0.3, "floor": 0.5, "clipping_threshold": 0.2, "radius": 1e-3,
}  # fmt: skip


def test_every_number_may_be_injected_and_changed():
    """One compiled update: all of them changed, against an optimizer so built; then each."""
    params, defaults = contract.make(), NUMBERS["lorapro_adamw"]
    factory = FACTORIES["lorapro_adamw"]
    tx = optax.inject_hyperparams(factory)(**defaults, layout=LAYOUT)
    update, grads = jax.jit(tx.update), gradients(params)
    _, state = update(grads, jax.jit(tx.init)(params), params)
    changed = {k: jnp.asarray(CHANGED[k], params["bias"].dtype) for k in defaults}

    def with_numbers(numbers):
        return update(grads, state._replace(hyperparams=state.hyperparams | numbers), params)

    usual, _ = with_numbers({})
    updates, after = with_numbers(changed)
    plain = factory(**{k: CHANGED[k] for k in defaults}, layout=LAYOUT)
    expected = jax.jit(plain.update)(grads, state.inner_state, params)
    contract.assert_same((updates, after.inner_state), expected)
    for number, value in changed.items():
        updates, _ = with_numbers({number: value})
        moved = jax.tree.map(lambda x, y: np.any(x != y), updates, usual)
        assert any(jax.tree.leaves(moved)), f"{number} changes nothing"
    assert update._cache_size() == 1
