"""Trees with pairs whose full-weight gradient is known, and runs of many pairs at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle

import lorapro_jax as lp

SCALE = 2.0
MODES = ("full", "factored", "muon")
SHAPES = {"up_0": (12, 3, 8), "down": (8, 3, 12), "up_1": (12, 3, 8), "wide": (6, 2, 20)}
# r below, at and above the sides of the pair
SIDES = [(6, 2, 5), (1, 1, 1), (3, 8, 2), (12, 12, 6), (9, 4, 17)]


def make(seed=0, dtype=None, shapes=None):
    """(params, grads, dense): Linen-like dicts of pairs, and {name: (a, b, G)} in float64."""
    rng = np.random.default_rng(seed)
    dense = {name: oracle.pair(rng, *shape) for name, shape in (shapes or SHAPES).items()}
    params = {name: node(a, b, dtype) for name, (a, b, _) in dense.items()}
    grads = {name: gradient_node(a, b, G, dtype) for name, (a, b, G) in dense.items()}
    return params, grads, dense


def direction(mode, scale=SCALE, **options):
    """The direction of a mode: Muon's, or one of Adam's."""
    if mode == "muon":
        return lp.scale_by_lorapro_muon(scale, **options)
    return lp.scale_by_lorapro_adam(scale, mode=mode, **options)


def optimizer(mode, rate, scale=SCALE, **options):
    """The whole optimizer of a mode."""
    if mode == "muon":
        return lp.lorapro_muon(rate, scale, **options)
    return lp.lorapro_adamw(rate, scale, mode=mode, **options)


def gradient_node(a, b, G, dtype=None):
    return node(*oracle.factor_gradients(a, b, G, SCALE), dtype)


def node(a, b, dtype=None):
    return {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}


def values(tree):
    """(a, b) of a node in float64 numpy."""
    return tuple(np.asarray(tree[k], np.float64) for k in ("lora_a", "lora_b"))


def step(node_params, node_updates):
    """J(da, db) of one node, dense, in float64."""
    return oracle.step(*values(node_params), *values(node_updates), SCALE)


def run(tx, a, b, G, dtype=None):
    """Trains many pairs at once on given full gradients, G (pairs, steps, m, n), one program.

    Returns a, b, h_a, h_b, da, db as (steps, pairs, ...) float64 numpy arrays, and the last state.
    """

    def one(a, b, gradients):
        params = {"q": node(a, b)}

        def advance(carry, G):
            params, state = carry
            a, b = params["q"]["lora_a"], params["q"]["lora_b"]
            grads = {"q": node(SCALE * G @ b.T, SCALE * a.T @ G)}
            updates, state = tx.update(grads, state, params)
            seen = (*(x["q"][k] for x in (params, grads, updates) for k in ("lora_a", "lora_b")),)
            return (optax.apply_updates(params, updates), state), seen

        (_, state), seen = jax.lax.scan(advance, (params, tx.init(params)), gradients)
        return seen, state

    out, state = jax.jit(jax.vmap(one, out_axes=(1, 0)))(
        *(jnp.asarray(x, dtype) for x in (a, b, G))
    )
    return tuple(np.asarray(x, np.float64) for x in out), state


def many(rng, pairs, shape, kappa, *, steps=6, density=1.0, dead=0.0):
    """(a, b, G, dead rows, dead columns); a share `dead` of rows and columns has no gradient."""
    m, r, n = shape
    a = np.stack([oracle.conditioned(rng, m, r, kappa) for _ in range(pairs)])
    b = np.stack([oracle.conditioned(rng, r, n, kappa) for _ in range(pairs)])
    G = rng.normal(size=(pairs, steps, m, n)) * (rng.random((pairs, steps, m, n)) < density)
    rows, columns = rng.random((pairs, m)) < dead, rng.random((pairs, n)) < dead
    return a, b, G * ~rows[:, None, :, None] * ~columns[:, None, None], rows, columns


def assert_close(x, y, **tolerance):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)
