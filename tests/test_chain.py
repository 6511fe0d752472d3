"""What stands between, before or after acts as on `optax.adamw`: rates, wrappers, decay."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import trees
from trees import SCALE

import lorapro_jax as lp

KEYS = jax.random.split(jax.random.key(0), 4)
X = jax.random.normal(KEYS[1], (32, 6))
Y = X @ jax.random.normal(KEYS[2], (6, 4))
PARAMS = {
    "q": {"lora_a": jax.random.normal(KEYS[0], (6, 2)), "lora_b": jnp.zeros((2, 4))},
    "h": jnp.zeros((4,)),
}
RATE = 2e-2


def loss(params):
    product = SCALE * params["q"]["lora_a"] @ params["q"]["lora_b"]
    return jnp.mean((X @ product + params["h"][None] - Y) ** 2)


def train(tx, steps=60, *, value=False, lookahead=False):
    """(losses, parameters, state, whether all was finite)."""

    def advance(carry, _):
        params, state = carry
        now, grads = jax.value_and_grad(loss)(params.fast if lookahead else params)
        extra = {"value": now} if value else {}
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
        finite = jnp.all(jnp.asarray([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))
        return (params, state), (now, finite)

    @jax.jit
    def run(params):
        if lookahead:
            params = optax.LookaheadParams(params, params)
        return jax.lax.scan(advance, (params, tx.init(params)), length=steps)

    (params, state), (losses, finite) = run(PARAMS)
    return np.asarray(losses), params, state, bool(jnp.all(finite))


# name: (what is put around a transformation, the last loss's largest share of the first)
TABLE = {
    "alone": (lambda tx: tx, 0.6),
    "scale(1e-6)": (lambda tx: optax.chain(tx, optax.scale(1e-6)), 1.0),
    "scale(0)": (lambda tx: optax.chain(tx, optax.scale(0.0)), 1.0),
    "scale(.1)": (lambda tx: optax.chain(tx, optax.scale(0.1)), 0.97),
    "ema": (lambda tx: optax.chain(tx, optax.ema(0.9)), 0.9),
    "trace": (lambda tx: optax.chain(tx, optax.trace(0.5)), 0.5),
    "mechanize": (optax.contrib.mechanize, 0.9),
    "plateau": (lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau(patience=3)), 0.6),
    "MultiSteps": (lambda tx: optax.MultiSteps(tx, 2), 0.8),
    "apply_every": (lambda tx: optax.chain(tx, optax.apply_every(2)), 0.7),
    "apply_if_finite": (lambda tx: optax.apply_if_finite(tx, 3), 0.6),
    "masked": (lambda tx: optax.masked(tx, {"q": True, "h": False}), 0.7),
    "add_noise": (lambda tx: optax.chain(optax.add_noise(0.01, 0.55, 0), tx), 0.8),
    "clip_by_global_norm": (lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx), 0.6),
    "clip": (lambda tx: optax.chain(tx, optax.clip(1e-2)), 0.9),
    "zero_nans": (lambda tx: optax.chain(optax.zero_nans(), tx), 0.6),
    "lookahead": (lambda tx: optax.lookahead(tx, 3, 0.5), 0.7),
    "flatten": (lambda tx: optax.contrib.split_real_and_imaginary(tx), 0.6),
}
METHODS = {
    "factored": lambda rate: lp.lorapro_adamw(rate, SCALE),
    "full": lambda rate: lp.lorapro_adamw(rate, SCALE, mode="full"),
    "muon": lambda rate: lp.lorapro_muon(rate, SCALE),
    "lorapro": lambda rate: optax.chain(lp.lorapro(SCALE), optax.adamw(rate)),
    "adamw": optax.adamw,  # the table's shares are such that it passes
}
cases = [
    pytest.param(name, method, marks=[] if method == "factored" else pytest.mark.slow)
    for name in TABLE
    for method in METHODS
]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("name", "method"), cases)
def test_it_trains_inside_whatever_optax_has(name, method):
    wrap, share = TABLE[name]
    tx = wrap(METHODS[method](RATE))
    if name == "masked":
        tx = optax.chain(tx, optax.masked(optax.set_to_zero(), {"q": False, "h": True}))
    losses, _, _, finite = train(tx, value=name == "plateau", lookahead=name == "lookahead")
    assert finite
    assert losses[-1] <= share * losses[0] * (1 + 1e-6)


def test_schedule_free_evaluates_at_its_average():
    tx = optax.contrib.schedule_free(lp.lorapro_adamw(RATE, SCALE, b1=0.0), RATE, b1=0.9)
    losses, params, state, finite = train(tx)
    assert finite
    assert loss(optax.contrib.schedule_free_eval_params(state, params)) < 0.9 * losses[0]


def test_a_step_that_is_scaled_to_nothing_changes_nothing():
    _, params, _, _ = train(optax.chain(lp.lorapro_adamw(RATE, SCALE), optax.scale(0.0)), 5)
    trees.assert_close(params, PARAMS, rtol=0, atol=0)


def test_scaling_the_direction_is_scaling_the_rate(x64):
    """Between direction and retraction a factor is the rate's, exactly."""

    def chain(*between):
        return optax.chain(lp.scale_by_lorapro_adam(SCALE), *between, lp.retract(SCALE))

    one = train(chain(optax.scale(-RATE)), 10)[1]
    other = train(chain(optax.scale(-10 * RATE), optax.scale(0.1)), 10)[1]
    trees.assert_close(one, other, rtol=1e-9)


