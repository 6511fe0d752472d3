"""Parameter trees with pairs whose full-weight gradient is known."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle

SCALE = 2.0
SHAPES = {"up_0": (12, 3, 8), "down": (8, 3, 12), "up_1": (12, 3, 8), "wide": (6, 2, 20)}


def make(seed=0, dtype=None, shapes=None):
    """(params, grads, dense): Linen-like dicts of pairs, and {name: (a, b, G)} in float64."""
    rng = np.random.default_rng(seed)
    dense = {name: oracle.pair(rng, *shape) for name, shape in (shapes or SHAPES).items()}
    params = {name: _node(a, b, dtype) for name, (a, b, _) in dense.items()}
    grads = {name: gradient_node(a, b, G, dtype) for name, (a, b, G) in dense.items()}
    return params, grads, dense


def gradient_node(a, b, G, dtype=None):
    return _node(*oracle.factor_gradients(a, b, G, SCALE), dtype)


def _node(a, b, dtype):
    return {"lora_a": jnp.asarray(a, dtype), "lora_b": jnp.asarray(b, dtype)}


def step(node_params, node_updates):
    """J(da, db) of one node, dense, in float64."""
    a, b = (np.asarray(node_params[k], np.float64) for k in ("lora_a", "lora_b"))
    da, db = (np.asarray(node_updates[k], np.float64) for k in ("lora_a", "lora_b"))
    return SCALE * (da @ b + a @ db)


def assert_close(x, y, **tolerance):
    assert jax.tree.structure(x) == jax.tree.structure(y)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), x, y)


def assert_same_computation(x, y):
    """Equal but for the order of sums, as compiled and op-by-op programs differ.

    Relative to a leaf's largest entry: an entry that cancels to nearly 0 has no digits of its own.
    """
    assert jax.tree.structure(x) == jax.tree.structure(y)
    relative = 1e-12 if jax.config.jax_enable_x64 else 1e-5

    def compare(a, b):
        np.testing.assert_allclose(a, b, atol=relative * np.max(np.abs(b), initial=0))

    jax.tree.map(compare, x, y)