def test_injected_hyperparameters_may_be_schedules_and_be_changed():
    schedule = optax.linear_schedule(RATE, 0.0, 60)
    injected = optax.inject_hyperparams(lp.lorapro_adamw, static_args=("mode", "layout", "mask"))
    tx = injected(learning_rate=schedule, scale=SCALE, b1=0.8, weight_decay=0.01)
    losses, params, state, finite = train(tx)
    plain = train(lp.lorapro_adamw(schedule, SCALE, b1=0.8, weight_decay=0.01))
    assert finite
    trees.assert_close(params, plain[1], rtol=1e-5, atol=1e-7)
    assert losses[-1] < 0.8 * losses[0]
    np.testing.assert_allclose(state.hyperparams["learning_rate"], RATE / 60, rtol=1e-5)


# --- weight decay ------------------------------------------------------------------------------


WEIGHT_DECAYS = {
    "number": (0.5, 0.5),
    "schedule": (lambda count: 0.25 * count + 0.25, 0.5),  # of the second step, count 1
}
MASKS = {
    "none": (None, {"q_0", "q_1", "bias"}),
    "tree": ({"q_0": True, "q_1": False, "bias": False}, {"q_0"}),
    "callable": (lambda p: {"q_0": False, "q_1": True, "bias": True}, {"q_1", "bias"}),
}


@pytest.mark.parametrize("decay", WEIGHT_DECAYS)
@pytest.mark.parametrize("mask", MASKS)
def test_weight_decay_is_half_of_it_on_each_factor(x64, decay, mask):
    """-rate · wd / 2 · factor beside the step without decay, and wd · leaf elsewhere."""
    given, number = WEIGHT_DECAYS[decay]
    tree, names = MASKS[mask]
    params, grads, _ = trees.make(shapes={"q_0": (6, 2, 5), "q_1": (6, 2, 5)})
    params["bias"], grads["bias"] = jnp.ones(3), jnp.arange(3.0)

    @jax.jit
    def second(params, grads):
        found = []
        for options in ({"weight_decay": given, "mask": tree}, {}):
            tx = lp.lorapro_adamw(RATE, SCALE, **options)
            _, state = tx.update(grads, tx.init(params), params)
            found.append(tx.update(grads, state, params)[0])
        return jax.tree.map(jnp.subtract, *found)

    for path, x in jax.tree.leaves_with_path(second(params, grads)):
        name = path[0].key
        share = (0.5 if name.startswith("q") else 1.0) * (name in names)
        leaf = params[name] if name == "bias" else params[name][path[1].key]
        np.testing.assert_allclose(x, -RATE * number * share * leaf, atol=1e-12)


def test_a_schedule_of_rates_is_followed(x64):
    """At rate 0 nothing moves; the first moments go on."""
    schedule = optax.piecewise_constant_schedule(0.0, {1: 1.0})
    _, params, _, _ = train(lp.lorapro_adamw(schedule, SCALE), 3)
    trees.assert_close(params, PARAMS, rtol=0, atol=0)


def test_the_docs_say_that_a_chain_has_one_direction():
    """One projection a chain: what the second gets is no gradient. Its docstring says so."""
    assert "One LoRA-Pro direction a chain" in lp.lorapro.__doc__.replace("\n    ", " ")


@pytest.mark.parametrize("mode", trees.MODES)
def test_the_alias_is_the_chain_of_its_public_parts(mode):
    """Without decay, from the same gradients."""
    alias = trees.optimizer(mode, 0.1)
    parts = optax.chain(trees.direction(mode), optax.scale(-0.1), lp.retract(2.0))
    key = jax.random.key(0)
    params = {f"l{i}": {"lora_a": jax.random.normal(key, (6, 2)), "lora_b": jnp.zeros((2, 4))}
              for i in range(2)} | {"bias": jnp.ones(3)}  # fmt: skip
    ours, theirs = alias.init(params), parts.init(params)
    for i in range(3):
        grads = jax.tree.map(lambda x, i=i: jax.random.normal(jax.random.key(i), x.shape), params)
        updates, ours = jax.jit(alias.update)(grads, ours, params)
        expected, theirs = jax.jit(parts.update)(grads, theirs, params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-9), updates, expected)
        params = optax.apply_updates(params, updates)
